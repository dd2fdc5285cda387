"""Download: the Parquet or Arrow files of a data set on the Hugging Face hub, as a sealed folder."""

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from earl.files import atomic, manifest
from earl.files.hub_names import DataFiles
from earl.messages import network
from earl.messages.errors import EarlError


def download(wanted: DataFiles, out: Path) -> str:
    """Fill the folder ``out`` with the files, slashes in their paths as ``--``; return its digest.

    They come through the cache of huggingface_hub, which goes on where it was stopped. Where the cache is on the same
    file system they take no more room.

    Raises:
        EarlError: when the hub does not give the data set, or it has no such file.
    """
    import huggingface_hub

    with network.failures(f"{wanted}: could not be downloaded", network.CHECK_HUB):
        snapshot = Path(
            huggingface_hub.snapshot_download(
                wanted.repository, repo_type="dataset", revision=wanted.revision, allow_patterns=[wanted.files]
            )
        )
    # The cache may hold what was downloaded for others.
    kind = f"*{Path(wanted.files).suffix}"
    names = sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob(kind))
    names = [name for name in names if fnmatchcase(name, wanted.files)]
    if not names:
        raise EarlError(f"{wanted}: the data set has no such file; look at its files on the hub and mend the pattern")
    with atomic.folder(out) as folder:
        for name in names:
            take((snapshot / name).resolve(), folder / name.replace("/", "--"))
        return manifest.seal(folder)


def take(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without such links
        shutil.copy2(file, to)
