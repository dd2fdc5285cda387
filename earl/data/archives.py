"""Unpacking tar archives that come from elsewhere: nothing leaves the folder, and only so much comes out.

Files and folders are written first, links after all of them, so that nothing is written through a link. Where a link
leads is looked at once all are there.
"""

import os
import shutil
import sys
import tarfile
from pathlib import Path, PurePosixPath

from earl.messages.errors import EarlError

LARGEST_RATIO = 100
"""Bytes that may come out for each byte of the archive."""
SMALLEST_LIMIT = 2**30
"""Bytes that may come out of any archive, however small."""
MOST_MEMBERS = 10_000_000
_SUFFIXES = (".tar", ".tar.gz", ".tgz")


LARGEST_HEADER = 2**20
"""Bytes of a name or of other headers, which are read into memory."""
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Refused(Exception):
    """Why a member is not unpacked."""


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        found = super().frombuf(buf, encoding, errors)
        if found.type in _HEADERS and found.size > LARGEST_HEADER:
            raise _Refused(f"holds a header of {found.size:,} bytes")
        return found


def is_archive(name: str) -> bool:
    """Return whether a file is an archive, by its name."""
    return name.endswith(_SUFFIXES)


def stem(name: str) -> str:
    """Return an archive's name without its suffix."""
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, compressed or not; what ``folder`` held before goes.

    Raises:
        EarlError: naming the archive, when it is damaged, holds anything but files, folders and links inside of it, has
            a name twice, is too large, or cannot be written. Nothing stays then.
    """
    from tqdm import tqdm

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = archive.stat().st_size
    try:
        with (
            archive.open("rb") as stream,
            tqdm(total=size, desc=f"unpack {archive.name}", unit="B", unit_scale=True, file=sys.stderr) as progress,
            tarfile.open(fileobj=stream, mode="r:*", tarinfo=_Member) as tar,
        ):
            links = []
            room = max(SMALLEST_LIMIT, LARGEST_RATIO * size)
            for count, member in enumerate(tar):
                if count >= MOST_MEMBERS:
                    raise _Refused(f"holds more than {MOST_MEMBERS:,} files")
                room -= member.size
                if room < 0:
                    raise _Refused(f"holds more than {max(SMALLEST_LIMIT, LARGEST_RATIO * size):,} bytes")
                if member.issym() or member.islnk():
                    links.append((_inside(folder, member), member))
                else:
                    _write(tar, member, _inside(folder, member))
                # A list of all members would grow with the archive.
                tar.members = []
                progress.update(stream.tell() - progress.n)
            # The end of a compressed file says whether it is whole.
            while rest := tar.fileobj.read(2**20):
                room -= len(rest)
                if room < 0:
                    raise _Refused("goes on and on after its end")
            for path, member in links:
                _link(folder, path, member)
            _check_links(folder, [path for path, _ in links])
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise EarlError(f"{archive}: {_explained(error, folder)}") from error


def _explained(error: Exception, folder: Path) -> str:
    if isinstance(error, _Refused):
        return f"{error}; nothing of it was kept. Do not trust where it came from"
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename or folder
        return f"could not be unpacked to {where} ({error.strerror}); nothing of it was kept"
    if isinstance(error, tarfile.TarError | EOFError | OSError | ValueError):
        return f"is no complete archive ({error}); nothing of it was kept, download it again"
    return f"is damaged ({error}); nothing of it was kept, download it again"  # zlib has errors of its own


def _inside(folder: Path, member: tarfile.TarInfo) -> Path:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise _Refused(f"holds {member.name!r}, a name that leads out of it")
    return folder.joinpath(*name.parts)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg():
        raise _Refused(f"holds {member.name!r}, which is neither a file, nor a folder, nor a link")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None
    with path.open("xb") as out:
        shutil.copyfileobj(content, out)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} has {path.stat().st_size} of {member.size} bytes")


def _link(folder: Path, path: Path, member: tarfile.TarInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
        return
    target = PurePosixPath(member.linkname)
    if target.is_absolute() or ".." in target.parts or not folder.joinpath(target).is_file():
        raise _Refused(f"holds {member.name!r}, a link to {member.linkname!r}, which is no file in it")
    os.link(folder.joinpath(target), path)


def _check_links(folder: Path, links: list[Path]) -> None:
    root = folder.resolve()
    for path in links:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise _Refused(f"holds {path.relative_to(folder).as_posix()!r}, a link that leads out of it")
