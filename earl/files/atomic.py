"""Outputs appear only complete: temporary name, fsync, rename. They replace files and folders, and nothing else."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from earl.messages.errors import EarlError
from earl.messages.text import encodable


def _temporary(path: Path) -> Path:
    # Beside the target, so that the rename stays inside one file system; hidden, so that no glob takes it for data.
    return path.parent / f".{path.name}.tmp-{os.getpid()}"


def _clear_leftovers(path: Path) -> None:
    """Remove what a writer of the same output left when it was killed; an output has one writer at a time."""
    for leftover in path.parent.glob(f".{path.name}.*-*"):
        if leftover.name.startswith((f".{path.name}.tmp-", f".{path.name}.old-")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def check_target(path: Path | str, is_folder: bool | None = None) -> None:
    """Refuse a path where something stands that an output must not replace.

    Args:
        path: Where the output is to appear.
        is_folder: Whether it is a folder; None: not known yet.

    Raises:
        EarlError: there is a symbolic link, a device, a FIFO or a socket; or a file where a folder is to appear, or the
            other way round.
    """
    path = Path(path)
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing is there; or whoever writes will meet the reason
    if stat.S_ISLNK(mode):
        raise EarlError(
            f"{path}: is a symbolic link to {os.readlink(path)}, which is not replaced; give the path that it points "
            "to, or remove the link"
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise EarlError(f"{path}: is {kind}, which is not replaced; give the path of a file or folder to write")
    if is_folder is not None and stat.S_ISDIR(mode) != is_folder:
        found, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise EarlError(f"{path}: is {found}; {wanted} is to be written, so remove it or give another path")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(path: Path, mode: int) -> None:
    """Give a file or folder the permissions that anything new gets here, those of ``mode``.

    Libraries that write by way of a temporary file of their own leave it to its owner alone.
    """
    if not path.is_symlink():
        path.chmod(mode & (0o777 if path.is_dir() else 0o666))


def _usual_mode(path: Path) -> int:
    """Return the permissions of a file made anew at ``path``, as umask and folder have them; nothing stays there."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = path.stat().st_mode
    path.unlink()
    return mode


def refusal(path: Path | str, error: OSError, left: str = "nothing was left behind") -> str:
    """Return what to tell someone whose file the system did not let us write."""
    return (
        f"{path}: could not be written ({error.strerror or error}); {left}. "
        "Free space or check the folder's permissions, then run the stage again."
    )


@contextmanager
def _beside(path: Path, is_folder: bool, left: str = "nothing was left behind") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when anything fails, nothing of it is left."""
    check_target(path, is_folder)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        yield temporary
        _sync(path.parent)
    except OSError as error:
        _clear_leftovers(path)
        raise EarlError(refusal(path, error, left)) from error
    except BaseException:
        _clear_leftovers(path)
        raise


@contextmanager
def file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes ``path``, on failure it is removed.

    Raises:
        EarlError: when the system refuses the write (disk full, no permission), or no file may stand there.
    """
    with _beside(Path(path), is_folder=False) as temporary:
        mode = _usual_mode(temporary)
        yield temporary
        _share(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)


@contextmanager
def folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``path``, replacing what was there.

    Raises:
        EarlError: when the system refuses the write (disk full, no permission), or no folder may stand there.
    """
    with _beside(Path(path), is_folder=True) as temporary:
        temporary.mkdir()
        mode = temporary.stat().st_mode
        yield temporary
        for member in sorted(temporary.rglob("*")):
            _share(member, mode)
            _sync(member)
        _sync(temporary)
        _replace_folder(temporary, Path(path))


@contextmanager
def resumable_folder(path: Path | str, made_from: str) -> Iterator[Path]:
    """Yield a folder to fill that becomes ``path`` on success, and otherwise waits for the next writer of ``path``.

    What an earlier writer left in it is kept only where it was made from the same; its files must appear atomically
    themselves, so that each that is there is whole.

    Args:
        path: Where the folder appears once it is complete, replacing what was there.
        made_from: Names all that the content depends on.

    Raises:
        EarlError: when the system refuses the write (disk full, no permission), or no folder may stand there.
    """
    path = Path(path)
    unfinished, note = (path.parent / f".{path.name}.{suffix}" for suffix in ("unfinished", "made-from"))
    with _beside(path, is_folder=True, left=f"what is done waits in {unfinished}"):
        if not note.is_file() or note.read_text(encoding="utf-8") != made_from:
            if unfinished.exists():
                shutil.rmtree(unfinished)
            write_text(note, made_from)
        unfinished.mkdir(exist_ok=True)
        yield unfinished
        for member in sorted(unfinished.rglob("*")):
            _sync(member)
        _sync(unfinished)
        _replace_folder(unfinished, path)
        note.unlink()


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    # A folder cannot be renamed over one that holds files: step the old one aside first.
    aside = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, aside)
    os.rename(source, target)
    shutil.rmtree(aside)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with file(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8")
