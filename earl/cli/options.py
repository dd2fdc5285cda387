"""What options of several command groups have in common."""

from pathlib import Path

from earl.files import atomic


def output(path: Path | None) -> Path | None:
    """Refuse what cannot be written before the work begins: the callback of an option that names an output.

    Raises:
        EarlError: see `earl.files.atomic.check_target`.
    """
    if path is not None:
        atomic.check_target(path)
    return path
