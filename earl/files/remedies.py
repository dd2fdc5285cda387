"""What is said of a file that is not what it should be: what it is instead, and what helps.

What helps depends on whose file it is: a stage writes its own files again, and must never have people delete theirs.
"""

import codecs
from dataclasses import dataclass
from pathlib import Path

from earl.files.layout import Run
from earl.messages.errors import EarlError


@dataclass(frozen=True)
class Remedies:
    """What helps, by what is wrong with a file."""

    missing: str
    damaged: str
    wrong: str
    """Its columns or values are not what they should be."""


OURS = Remedies(
    missing="run the stage that writes it",
    damaged="delete it and run the stage that writes it again",
    wrong="run the stage that writes the file again, or name one of the right kind",
)
"""For files of a run."""
GIVEN = Remedies(
    missing="check the path",
    damaged="download or copy it again",
    wrong="mend the file, or name another",
)
"""For files that people bring."""
TOKENISED = Remedies(
    missing="check the path",
    damaged="download or copy it again, or tokenise the data again",
    wrong="tokenise the data again; raw pairs are described in raw_datasets and named here as stage:tokenise/<name>",
)
"""For tokenised data, which people bring or have made."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""Bytes that a Git LFS pointer is shorter than."""
_HEAD = 4096
_AS_PARQUET = "write it as Parquet, for instance by pandas.{reader}(...).to_parquet(...)"
_MAGIC = {
    b"\x00\x05\x16\x07": "is a companion that macOS wrote beside the file; name the file itself",
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"ARROW1": f"is an Arrow file; {_AS_PARQUET.format(reader='read_feather')}",
    b"\x89HDF\r\n": f"is an HDF5 file; {_AS_PARQUET.format(reader='read_hdf')}",
    b"\x80": "is a pickle, which is not read; write it as Parquet",
}


def is_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves where the content has not been downloaded."""
    return path.is_file() and path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER)


def refuse_pointers(folder: Path) -> None:
    """Look through the files of a folder.

    Raises:
        EarlError: naming a file that is a Git LFS pointer.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_pointer(path):
            raise EarlError(f"{path}: {described(path)}")


def check_policy_folder(folder: Path) -> None:
    """Refuse a policy's folder that is not there.

    Raises:
        EarlError: naming what brings it back, where it is that of an iteration of a run.
    """
    if folder.is_dir():
        return
    iteration, iterations = folder.parent, folder.parent.parent
    if folder.name != "policy" or iterations.name != "iterations" or not iteration.name.isdigit():
        raise EarlError(f"{folder}: is missing; give the folder of a policy")
    run, index = Run(iterations.parent), int(iteration.name)
    if index == 0:
        remedy = f"the run has not been started; earl start --run {run.path} --policy <its folder>"
    elif run.iteration(index).metrics.is_file():
        remedy = f"its checkpoint is not on disk; earl restore --run {run.path} --iteration {index} brings it back"
    else:
        remedy = f"iteration {index} has not been trained; earl status --run {run.path} shows what there is"
    raise EarlError(f"{folder}: is missing: {remedy}")


def described(path: Path) -> str | None:
    """Say what stands where a Parquet file (or safetensors, or an archive) was expected, and what to do about it.

    Returns:
        The end of a sentence that begins with the path; None where the file cannot be told from a damaged one.
    """
    if path.is_dir():
        return "is a folder where one file is expected; name the file"
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        return f"cannot be read ({error.strerror}); check the path and its permissions"
    if head.startswith(_POINTER):
        return "is a Git LFS pointer, not the file itself; download the file with `git lfs pull` in its repository"
    if head[:4] == b"PAR1"[: len(head)]:  # empty or cut
        return None
    for magic, words in _MAGIC.items():
        if head.startswith(magic):
            return words
    return _described_text(head)


def _described_text(head: bytes) -> str | None:
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return None
    if "\x00" in text:
        return None
    if text.lower().startswith(("<!doctype", "<html")):
        return "is a web page, as a download that was refused leaves it; download the file again"
    if text.startswith(("{", "[")):
        return f"is JSON; {_AS_PARQUET.format(reader='read_json')} (JSON lines: lines=True)"
    return f"is plain text, such as CSV; {_AS_PARQUET.format(reader='read_csv')}"
