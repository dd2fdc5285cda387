"""Fetch: published data sets from the hub, checked, laid out where experiments look, and converted.

::

    <to>/<place>/list/tokenized_datalist.json   tokenised data, as published; `list` is linked into `feature`
    <to>/<place>/feature/*.pth
    <to>/<place>/tokenised/                     the same as Parquet, every id checked: what the ten experiments read
    <to>/<place>/fetched.json                   repository, commit, files with sizes and checksums, licence
    <to>/<place>/*.parquet                      pairs and prompts

Downloads go through the cache of huggingface_hub, which continues what was interrupted. What is there already is not
fetched again.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from earl.data import archives, convert, datalist, hub_files, imgedit
from earl.data.catalogue import TOKENISED, Entry
from earl.files import atomic, manifest
from earl.messages import network
from earl.messages.errors import EarlError

RECORD = "fetched.json"
CODEBOOK_SIZE = 32768
"""Of Emu3's vision tokenizer, which made all published archives."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, with what the hub says about its content."""

    name: str
    size: int
    sha256: str | None
    """Of a large file (Git LFS)."""
    git_sha1: str | None
    """Of any other: Git's own checksum, over a header and the content."""


@dataclass(frozen=True)
class Source:
    """What is fetched: the files of one commit."""

    repository: str
    commit: str
    licence: str
    files: tuple[HubFile, ...]

    @property
    def text(self) -> str:
        size = sum(file.size for file in self.files)
        return f"{self.repository}: {len(self.files)} files, {size / 1e9:,.2f} GB, licence: {self.licence}"


def fetch(entries: Sequence[Entry], to: Path, keep_archives: bool = True, max_rejected_fraction: float = 0.0) -> None:
    """Fetch data sets into a folder.

    Args:
        entries: From the catalogue.
        to: The folder, for the ten experiments `$APP__DATA_DIR`.
        keep_archives: Keep the `.pth` files of tokenised data once they are converted.
        max_rejected_fraction: Share of the `.pth` files that may be unusable.

    Raises:
        EarlError: naming data set, file and remedy, when the hub does not give it, a checksum differs, an archive
            cannot be unpacked, or a file cannot be converted. What is complete by then stays.
    """
    missing = [one for one in entries if not _is_there(to / one.place, one)]
    for one in entries:
        if one not in missing:
            _say(f"{one.name}: {to / one.place} is there already")
    # What is laid out only waits to be converted.
    sources = {one: look_up(one) for one in missing if not (to / one.place / RECORD).is_file()}
    for source in dict.fromkeys(sources.values()):
        # Data sets of one archive are unpacked together.
        _fetch_together([one for one in sources if sources[one] == source], source, to)
    for one in missing:
        if one.kind == "tokenised":
            _convert(one, to / one.place, to / one.place / TOKENISED, max_rejected_fraction)
            if not keep_archives:
                _drop_archives(to / one.place)


def make(entry: Entry, out: Path, max_rejected_fraction: float = 0.0) -> None:
    """Fetch a tokenised data set and write it as a sealed folder of tokenised Parquet alone.

    Raises:
        EarlError: see `fetch`; also when the data set is of another kind.
    """
    if entry.kind != "tokenised":
        raise EarlError(f"{entry.name}: is not tokenised; --out is for tokenised data, --to for any")
    with _scratch(out.parent / f".{out.name}.fetched") as scratch:
        _fetch_together([entry], look_up(entry), scratch)
        _convert(entry, scratch / entry.place, out, max_rejected_fraction)


def look_up(entry: Entry) -> Source:
    """Ask the hub for the files of a data set.

    Raises:
        EarlError: when the hub does not answer, or has no such data set or file.
    """
    import huggingface_hub

    with _hub_errors(entry):
        found = huggingface_hub.HfApi().dataset_info(entry.repository, files_metadata=True)
    files = {
        file.rfilename: HubFile(file.rfilename, file.size or 0, file.lfs and file.lfs.sha256, file.blob_id)
        for file in found.siblings or []
    }
    for pattern in entry.files:
        wanted = [file for name, file in sorted(files.items()) if fnmatchcase(name, pattern)]
        if wanted:
            card = found.card_data
            licence = str((card.get("license") if card else None) or "not stated")
            return Source(entry.repository, found.sha or "main", licence, tuple(wanted))
    shown = ", ".join(sorted(files)[:10])
    raise EarlError(
        f"{entry.name}: {entry.repository} on the hub has no file {' or '.join(entry.files)}; it has {shown or 'none'}"
    )


def _is_there(place: Path, entry: Entry) -> bool:
    if entry.kind == "tokenised":
        return (place / TOKENISED / manifest.NAME).is_file()
    return (place / manifest.NAME).is_file()


