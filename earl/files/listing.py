"""Which Parquet or Arrow files a path means."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from earl.messages.errors import EarlError

_WILD = "*?["
_NAMED = 5
"""Other files of a folder that a message names, at most."""


def parquet_files(path: Path | str) -> list[Path]:
    """Return the file itself, those of the folder, or those of the pattern, sorted.

    A file or folder of this very name comes before a pattern. Names that begin with ``.`` or ``_`` are left out, as by
    other readers, unless the path's last part begins so itself.

    Raises:
        EarlError: when a folder or a pattern has none; a single file need not exist.
    """
    path = Path(path)
    if path.is_dir():
        files = _visible(path.glob("*.parquet")) or _visible(path.glob("*.arrow"))
    elif path.exists() or not any(sign in part for part in path.parts for sign in _WILD):
        return [path]
    else:
        folder, pattern = _split(path)
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        files = found if path.name.startswith((".", "_")) else _visible(found)
    if not files:
        raise EarlError(f"{path}: {_instead(path)}")
    return files


def _visible(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if not file.name.startswith((".", "_")))


def _split(path: Path) -> tuple[Path, str]:
    """Return the folder that is there, whatever signs its name holds, and the pattern below it."""
    parents = [folder for folder in path.parents if folder.is_dir()]
    folder = parents[0] if parents else Path(path.anchor)
    return folder, path.relative_to(folder).as_posix()


def _instead(path: Path) -> str:
    """Say what there is where no Parquet file is."""
    if not path.is_dir():
        return "there is no such Parquet file; check the path, or download the data set"
    below = sorted({file.parent for file in path.glob("**/*.parquet")} - {path})
    below = [folder.relative_to(path) for folder in below]
    below = [folder for folder in below if not any(part.startswith((".", "_")) for part in folder.parts)]
    if below:
        return (
            f"has Parquet files in folders alone, such as {below[0]}; name one of these folders, or a pattern for all "
            f"of them, {path / '**' / '*.parquet'}"
        )
    others = list(islice((file.name for file in sorted(path.iterdir()) if not file.name.startswith(".")), _NAMED + 1))
    told = ", ".join([*others[:_NAMED], *(["..."] if len(others) > _NAMED else [])])
    return (
        f"holds no Parquet file (*.parquet), but {told or 'nothing'}; check the path, or write the data as Parquet "
        "(docs/data.md shows how)"
    )
