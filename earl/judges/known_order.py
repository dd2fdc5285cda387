"""Images whose order is known, to check a judge on: from the shapes world, or from a Parquet file of anyone's.

In the shapes world the truth is known, so that for every example::

    target > partial edit > copy of the source > noise

A partial edit carries out half of what changes: every other cell that does, or, where it is one alone, half the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earl import seeds
from earl.errors import EarlError
from earl.files import images, remedies, tables
from earl.judges import Judgement
from earl.shapes import world


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
    """Read images with ranks, schema `earl.files.tables.RANKED`.

    Args:
        examples: Take the first so many examples; None takes all.

    Raises:
        EarlError: naming file and column, as `earl.files.tables.read_table`; or when there is nothing to compare.
    """
    rows = tables.read_table(path, tables.RANKED, remedies=remedies.GIVEN).to_pylist()
    chosen = list(dict.fromkeys(row["example_id"] for row in rows))[:examples]
    kept = [(index, row) for index, row in enumerate(rows) if row["example_id"] in set(chosen)]
    if not kept:
        raise EarlError(f"{path}: holds no image; give at least two of one example, with different ranks")
    return [_ranked(row, f"{path}: row {index}") for index, row in kept]


def _ranked(row: dict, where: str) -> Ranked:
    def pixels(column: str) -> np.ndarray | None:
        return None if row[column] is None else images.decode(row[column]["bytes"], f"{where}, column {column!r}")

    judgement = Judgement(row["instruction"], pixels("original"), pixels("edited"), pixels("target"))
    return Ranked(row["example_id"], row["rank"], row["label"] or f"rank {row['rank']:g}", judgement)


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
