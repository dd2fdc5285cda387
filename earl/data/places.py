"""Places in a row: a column, then names of fields and numbers of items, as ``prompts[0]`` or ``edit.text``."""

import re
from typing import Any

import pyarrow as pa

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


def column(place: str) -> str:
    """Return the column that a place begins with."""
    return re.split(r"[.\[]", place, maxsplit=1)[0]


def last_name(place: str) -> str:
    """Return the last name in a place: `text` of `edits[0].text`."""
    return [column(place), *(step for step in _steps(place) if isinstance(step, str))][-1]


def type_at(schema: pa.Schema, place: str) -> pa.DataType | None:
    """Return the type of what stands at a place, None where the schema has no such place."""
    if column(place) not in schema.names:
        return None
    kind = schema.field(column(place)).type
    for step in _steps(place):
        if isinstance(step, int):
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
                return None
            kind = kind.value_type
        else:
            if not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
                return None
            kind = kind.field(step).type
    return kind


def value_at(values: dict[str, Any], place: str) -> Any:
    """Return what stands at a place of a row, None where a list is too short or something on the way is null."""
    value = values[column(place)]
    for step in _steps(place):
        if value is None or (isinstance(step, int) and step >= len(value)):
            return None
        value = value[step]
    return value


def _steps(place: str) -> list[str | int]:
    return [name or int(number) for name, number in _STEP.findall(place[len(column(place)) :])]
