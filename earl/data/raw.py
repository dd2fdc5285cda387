"""Raw image pairs in Parquet or Arrow files of any columns, as rows of one form.

A mapping says where each of our columns stands: ``edited_prompt_list[0]`` is the first item of a list, ``a.b`` a field
of a struct, or a column or field whose whole name this is (`earl.data.places`). A selection says which rows are taken
(`earl.data.selection`). They are numbered through all files, in windows that never cross a file, so that a reader can
begin anywhere.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from earl.data import cells, places, row_files, selection
from earl.data.example import has_words, is_unicode
from earl.data.places import Place
from earl.data.selection import Selection
from earl.files import listing, tables
from earl.files.pictures import Rejected
from earl.messages.errors import EarlError

COLUMNS = tuple(tables.RAW.names)
OPTIONAL = ("example_id", "task", "reasoning")
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_IMAGE = "an image is its encoded bytes, or a struct {bytes, path}; a path alone is not enough"
_REMEDY = "say in raw_datasets.<name>.columns where it stands, or null where there is none"


@dataclass(frozen=True)
class Window:
    """Some rows of one file."""

    file: Path
    first_row: int
    """Number of the file's first row through all files."""
    numbers: np.ndarray
    """Numbers of the rows in their file, ascending."""

    @property
    def rows(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class RawRow:
    """One pair as it stands in the file; images are encoded, None where the file has no bytes."""

    row: int
    """Number of the row in its file."""
    example_id: str
    task: str | None
    instruction: str | None
    reasoning: str | dict | None
    """JSON or a struct; of several columns, their texts by name."""
    original: bytes | None
    edited: bytes | None
    has_edited: bool = True
    """Whether the data set has edited images at all; one that has not can only be prompted with."""
    problem: tuple[str, str] | None = None
    """Our column that has no value since it cannot be read or found, and why."""

    def checked_instruction(self) -> str:
        """Return the instruction.

        Raises:
            Rejected: when there is none.
        """
        if not self.instruction or not has_words(self.instruction):
            raise Rejected("no instruction")
        return self.instruction

    def reasoning_pairs(self) -> list[tuple[str, str]] | None:
        """Return the (key, text) pairs of a JSON object or a struct, None where there are none.

        Raises:
            Rejected: when it is something else.
        """
        value = self.reasoning
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise Rejected(f"reasoning is not JSON: {error}") from error
        if value is None:
            return None
        if not isinstance(value, dict):
            raise Rejected("reasoning is no JSON object of text")
        pairs = [(key, text) for key, text in value.items() if text is not None]
        if not all(isinstance(text, str) for _, text in pairs):
            raise Rejected("reasoning is no JSON object of text")
        if not all(is_unicode(part) for pair in pairs for part in pair):
            raise Rejected("reasoning is no text: half of a surrogate pair")
        return pairs or None


class RawSource:
    """The files of a raw data set. Opening it reads their footers alone and checks their columns."""

    def __init__(
        self,
        path: Path | str,
        columns: Mapping[str, str | list[str] | None] | None = None,
        chosen: Selection | None = None,
        instruction_prefix: str | None = None,
        task: str | None = None,
    ) -> None:
        """Check the files.

        Args:
            path: A Parquet or Arrow file, a folder of them, or a pattern such as ``data/train-*.parquet``.
            columns: Places of our columns; null for one that is not there. A column that is not named has its own
                name, and of those only `OPTIONAL` ones may be missing. Reasoning may be a list of places.
            chosen: Which rows to take; by default all. For a filter, the columns that it names are read.
            instruction_prefix: Text that is cut off the beginning of instructions.
            task: Task of every row, where no column holds it.

        Raises:
            EarlError: naming file and column, when there is no file, one is damaged, a column is missing or of a type
                that cannot be what it should be, or no row is selected.
        """
        self.path = Path(path)
        self.files = listing.parquet_files(path)
        self._given = dict(columns or {})
        self._chosen = chosen or Selection()
        self._prefix = instruction_prefix or ""
        self._task = task
        self._counts: list[int] = []
        self._places: dict[Path, dict[str, list[Place]]] = {}
        for file in self.files:
            with row_files.open_file(file) as source:
                self._places[file] = self._found(file, source.schema)
                self._chosen.places(file, source.schema)
                self._counts.append(sum(source.group_rows))
            if _ways(self._places[file]) != _ways(self._places[self.files[0]]):
                raise EarlError(f"{file}: has other columns than {self.files[0]}; keep them in different data sets")
        self.places = {name: self._given.get(name, name) for name in self._places[self.files[0]]}
        if not sum(self._counts):
            raise EarlError(f"{path}: the data set is empty; give a file with at least one row")
        self._rows: np.ndarray | None = None
        self._originals: selection.Originals | None = None
        if not self._chosen.is_everything:
            self._rows, self._originals = selection.rows(self.files, self._counts, self._chosen)

    def __len__(self) -> int:
        return sum(self._counts) if self._rows is None else len(self._rows)

    @property
    def settings(self) -> dict[str, Any]:
        """What rows depend on beside the files, as JSON knows it."""
        settings = {"columns": self.places, "instruction_prefix": self._prefix, "task": self._task}
        return settings | self._chosen.settings()

    @cached_property
    def footers_digest(self) -> str:
        """SHA-256 over the files' names, sizes and footers, where sizes and extremes of all columns stand.

        Not over their content: published data sets have terabytes. Arrow files have no such footer, and are read.
        """
        found = []
        for file in self.files:
            with row_files.open_file(file) as source:
                found.append((file.name, file.stat().st_size, source.digest()))
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def label(self, file: Path) -> str:
        """Return how a file is told from the others: its name, below what the paths of all have in common."""
        return os.path.relpath(file, os.path.commonpath([each.absolute().parent for each in self.files]))

    @property
    def times(self) -> list[int]:
        """When each file was last changed, in nanoseconds: what its footer may not show."""
        return [file.stat().st_mtime_ns for file in self.files]

    def windows(self, rows: int) -> list[Window]:
        """Cut the data set into windows of at most so many rows."""
        cut, first = [], 0
        for file, count in zip(self.files, self._counts, strict=True):
            inside = np.arange(count)
            if self._rows is not None:
                inside = self._rows[(self._rows >= first) & (self._rows < first + count)] - first
            cut += [Window(file, first, inside[start : start + rows]) for start in range(0, len(inside), rows)]
            first += count
        return cut

    def read(self, window: Window, rows: int) -> Iterator[list[RawRow]]:
        """Yield the rows of a window in lists of at most so many.

        Raises:
            EarlError: when the file is damaged.
        """
        found = self._places[window.file]
        columns = sorted({place.column for several in found.values() for place in several})
        for numbers, table in row_files.read(window.file, window.numbers, columns, rows):
            originals: dict[int, Any] = {}
            if self._originals:
                numbered = [window.first_row + number for number in numbers]
                originals = self._originals.read(numbered, lambda file: self._places[file]["original"][0])
            yield [
                self._row(values, found, number, window.first_row + number, originals)
                for number, values in zip(numbers, cells.rows(table), strict=True)
            ]

    def _found(self, file: Path, schema: pa.Schema) -> dict[str, list[Place]]:
        """Return where the columns are that a file has; reasoning may be in several."""
        found: dict[str, list[Place]] = {}
        for name in COLUMNS:
            given = self._given.get(name, name)
            if given is None or (name in OPTIONAL and name not in self._given and name not in schema.names):
                continue
            found[name] = []
            # One of several columns of reasoning is plain text.
            for one, kind_of in [(given, name)] if isinstance(given, str) else [(one, "instruction") for one in given]:
                place = places.find(file, schema, one, name, _REMEDY)
                if not _fits(kind_of, place.kind):
                    remedy = f"{_IMAGE}; {_REMEDY}" if name in ("original", "edited") else _REMEDY
                    raise EarlError(f"{file}: column {one!r} has type {place.kind}, which cannot be {name}; {remedy}")
                found[name].append(place)
        return found

    def _row(
        self, values: dict[str, Any], where: dict[str, list[Place]], row: int, number: int, originals: dict[int, Any]
    ) -> RawRow:
        found = {
            name: several[0].value(values) if isinstance(self.places[name], str) else _texts(several, values)
            for name, several in where.items()
        }
        if self._originals:
            found["original"] = originals.get(number)
        found |= {name: _bytes(found[name]) for name in ("original", "edited") if name in found}
        unreadable = {name: problem for name, value in found.items() if (problem := cells.first_unreadable(value))}
        found |= dict.fromkeys(unreadable)
        problem = next(((name, problem.reason) for name, problem in unreadable.items()), None)
        if self._originals and (missing := self._originals.problem(number)):
            problem = ("original", missing)
        task, example_id = found.get("task", self._task), found.get("example_id")
        instruction = found["instruction"]
        return RawRow(
            row=row,
            example_id=str(number if example_id is None else example_id),
            task=None if task is None else str(task),
            instruction=instruction and instruction.removeprefix(self._prefix),
            reasoning=found.get("reasoning"),
            original=found["original"],
            edited=found.get("edited"),
            has_edited="edited" in found,
            problem=problem,
        )


def _ways(found: dict[str, list[Place]]) -> dict[str, list[places.Steps]]:
    return {name: [place.steps for place in several] for name, several in found.items()}


def _fits(name: str, kind: pa.DataType) -> bool:
    # Categories of pandas.
    if pa.types.is_dictionary(kind):
        return _fits(name, kind.value_type)
    # A column in which every value is missing has no type of its own.
    text = any(is_type(kind) for is_type in (*_TEXT, pa.types.is_null))
    binary = any(is_type(kind) for is_type in _BINARY)
    match name:
        case "original" | "edited":
            return binary or (pa.types.is_struct(kind) and _fits(name, _field_type(kind, "bytes")))
        case "example_id" | "task":
            return text or pa.types.is_integer(kind) or isinstance(kind, pa.UuidType)
        case "reasoning":
            # A struct may have a field twice, a text cannot have two values.
            struct = pa.types.is_struct(kind) and len({field.name for field in kind}) == kind.num_fields
            return (
                text
                or isinstance(kind, pa.JsonType)
                or (struct and all(_fits("instruction", field.type) for field in kind))
            )
    return text


def _field_type(kind: pa.StructType, name: str) -> pa.DataType:
    return kind.field(name).type if kind.get_field_index(name) >= 0 else pa.null()


def _texts(places: list[Place], values: dict[str, Any]) -> dict[str, Any]:
    texts = {place.last_name: place.value(values) for place in places}
    # As the reference's tokenising does: blank texts are no part of it.
    return {name: text for name, text in texts.items() if isinstance(text, cells.Unreadable) or has_words(text or "")}


def _bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value
