"""Which Parquet or Arrow files a path means."""

from pathlib import Path

from earl.errors import EarlError


def parquet_files(path: Path | str) -> list[Path]:
    """Return the file itself, those of the folder, or those of the pattern (in the last part of the path), sorted.

    Raises:
        EarlError: when a folder or a pattern has none; a single file need not exist.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.arrow"))
    elif any(sign in path.name for sign in "*?["):
        files = sorted(path.parent.glob(path.name))
    else:
        return [path]
    if not files:
        raise EarlError(f"{path}: there is no such Parquet file; check the path, or download the data set")
    return files
