"""Images whose order is known, to check a judge on: from the shapes world, or from a Parquet file of anyone's.

In the shapes world the truth is known, so that for every example::

    target > partial edit > copy of the source > noise

A partial edit carries out half of what changes: every other cell that does, or, where it is one alone, half the way.
"""

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from earl.data import cells
from earl.data.example import has_words
from earl.files import images, remedies, tables
from earl.judges import Judgement
from earl.messages.errors import EarlError
from earl.shapes import world
from earl.statistics import seeds

_AT_LEAST = "give at least two of one example, with different ranks"


@dataclass(frozen=True)
class Ranked:
    """One image to judge and where it stands among those of its example."""

    example_id: str
    rank: float
    """Higher is better; images of one example with equal ranks are not compared."""
    label: str
    """What the image is, for the report: "target", "noise"."""
    judgement: Judgement


def of_shapes(examples: int, seed: int) -> list[Ranked]:
    """Return four images for each of so many edits of the shapes world."""
    return [ranked for index in range(examples) for ranked in _example(seed, index)]


def _example(seed: int, index: int) -> Iterator[Ranked]:
    edit = world.edit(seed, index)
    original, target = world.render(edit.original), world.render(edit.edited)
    noise = seeds.generator("noise", seed, index).integers(0, 256, original.shape, dtype=np.uint8)
    candidates = {"target": target, "partial edit": _half(original, target), "copy": original, "noise": noise}
    for rank, (label, edited) in enumerate(reversed(candidates.items())):
        judgement = Judgement(edit.instruction, original, edited, target, edit.task)
        yield Ranked(f"{seed}-{index}", float(rank), label, judgement)


def _half(original: np.ndarray, target: np.ndarray) -> np.ndarray:
    half = original.copy()
    changed = [cell for cell in range(world.GRID**2) if (_cell(original, cell) != _cell(target, cell)).any()]
    for cell in changed[::2]:
        _cell(half, cell)[:] = _cell(target, cell)
    if len(changed) == 1:
        middle = (original.astype(np.float32) + target) / 2
        half = middle.round().astype(np.uint8)
    return half


def _cell(image: np.ndarray, cell: int) -> np.ndarray:
    left, top, right, bottom = world.box(cell)
    return image[top:bottom, left:right]


def read(path: Path, examples: int | None = None) -> list[Ranked]:
    """Read images with ranks, schema `earl.files.tables.RANKED`, in any types that hold its values.

    Ids and labels may be numbers or classes, ranks whole, images bytes alone; label and target may be missing.

    Args:
        path: The Parquet file.
        examples: Take the first so many examples; None takes all.

    Raises:
        EarlError: naming file, row and column, when a column is missing or damaged, a value cannot be what it should
            be, an image does not decode, or there is nothing to compare.
    """
    rows = _rows(path)
    chosen = set(list(dict.fromkeys(row["example_id"] for row in rows))[:examples])
    kept = [(index, row) for index, row in enumerate(rows) if row["example_id"] in chosen]
    if not kept:
        raise EarlError(f"{path}: holds no image; {_AT_LEAST}")
    decode = images.Decoder()
    ranked = [_ranked(row, f"{path}: row {index}", decode) for index, row in kept]
    if len({(one.example_id, one.rank) for one in ranked}) == len(chosen):
        raise EarlError(f"{path}: has nothing to compare in {len(chosen)} examples; {_AT_LEAST}")
    return ranked


def _rows(path: Path) -> list[dict[str, Any]]:
    with tables.open_table(path, remedies.GIVEN) as source:
        schema = source.schema_arrow
        for field in tables.RANKED:
            if schema.names.count(field.name) > 1:
                raise EarlError(f"{path}: column {field.name!r} stands twice in the file; rename or remove one of them")
            if not field.nullable and field.name not in schema.names:
                there = ", ".join(schema.names)
                raise EarlError(f"{path}: column {field.name!r} is missing; the file has {there}. Add it")
        try:
            table = source.read(columns=[name for name in tables.RANKED.names if name in schema.names])
        except (pa.ArrowInvalid, OSError) as error:
            raise EarlError(f"{path}: is damaged ({error}); {remedies.GIVEN.damaged}") from error
    rows = cells.rows(table)
    for column in ("example_id", "label"):
        names = cells.class_names(schema, column, ())
        for row in rows if names else ():
            row[column] = cells.named(row[column], names)
    for index, row in enumerate(rows):
        row["example_id"] = _text(row["example_id"], f"{path}: row {index}, column 'example_id'")
    return rows


def _ranked(row: dict[str, Any], where: str, decode: images.Decoder) -> Ranked:
    def at(column: str) -> str:
        return f"{where}, column {column!r}"

    def pixels(column: str) -> np.ndarray | None:
        value = row.get(column)
        if value is None and tables.RANKED.field(column).nullable:
            return None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes | None):
            raise EarlError(f"{at(column)}: is a {type(data).__name__}; give the bytes of an image")
        return decode(data, at(column))

    instruction, rank, label = _text(row["instruction"], at("instruction")), row["rank"], row.get("label")
    if not has_words(instruction):
        raise EarlError(f"{at('instruction')}: is empty; a judge needs to know what was asked for")
    if not isinstance(rank, int | float) or isinstance(rank, bool) or not math.isfinite(rank):
        raise EarlError(f"{at('rank')}: is {rank!r}; give a number, higher for a better edit")
    label = f"rank {rank:g}" if label is None else _text(label, at("label")) or f"rank {rank:g}"
    judgement = Judgement(instruction, pixels("original"), pixels("edited"), pixels("target"))
    return Ranked(row["example_id"], float(rank), label, judgement)


def _text(value: Any, where: str) -> str:
    """Return a text, or a number or id as one."""
    if isinstance(value, cells.Unreadable):
        raise EarlError(f"{where}: {value.reason}; mend or remove the row")
    if not isinstance(value, str | int | uuid.UUID):
        raise EarlError(f"{where}: is {value!r}; give a text")
    return str(value)


def write(path: Path, ranked: list[Ranked]) -> None:
    """Write images with ranks as a Parquet file that `read` takes: an example of the form."""
    columns = {
        "example_id": [one.example_id for one in ranked],
        "rank": [one.rank for one in ranked],
        "label": [one.label for one in ranked],
        "instruction": [one.judgement.instruction for one in ranked],
        **{
            name: [_struct(getattr(one.judgement, name)) for one in ranked] for name in ("original", "target", "edited")
        },
    }
    tables.write_table(path, tables.RANKED, columns, {})


def _struct(pixels: np.ndarray | None) -> dict | None:
    return None if pixels is None else images.struct(images.encode(pixels))
