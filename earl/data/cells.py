"""Cells of raw tables as Python values. A cell that cannot be read rejects its row, not the file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a value that cannot be read."""

    reason: str
    """A few fixed words, then after a colon what was found."""


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table. Text that is not UTF-8 becomes `Unreadable`, inside lists and structs too."""
    try:
        return table.to_pylist()
    except ValueError:
        columns = [[_value(cell) for cell in column] for column in table.columns]
        return [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except ValueError as error:
        if isinstance(cell, pa.StructScalar):
            return {field.name: _value(cell[index]) for index, field in enumerate(cell.type)}
        if isinstance(cell, pa.ListScalar):
            return [_value(item) for item in cell.values]
        what = "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else "value cannot be read"
        return Unreadable(f"{what}: {error}")


def first_unreadable(value: Any) -> Unreadable | None:
    """Return the first unreadable value in a value, which may be a list or a struct."""
    if isinstance(value, Unreadable):
        return value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(first_unreadable, inside)), None)


def class_names(schema: pa.Schema, column: str, steps: Sequence[str | int]) -> list[str] | None:
    """Return the class names of a Hugging Face `ClassLabel` column, or None for another column.

    ``datasets`` writes them into the metadata of the schema.

    Args:
        schema: Of the file.
        column: Name of the column.
        steps: Names of fields and indices of items that lead to the class inside the column.
    """
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        for step in steps:
            feature = _inside(feature, step)
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _inside(feature: Any, step: str | int) -> Any:
    if isinstance(feature, list):
        return feature[0]
    if "feature" in feature and "_type" in feature:
        inner = feature["feature"]
        # A sequence of structs is a struct of lists in files of older releases.
        return inner if isinstance(step, int) else feature | {"feature": inner[step]}
    return feature[step]


def named(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class for its index; -1 means no class."""
    if not isinstance(value, int) or value == -1:
        return None if isinstance(value, int) else value
    return names[value] if 0 <= value < len(names) else Unreadable(f"no such class: {value} of {len(names)}")
