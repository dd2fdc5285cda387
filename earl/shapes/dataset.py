"""Raw pairs of the shapes world, written as a real image-editing dataset would come: pictures, words and boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from earl.files import images, tables
from earl.messages.errors import EarlError
from earl.shapes import world
from earl.statistics import seeds


def write_raw(
    path: Path | str,
    count: int,
    seed: int,
    tasks: Sequence[str] = world.TASKS,
    unchanged_fraction: float = 0.0,
    damaged_fraction: float = 0.0,
) -> None:
    """Write `count` editing pairs as Parquet (schema `earl.files.tables.RAW`).

    Row i is `world.edit(seed, i, tasks)`: tasks alternate in the given order, and a task named twice gets twice the
    share. With the given probabilities its edited image is the original, or has another object damaged; which rows
    these are does not depend on the number of rows, and a larger fraction adds rows to those of a smaller one.
    `reasoning` is the JSON text of a dict of str whose boxes are [x1, y1, x2, y2] in pixels.

    Raises:
        EarlError: for a task that does not exist or a count below 1.
    """
    for task in tasks:
        if task not in world.TASKS:
            raise EarlError(f"tasks: there is no task {task!r} in the shapes world; it has {', '.join(world.TASKS)}")
    if count < 1 or not tasks:
        raise EarlError(f"count is {count} and tasks has {len(tasks)} names; a dataset needs at least one of each")
    columns: dict[str, list] = {name: [] for name in tables.RAW.names}
    for index in range(count):
        edit = _with_mistakes(world.edit(seed, index, tasks), seed, index, unchanged_fraction, damaged_fraction)
        example_id = f"{seed}-{index:06d}"
        columns["example_id"].append(example_id)
        columns["task"].append(edit.task)
        columns["instruction"].append(edit.instruction)
        columns["reasoning"].append(json.dumps(edit.reasoning))
        for column, scene in (("original", edit.original), ("edited", edit.edited)):
            picture = images.encode(world.render(scene))
            columns[column].append(images.struct(picture, f"{example_id}-{column}.png"))
    metadata = {"source": "shapes", "seed": str(seed), "tasks": ",".join(tasks)}
    mistakes = {"unchanged_fraction": unchanged_fraction, "damaged_fraction": damaged_fraction}
    metadata |= {name: str(fraction) for name, fraction in mistakes.items() if fraction}
    tables.write_table(path, tables.RAW, columns, metadata)


def _with_mistakes(edit: world.Edit, seed: int, index: int, unchanged: float, damaged: float) -> world.Edit:
    rng = seeds.generator("shapes mistakes", seed, index)
    draw = rng.random()
    if draw < unchanged:
        return world.unchanged(edit)
    # From the other end, so that neither fraction changes the rows of the other.
    return world.damaged(rng, edit) if draw >= 1 - damaged else edit
