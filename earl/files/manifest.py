"""Digests of files, and the manifest that seals a folder.

``manifest.json`` lists every file with its size and SHA-256 and is written last: a folder with a manifest is
complete. The folder's digest is that of its manifest, so that reading it costs nothing however large the weights.
"""

import hashlib
import json
from pathlib import Path

from earl.errors import EarlError

NAME = "manifest.json"


def digest_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        EarlError: when the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EarlError(f"{path}: cannot be read ({error.strerror or error})") from error


def _members(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != NAME)


def _listing(folder: Path) -> str:
    files = {
        member.relative_to(folder).as_posix(): {"sha256": digest_file(member), "size": member.stat().st_size}
        for member in _members(folder)
    }
    return json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"


def seal(folder: Path | str) -> str:
    """Write the manifest of a finished folder and return the folder's digest."""
    folder = Path(folder)
    (folder / NAME).write_text(_listing(folder), encoding="utf-8")
    return digest_folder(folder)


def digest_folder(folder: Path | str) -> str:
    """Return the digest of a folder: its manifest's, or for one that nobody sealed, that of a listing made now.

    Raises:
        EarlError: when the folder does not exist or holds nothing.
    """
    folder = Path(folder)
    if (folder / NAME).is_file():
        return digest_file(folder / NAME)
    if not folder.is_dir() or not _members(folder):
        raise EarlError(f"{folder}: is not a folder with files; check the path, or run the stage that writes it")
    return hashlib.sha256(_listing(folder).encode()).hexdigest()


def fingerprint(folder: Path | str) -> str | None:
    """Return what changes when a folder does, without reading its files; None where there is no such folder.

    For a sealed folder its digest, else one of names, sizes and times: good for a process that keeps what it loaded,
    not for a record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if (folder / NAME).is_file():
        return digest_file(folder / NAME)
    files = [(member.relative_to(folder).as_posix(), member.stat()) for member in _members(folder)]
    listing = [(name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def check(folder: Path | str, deep: bool = False) -> None:
    """Compare a sealed folder with its manifest: names and sizes, and contents too when ``deep``.

    Raises:
        EarlError: when the manifest is missing or a file is missing, of another size or (deep) changed.
    """
    folder = Path(folder)
    path = folder / NAME
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except FileNotFoundError as error:
        raise EarlError(f"{path}: is missing, so {folder} is incomplete; run the stage that writes it") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EarlError(f"{path}: is damaged ({error!r}); run the stage that writes {folder} again") from error
    for name, entry in files.items():
        member = folder / name
        if not member.is_file():
            raise EarlError(f"{member}: is missing though {path} lists it; run the stage that writes {folder} again")
        if member.stat().st_size != entry["size"]:
            raise EarlError(
                f"{member}: has {member.stat().st_size} bytes where {path} lists {entry['size']}; "
                f"run the stage that writes {folder} again"
            )
        if deep and digest_file(member) != entry["sha256"]:
            raise EarlError(f"{member}: its content differs from {path}; run the stage that writes {folder} again")
