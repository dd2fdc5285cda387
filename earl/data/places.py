"""Places in a row: a column, then names of fields and indices of items, as ``prompts[0]`` or ``edit.text``.

A name may hold dots and brackets itself: of the names that a place begins with, the longest that leads on counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from earl.data import cells
from earl.messages.errors import EarlError

_ITEM = re.compile(r"\[(\d+)\]")

Steps = tuple[str | int, ...]
"""The way to a value: the name of a column, then names of fields and indices of items."""


@dataclass(frozen=True)
class Place:
    """Where a value stands in the rows of one file."""

    steps: Steps
    kind: pa.DataType
    """Type of the value; text where there are class names."""
    class_names: tuple[str, ...] | None = None
    """Of a `ClassLabel` of Hugging Face's `datasets`: the value is the name of the class."""

    @property
    def column(self) -> str:
        return str(self.steps[0])

    @property
    def last_name(self) -> str:
        """The last name: `text` of ``edits[0].text``."""
        return [step for step in self.steps if isinstance(step, str)][-1]

    def value(self, row: Mapping[str, Any]) -> Any:
        """Return what stands here, None where a list is too short or something on the way is null.

        It is `earl.data.cells.Unreadable` where it, or something on the way, cannot be read.
        """
        value: Any = row
        for step in self.steps:
            if value is None or isinstance(value, cells.Unreadable):
                return value
            if isinstance(step, int) and step >= len(value):
                return None
            value = value[step]
        return value if self.class_names is None else cells.named(value, self.class_names)


def find(file: Path, schema: pa.Schema, place: str, name: str, remedy: str) -> Place:
    """Return where a place is in a file.

    Args:
        file: For messages.
        schema: That of the file.
        place: The place.
        name: What it is for.
        remedy: What helps where it is missing.

    Raises:
        EarlError: when there is no such place, or its column stands twice in the file.
    """
    way = _way(pa.struct(list(schema)), place)
    if way is None:
        has = ", ".join(schema.names)
        raise EarlError(f"{file}: column {place!r} ({name}) is missing; the file has {has}; {remedy}")
    steps, kind = way
    column, *inside = steps
    if schema.names.count(str(column)) > 1:
        raise EarlError(f"{file}: column {column!r} stands twice in the file; rename or remove one of them")
    class_names = cells.class_names(schema, str(column), inside) if pa.types.is_integer(kind) else None
    return Place(steps, pa.string(), tuple(class_names)) if class_names else Place(steps, kind)


def _way(kind: pa.DataType, place: str) -> tuple[Steps, pa.DataType] | None:
    """Return the way to a place in a struct, and the type there; None where there is no such place."""
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
