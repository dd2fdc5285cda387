"""The published data sets that the experiments use: where they are, what is known of them, and who uses them.

``catalogue.json`` holds them as data. Kinds:

    tokenised   archives of the reference's files (`earl.data.datalist`)
    pairs       Parquet or Arrow files of image pairs or of prompts, which the pipeline can download by itself, too
    imgedit     the archive of ImgEdit-Bench (`earl.data.imgedit`)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from earl.messages.errors import EarlError

TOKENISED = "tokenised"
"""Folder of the converted data, beside ``list`` and ``feature``."""


@dataclass(frozen=True)
class Entry:
    """One published data set."""

    name: str
    kind: Literal["tokenised", "pairs", "imgedit"]
    repository: str
    """Name of a data set on the hub."""
    files: tuple[str, ...]
    """Patterns of files in it; the first one that any file matches counts."""
    place: str
    """Folder below the one that data are fetched to; of tokenised data, the one that holds ``list``."""
    size: str
    """How much it is, as its card says."""
    licence: str
    """As a copy of its card says; `not seen` where no copy was at hand."""
    used_by: str

    @property
    def key(self) -> dict[str, Any]:
        """What the converted data depend on."""
        return {"name": self.name, "repository": self.repository, "files": self.files, "place": self.place}


@cache
def entries() -> dict[str, Entry]:
    """Return all data sets by name."""
    return {one["name"]: Entry(**one | {"files": tuple(one["files"])}) for one in _read()["data"]}


def groups() -> dict[str, list[str]]:
    """Return names that stand for several data sets."""
    return _read()["groups"]


def named(names: Iterable[str]) -> list[Entry]:
    """Return the data sets of these names or groups, each once.

    Raises:
        EarlError: for a name that is neither.
    """
    found: dict[str, Entry] = {}
    for name in names:
        for one in groups().get(name, [name]):
            if one not in entries():
                raise EarlError(f"{name}: is no data set of the catalogue; `earl data list` names them all")
            found[one] = entries()[one]
    return list(found.values())


def at(path: Path) -> Entry | None:
    """Return the tokenised data set whose converted data are expected at a path."""
    tail = f"/{path.as_posix()}"
    made = (one for one in entries().values() if one.kind == "tokenised")
    return next((one for one in made if tail.endswith(f"/{one.place}/{TOKENISED}")), None)


def table(rows: Iterable[Entry]) -> str:
    """Return a line for each data set and group, for people."""
    cells = [("name", "size", "licence", "from", "used by")]
    cells += [(one.name, one.size, one.licence, one.repository, one.used_by) for one in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, "", *(f"{name}: {', '.join(members)}" for name, members in groups().items())])


@cache
def _read() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
