"""Raw image pairs in Parquet files of any columns, as rows of one form.

A mapping says where each of our columns stands: ``edited_prompt_list[0]`` is the first item of a list, ``a.b`` a field
of a struct, or a column or field whose whole name this is. Rows are counted through all files, in windows that never
cross a file, so that a reader can begin anywhere.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from earl.data import cells
from earl.data.example import has_words, is_unicode
from earl.data.pictures import Rejected
from earl.errors import EarlError
from earl.files import listing, manifest, remedies, tables

COLUMNS = tuple(tables.RAW.names)
OPTIONAL = ("example_id", "task", "reasoning")
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_ITEM = re.compile(r"\[(\d+)\]")
_REMEDY = "say in raw_datasets.<name>.columns where it stands, or null where there is none"

Steps = tuple[str | int, ...]
"""The way to a value: the name of a column, then names of fields and indices of items."""


@dataclass(frozen=True)
class Window:
    """Consecutive rows of one file."""

    file: Path
    start: int
    rows: int
    row: int
    """Number of the first row through all files."""


@dataclass(frozen=True)
class RawRow:
    """One pair as it stands in the file; images are encoded, None where the file has no bytes."""

    example_id: str
    task: str | None
    instruction: str | None
    reasoning: str | dict | None
    original: bytes | None
    edited: bytes | None
    has_edited: bool = True
    """Whether the data set has edited images at all; one that has not can only be prompted with."""
    unreadable: tuple[str, str] | None = None
    """Our column that could not be read, and why; its value is None then."""

    def checked_instruction(self) -> str:
        """Return the instruction.

        Raises:
            Rejected: when there is none.
        """
        if not self.instruction or not has_words(self.instruction):
            raise Rejected("no instruction")
        return self.instruction

    def reasoning_pairs(self) -> list[tuple[str, str]] | None:
        """Return the (key, text) pairs of a JSON object or a struct.

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
        return pairs


class RawSource:
    """The files of a raw data set. Opening it reads their footers alone and checks their columns."""

    def __init__(self, path: Path | str, columns: Mapping[str, str | None] | None = None) -> None:
        """Check the files.

        Args:
            path: A Parquet file, a folder of them, or a pattern such as ``data/train-*.parquet``.
            columns: Places of our columns; null for one that is not there. A column that is not named has its own
                name, and of those only `OPTIONAL` ones may be missing.

        Raises:
            EarlError: naming file and column, when there is no file, one is damaged, or a column is missing or of a
                type that cannot be what it should be.
        """
        self.path = Path(path)
        self.files = listing.parquet_files(path)
        self._given = dict(columns or {})
        self._rows: list[int] = []
        self._class_names: dict[Path, dict[str, list[str]]] = {}
        self.places: dict[str, str] = {}
        self._steps: dict[str, Steps] = {}
        for index, file in enumerate(self.files):
            with tables.open_table(file, remedies.GIVEN) as source:
                steps = self._found(file, source.schema_arrow)
                self._rows.append(source.metadata.num_rows)
            if index and steps != self._steps:
                raise EarlError(f"{file}: has other columns than {self.files[0]}; keep them in different data sets")
            self._steps = steps
        self.places = {name: self._given.get(name, name) for name in self._steps}
        if not sum(self._rows):
            raise EarlError(f"{path}: the data set is empty; give a file with at least one row")

    def __len__(self) -> int:
        return sum(self._rows)

    @cached_property
    def footers_digest(self) -> str:
        """SHA-256 over the files' names, sizes and footers, where sizes and extremes of all columns stand.

        Not over their content: published data sets have terabytes.
        """
        found = [(file.name, file.stat().st_size, manifest.digest_footer(file)) for file in self.files]
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
        cut, row = [], 0
        for file, count in zip(self.files, self._rows, strict=True):
            for start in range(0, count, rows):
                cut.append(Window(file, start, min(rows, count - start), row + start))
            row += count
        return cut

    def read(self, window: Window, rows: int) -> Iterator[list[RawRow]]:
        """Yield the rows of a window in lists of at most so many.

        Raises:
            EarlError: when the file is damaged.
        """
        number = window.row
        for table in _tables(window, sorted({column for column, *_ in self._steps.values()}), rows):
            names = self._class_names[window.file]
            part = [self._row(values, number + offset, names) for offset, values in enumerate(cells.rows(table))]
            number += len(part)
            yield part

    def _found(self, file: Path, schema: pa.Schema) -> dict[str, Steps]:
        """Return the ways to the columns that a file has."""
        found = {}
        self._class_names[file] = {}
        for name in COLUMNS:
            place = self._given.get(name, name)
            if place is None or (name in OPTIONAL and name not in self._given and name not in schema.names):
                continue
            way = _way(pa.struct(list(schema)), place)
            if way is None:
                has = ", ".join(schema.names)
                raise EarlError(f"{file}: column {place!r} ({name}) is missing; the file has {has}; {_REMEDY}")
            found[name], kind = way
            column, *inside = found[name]
            if schema.names.count(column) > 1:
                raise EarlError(f"{file}: column {column!r} stands twice in the file; rename or remove one of them")
            class_names = cells.class_names(schema, column, inside)
            if class_names and pa.types.is_integer(kind):
                self._class_names[file][name] = class_names
                kind = pa.string()
            if not _fits(name, kind):
                raise EarlError(f"{file}: column {place!r} has type {kind}, which cannot be {name}; {_REMEDY}")
        return found

    def _row(self, values: dict[str, Any], number: int, class_names: Mapping[str, list[str]]) -> RawRow:
        found = {name: _value_at(values, steps) for name, steps in self._steps.items()}
        found |= {name: _bytes(found[name]) for name in ("original", "edited") if name in found}
        found |= {name: cells.named(found[name], names) for name, names in class_names.items()}
        unreadable = {name: problem for name, value in found.items() if (problem := cells.first_unreadable(value))}
        found |= dict.fromkeys(unreadable)
        task, example_id = found.get("task"), found.get("example_id")
        return RawRow(
            example_id=str(number if example_id is None else example_id),
            task=None if task is None else str(task),
            instruction=found["instruction"],
            reasoning=found.get("reasoning"),
            original=found["original"],
            edited=found.get("edited"),
            has_edited="edited" in found,
            unreadable=next(((name, problem.reason) for name, problem in unreadable.items()), None),
        )


