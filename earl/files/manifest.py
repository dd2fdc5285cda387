"""Digests of files, and the manifest that seals a folder.

``manifest.json`` lists every file with its size and SHA-256 and is written last: a folder with a manifest is
complete. The folder's digest is that of its manifest, so that reading it costs nothing however large the weights.
For Parquet files, which are read in parts, it also lists the SHA-256 of the footer; their pages carry checksums.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from earl.messages.errors import EarlError

NAME = "manifest.json"
REMEDY = (
    "make it again: `earl restore` for the checkpoint of an iteration, otherwise remove the folder and run the stage "
    "that writes it, or copy it again"
)
_THREADS = 4
"""Files that are hashed at the same time; hashing releases Python's lock."""


class Entry(TypedDict):
    """What a manifest lists of a file, that of a Parquet file's footer apart."""

    sha256: str
    size: int


def entry_of(data: bytes) -> Entry:
    """Return the entry of a file with these bytes."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


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


def digest_footer(path: Path | str) -> str:
    """Return the SHA-256 of a Parquet file's footer: schema, metadata, sizes and extremes of all columns.

    Raises:
        EarlError: when the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(-8, 2)
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - length, 2)
            return hashlib.sha256(stream.read(length)).hexdigest()
    except OSError as error:
        raise EarlError(f"{path}: is not a complete Parquet file ({error.strerror or error})") from error


def _members(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != NAME)


def _listing(folder: Path, known: Mapping[str, Entry] | None = None) -> str:
    members = _members(folder)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as pool:
        entries = list(pool.map(lambda member: _entry(member, folder, known or {}), members))
    return _text({m.relative_to(folder).as_posix(): entry for m, entry in zip(members, entries, strict=True)})


def _text(entries: Mapping[str, Mapping[str, str | int]]) -> str:
    return json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n"


def _entry(member: Path, folder: Path, known: Mapping[str, Entry]) -> Mapping[str, str | int]:
    size = member.stat().st_size
    entry = known.get(member.relative_to(folder).as_posix())
    if entry is not None:
        if entry["size"] != size:
            raise EarlError(f"{member}: has {size} bytes where {entry['size']} were written; check the file system")
        return entry
    entry = {"sha256": digest_file(member), "size": size}
    return entry | {"footer": digest_footer(member)} if _is_parquet(member) else entry


def _is_parquet(member: Path) -> bool:
    with open(member, "rb") as stream:
        return member.suffix == ".parquet" and stream.read(4) == b"PAR1"


def seal(folder: Path | str, known: Mapping[str, Entry] | None = None) -> str:
    """Write the manifest of a finished folder and return the folder's digest.

    Args:
        folder: The folder.
        known: Entries of files whose writer hashed what it wrote; the others are read.

    Raises:
        EarlError: when a file of `known` has another size.
    """
    folder = Path(folder)
    (folder / NAME).write_text(_listing(folder, known), encoding="utf-8")
    return digest_folder(folder)


def digest_of(entries: Mapping[str, Entry]) -> str:
    """Return the digest of a sealed folder with these files, none of which is Parquet."""
    return hashlib.sha256(_text(entries).encode()).hexdigest()


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


def check(folder: Path | str, deep: bool = False, remedy: str = REMEDY) -> int:
    """Compare a sealed folder with its manifest: names, sizes and footers, and contents too when ``deep``.

    Returns how many files it lists.

    Args:
        folder: The folder.
        deep: Also hash every file.
        remedy: Ends the message of an error.

    Raises:
        EarlError: when the manifest is missing or a file is missing, of another size or (deep) changed.
    """
    folder = Path(folder)
    entries = _entries(folder, remedy)
    for name, entry in entries.items():
        _check_size(folder, name, entry, remedy)
        if entry["footer"] and digest_footer(folder / name) != entry["footer"]:
            raise EarlError(f"{folder / name}: is damaged: its footer differs from {folder / NAME}; {remedy}")
    if deep:
        with reading(folder, remedy=remedy):
            pass
    return len(entries)


def refuse_foreign(folder: Path | str) -> None:
    """Refuse to replace a folder that holds anything but what its manifest lists: no stage wrote that.

    Raises:
        EarlError: there is such a file, or link.
    """
    folder = Path(folder)
    listed = {folder / NAME, *(folder / name for name in _entries(folder, REMEDY))} if (folder / NAME).is_file() else ()
    for path in sorted(folder.rglob("*")):
        if path not in listed and (path.is_symlink() or not path.is_dir()):
            raise EarlError(
                f"{folder}: would be replaced as a whole, but {path.relative_to(folder)} in it is not from the stage "
                "that writes it; give another path, or move what is there away"
            )


@contextmanager
def reading(
    folder: Path | str,
    names: Collection[str] | None = None,
    remedy: str = REMEDY,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[None]:
    """Hash files of a folder in threads while the body reads them; at its end they are what the manifest says.

    Damage is reported in place of whatever it made the body raise. A folder that nobody sealed has no digests to
    compare with: its files pass.

    Args:
        folder: The folder.
        names: Files that the body reads, those of them that the manifest lists; by default all of the folder.
        remedy: Ends the message of an error.
        rank: Of several processes that read the same files, each hashes a part of them; this one's number.
        ranks: How many there are.

    Raises:
        EarlError: a file is missing, or its size or content is not what the manifest says.
    """
    folder = Path(folder)
    entries = _entries(folder, remedy) if (folder / NAME).is_file() else {}
    wanted = [name for name in sorted(entries) if names is None or name in names][rank::ranks]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as pool:
        checks = [pool.submit(_check_content, folder, name, entries[name], remedy) for name in wanted]
        try:
            yield
        finally:
            for check in checks:
                check.result()


def _entries(folder: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """Return what a manifest lists, by name: size, digest, and that of the footer or None."""
    path = folder / NAME
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        wanted = ("size", "sha256")
        return {
            name: {key: entry[key] for key in wanted} | {"footer": entry.get("footer")} for name, entry in files.items()
        }
    except FileNotFoundError as error:
        raise EarlError(f"{path}: is missing, so {folder} is incomplete; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EarlError(f"{path}: is damaged ({error!r}); {remedy}") from error


def _check_size(folder: Path, name: str, entry: dict[str, Any], remedy: str) -> None:
    member = folder / name
    if not member.is_file():
        raise EarlError(f"{member}: is missing though {folder / NAME} lists it; {remedy}")
    size = member.stat().st_size
    if size != entry["size"]:
        raise EarlError(f"{member}: has {size} bytes where {folder / NAME} lists {entry['size']}; {remedy}")


def _check_content(folder: Path, name: str, entry: dict[str, Any], remedy: str) -> None:
    _check_size(folder, name, entry, remedy)
    if digest_file(folder / name) != entry["sha256"]:
        raise EarlError(f"{folder / name}: is damaged: its content differs from {folder / NAME}; {remedy}")
