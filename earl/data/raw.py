"""Raw image pairs in Parquet or Arrow files of any columns, as rows of one form.

A mapping says where each of our columns stands: ``edited_prompt_list[0]`` is the first item of a list, ``a.b`` a field
of a struct (`earl.data.places`). Which rows are taken, a selection says (`earl.data.selection`). They are numbered
through all files, in windows that never cross a file, so that a reader can begin anywhere.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from earl.data import row_files, selection
from earl.data.example import is_unicode
from earl.data.pictures import Rejected
from earl.data.places import column, last_name, type_at, value_at
from earl.data.selection import Selection
from earl.errors import EarlError
from earl.files import listing, tables

COLUMNS = tuple(tables.RAW.names)
OPTIONAL = ("example_id", "task", "reasoning")
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


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
    problem: str | None = None
    """Why the row has no original image."""

    def checked_instruction(self) -> str:
        """Return the instruction.

        Raises:
            Rejected: when there is none.
        """
        if not self.instruction or not self.instruction.strip():
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
        self.places: dict[str, str | list[str]] = {}
        for index, file in enumerate(self.files):
            with row_files.open_file(file) as source:
                places = self._found(file, source.schema)
                self._chosen.check(file, source)
                self._counts.append(sum(source.group_rows))
            if index and places != self.places:
                raise EarlError(f"{file}: has other columns than {self.files[0]}; keep them in different data sets")
            self.places = places
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
        places = [place for given in self.places.values() for place in ([given] if isinstance(given, str) else given)]
        for numbers, table in row_files.read(window.file, window.numbers, sorted(set(map(column, places))), rows):
            originals: dict[int, Any] = {}
            if self._originals:
                numbered = [window.first_row + number for number in numbers]
                originals = self._originals.read(numbered, self.places["original"])
            yield [
                self._row(values, number, window.first_row + number, originals)
                for number, values in zip(numbers, table.to_pylist(), strict=True)
            ]

    def _found(self, file: Path, schema: pa.Schema) -> dict[str, str | list[str]]:
        """Return the places of the columns that a file has."""
        places: dict[str, str | list[str]] = {}
        for name in COLUMNS:
            place = self._given.get(name, name)
            if place is None or (name in OPTIONAL and name not in self._given and name not in schema.names):
                continue
            # One of several columns of reasoning is plain text.
            for one, kind_of in [(place, name)] if isinstance(place, str) else [(one, "instruction") for one in place]:
                kind = type_at(schema, one)
                if kind is None:
                    there = ", ".join(schema.names)
                    raise EarlError(f"{file}: column {one!r} ({name}) is missing; the file has {there}")
                if not _fits(kind_of, kind):
                    raise EarlError(f"{file}: column {one!r} has type {kind}, which cannot be {name}")
            places[name] = place
        return places

    def _row(self, values: dict[str, Any], row: int, number: int, originals: dict[int, Any]) -> RawRow:
        found = {name: _found_at(values, place) for name, place in self.places.items()}
        if self._originals:
            found["original"] = originals.get(number)
        task, example_id = found.get("task", self._task), found.get("example_id")
        instruction = found["instruction"]
        return RawRow(
            row=row,
            problem=self._originals.problem(number) if self._originals else None,
            example_id=str(number if example_id is None else example_id),
            task=None if task is None else str(task),
            instruction=instruction and instruction.removeprefix(self._prefix),
            reasoning=found.get("reasoning"),
            original=_bytes(found["original"]),
            edited=_bytes(found.get("edited")),
            has_edited="edited" in found,
        )


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
            return text or pa.types.is_integer(kind)
        case "reasoning":
            return text or (pa.types.is_struct(kind) and all(_fits("instruction", field.type) for field in kind))
    return text


def _field_type(kind: pa.StructType, name: str) -> pa.DataType:
    return kind.field(name).type if kind.get_field_index(name) >= 0 else pa.null()


def _found_at(values: dict[str, Any], place: str | list[str]) -> Any:
    if isinstance(place, str):
        return value_at(values, place)
    texts = {last_name(one): value_at(values, one) for one in place}
    # As the reference's tokenising does: blank texts are no part of it.
    return {name: text for name, text in texts.items() if text and text.strip()}


def _bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value
