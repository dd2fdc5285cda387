"""The reference's ``tokenized_datalist.json``: which files it lists, and in which folder they lie.

::

    A   <dir>/list/tokenized_datalist.json   names "17.pth"           <dir>/feature/17.pth
    B   <dir>/list/tokenized_datalist.json   names "feature/17.pth"   <dir>/feature/17.pth
    C   <dir>/list/tokenized_datalist.json   names "17.pth"           <dir>/17.pth

``list`` may be linked into ``feature``. Where none of these holds the files, they are those of the list's ``prefix``.
The folder is chosen once for a list, by looking at some of its files.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from earl.data.example import is_unicode
from earl.files import remedies
from earl.messages.errors import EarlError

FILE = "tokenized_datalist.json"
_LOOKED_AT = 32


@dataclass(frozen=True)
class Datalist:
    """A list whose folder is known."""

    path: Path
    names: list[str]
    folder: Path

    @property
    def dataset(self) -> str:
        """Name of the data set: the two folders above ``list``."""
        root = root_of(self.path)
        return f"{root.parent.name}/{root.name}"

    def file(self, row: int) -> Path:
        """Return the file that holds a row."""
        return self.folder / self.names[row]

    def example_id(self, row: int) -> str:
        """Return the name of a row's file, which stands in for an id that the file does not have."""
        return self.names[row].removeprefix("feature/").removesuffix(".pth")


def read(path: Path) -> Datalist:
    """Read a list and find its folder.

    Raises:
        EarlError: naming the list, when it is missing or damaged, lists nothing, none of its files is there, or two
            folders hold them.
    """
    names, prefix = _names(path)
    looked_at = names[:: max(1, len(names) // _LOOKED_AT)]
    beside = _beside(path)
    found = [folder for folder in beside if _holds(folder, looked_at)]
    for other in found[1:]:
        if not _same(found[0], other, looked_at):
            raise EarlError(
                f"{path}: {found[0]} and {other} both hold files of this list; move the ones that are not meant away"
            )
    if not found and prefix and _holds(Path(prefix), looked_at):
        found = [Path(prefix)]
    if not found:
        places = ", ".join(str(folder) for folder in [*beside, *([Path(prefix)] if prefix else [])])
        raise EarlError(
            f"{path}: none of the files that it lists is there, such as {names[0]}; looked in {places}. Move the files "
            "beside the list, or mend the list's prefix"
        )
    return Datalist(path, names, found[0])


def root_of(path: Path) -> Path:
    """Return the folder that holds `list`, though the list be named by way of a link in `feature`."""
    above = path.absolute().parent.parent
    return above.parent if above.name == "feature" else above


def missing(path: Path) -> str:
    """Return what helps where there is no list at a path: it may be named by way of a link that is not there."""
    unlinked = root_of(path) / "list" / path.name
    return f"there is {unlinked}: name that" if unlinked.is_file() else "check the path in the configuration"


def _beside(path: Path) -> list[Path]:
    """Return the folders of layouts A, B and C; B and C are told apart by the names alone."""
    root = root_of(path)
    return [root, root / "feature"]


def _holds(folder: Path, names: list[str]) -> bool:
    return any(os.path.exists(folder / name) for name in names)


def _same(one: Path, other: Path, names: list[str]) -> bool:
    """Return whether two folders are one by two names, as far as files of the list tell."""
    return all(os.path.realpath(one / name) == os.path.realpath(other / name) for name in names)


def _names(path: Path) -> tuple[list[str], str]:
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EarlError(f"{path}: does not exist; {missing(path)}") from error
    except OSError as error:
        raise EarlError(f"{path}: cannot be read ({error.strerror}); check the path in the configuration") from error
    except ValueError as error:
        found = remedies.described(path) if remedies.is_pointer(path) else f"is damaged ({error}); download it again"
        raise EarlError(f"{path}: {found}") from error
    names = listing.get("path_list") if isinstance(listing, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EarlError(
            f"{path}: field 'path_list' must be a list of file names; a data set in JSON is the reference's {FILE}, "
            "all others are Parquet"
        )
    if not names:
        raise EarlError(f"{path}: the data set is empty; leave it out of the configuration")
    prefix = listing.get("prefix") or ""
    if not isinstance(prefix, str):
        raise EarlError(f"{path}: field 'prefix' is a {type(prefix).__name__} where text is expected")
    for field, text in (("prefix", prefix), *(("path_list", name) for name in names)):
        if not is_unicode(text):
            raise EarlError(f"{path}: field {field!r} is no text: it holds half of a surrogate pair")
    return names, prefix