def _fetch_together(entries: Sequence[Entry], source: Source, to: Path) -> None:
    """Download and lay out data sets that share their files."""
    _say(f"{', '.join(one.name for one in entries)}: fetching {source.text}")
    if entries[0].kind == "pairs":
        for one in entries:
            manifest.refuse_foreign(to / one.place)
            with atomic.folder(to / one.place) as folder:
                for file in source.files:
                    hub_files.take(_download(one, source, file).resolve(), folder / file.name.replace("/", "--"))
                _record(folder, source)
                manifest.seal(folder)
        return
    for one in entries:
        _refuse_foreign(to / one.place)
    with _scratch(to / f".{entries[0].name}.unpacked") as scratch:
        for file in source.files:
            _unpack(_download(entries[0], source, file), file.name, scratch)
        for one in entries:
            if one.kind == "imgedit":
                with atomic.folder(to / one.place) as folder:
                    imgedit.convert(scratch, folder / f"{one.name}.parquet")
                    _record(folder, source)
                    manifest.seal(folder)
            else:
                _lay_out(one, scratch, to / one.place, source)


def _download(entry: Entry, source: Source, file: HubFile) -> Path:
    """Return a downloaded file whose content is what the hub says; a wrong one is removed, to come again."""
    import huggingface_hub

    _say(f"{entry.name}: downloading {file.name}, {file.size / 1e9:,.2f} GB")
    with _hub_errors(entry):
        path = Path(
            huggingface_hub.hf_hub_download(source.repository, file.name, repo_type="dataset", revision=source.commit)
        )
    expected, found = file.sha256 or file.git_sha1, _checksum(path, file)
    if expected is not None and expected != found:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise EarlError(
            f"{entry.name}: {file.name} has the checksum {found} where the hub says {expected}; it was removed, "
            "fetch it again"
        )
    return path


def _checksum(path: Path, file: HubFile) -> str:
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(path: Path, name: str, scratch: Path) -> None:
    """Unpack an archive, or link a file, where it stands in its repository."""
    at = scratch / name
    at.parent.mkdir(parents=True, exist_ok=True)
    if archives.is_archive(name):
        folder = at.parent / archives.stem(at.name)
        while folder.exists():
            folder = folder.with_name(f"{folder.name}_")
        archives.unpack(path, folder)
        return
    hub_files.take(path.resolve(), at)


def _lay_out(entry: Entry, scratch: Path, place: Path, source: Source) -> None:
    """Move a data set from among what was unpacked to where it belongs; the record comes with it."""
    roots = sorted({datalist.root_of(path) for path in scratch.rglob(datalist.FILE)})
    wanted = Path(entry.place).parts
    depth = {root: _common_tail(root.relative_to(scratch).parts, wanted) for root in roots}
    best = [root for root in roots if depth[root] == max(depth.values()) > 0 and _names(root, scratch, entry)]
    if len(best) != 1:
        there = ", ".join(root.relative_to(scratch).as_posix() for root in (best or roots)) or "no list"
        raise EarlError(f"{entry.name}: {source.repository} should hold {entry.place}, but has {there}")
    root = best[0]
    feature = root / "feature"
    if feature.is_dir() and not (feature / "list").exists():
        (feature / "list").unlink(missing_ok=True)
        (feature / "list").symlink_to("../list")
    datalist.read(root / "list" / datalist.FILE)
    _record(root, source)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(root, place)


def _names(root: Path, scratch: Path, entry: Entry) -> bool:
    """Return whether a folder's path, its archive's name included, names the data set: all have a `train`."""
    wanted = PurePosixPath(entry.place).parts[-2:][0]
    return _plain(wanted) in _plain(root.relative_to(scratch).as_posix())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _common_tail(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many of the last names two paths have in common."""
    count = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        count += 1
    return count


def _refuse_foreign(place: Path) -> None:
    if place.exists() and not (place / RECORD).is_file():
        raise EarlError(
            f"{place}: is there already, and was not fetched by this command; convert its list by `earl convert data "
            f"{place / 'list' / datalist.FILE} --out {place / TOKENISED}`, or move it away"
        )


def _convert(entry: Entry, place: Path, out: Path, max_rejected_fraction: float) -> None:
    convert.run(place / "list" / datalist.FILE, out, CODEBOOK_SIZE, entry.name, max_rejected_fraction)


def _drop_archives(place: Path) -> None:
    for member in place.iterdir():
        if member.name not in (TOKENISED, RECORD):
            shutil.rmtree(member) if member.is_dir() and not member.is_symlink() else member.unlink()


def _record(folder: Path, source: Source) -> None:
    atomic.write_text(folder / RECORD, json.dumps(asdict(source), indent=1) + "\n")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is gone afterwards; what a killed run left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hub_errors(entry: Entry) -> AbstractContextManager[None]:
    what = f"{entry.name}: {entry.repository} did not come from the hub"
    return network.failures(what, f"{network.CHECK_HUB}, and whether its page has terms to accept")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