def _tables(window: Window, columns: list[str], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of a window as tables of ``rows`` rows, the last one of what is left."""
    with tables.open_table(window.file, remedies.GIVEN) as source:
        groups, skip = _groups_from(source, window.start)
        held, left = [], window.rows
        try:
            for batch in source.iter_batches(rows, row_groups=groups, columns=columns):
                if skip >= len(batch):
                    skip -= len(batch)
                    continue
                held.append(batch.slice(skip))
                skip = 0
                while left and sum(map(len, held)) >= min(rows, left):
                    table = pa.Table.from_batches(held)
                    part = table.slice(0, min(rows, left))
                    yield part
                    left -= len(part)
                    held = table.slice(len(part)).to_batches()
                if not left:
                    return
        except (pa.ArrowInvalid, OSError) as error:
            raise EarlError(
                f"{window.file}: is damaged after row {window.start + window.rows - left} ({error}); download it again"
            ) from error


def _groups_from(source: pq.ParquetFile, row: int) -> tuple[list[int], int]:
    """Return the row groups from the one on that holds a row, and how many rows in it come before."""
    for index in range(source.num_row_groups):
        rows = source.metadata.row_group(index).num_rows
        if row < rows:
            return list(range(index, source.num_row_groups)), row
        row -= rows
    return [], 0


def _way(kind: pa.DataType, place: str) -> tuple[Steps, pa.DataType] | None:
    """Return the way to a place in a struct, and the type there; None where there is no such place.

    A name may hold dots and brackets itself: of the names that the place begins with, the longest that leads on counts.
    """
    for field in sorted(kind, key=lambda field: len(field.name), reverse=True):
        if not place.startswith(field.name):
            continue
        steps, inner, rest = [field.name], field.type, place.removeprefix(field.name)
        while (item := _ITEM.match(rest)) and _is_list(inner):
            steps, inner, rest = [*steps, int(item[1])], inner.value_type, rest[item.end() :]
        if not rest:
            return tuple(steps), inner
        if rest.startswith(".") and pa.types.is_struct(inner) and (way := _way(inner, rest[1:])):
            return (*steps, *way[0]), way[1]
    return None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


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


def _value_at(values: dict[str, Any], steps: Steps) -> Any:
    value: Any = values
    for step in steps:
        if value is None or isinstance(value, cells.Unreadable):
            return value
        if isinstance(step, int) and step >= len(value):
            return None
        value = value[step]
    return value


def _bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value
