"""The shapes world: small scenes of coloured shapes, and edits of them, as pure functions of (seed, index).

A scene is a 4x4 grid of cells of 16 pixels over one background colour; each cell is empty or holds one shape. No two
objects of a scene look alike, so that "the red circle" names exactly one of them (the count task is the exception: it
makes several at once). Two things are made easy on purpose, so that a policy learns in minutes on a laptop:

* circle, square and triangle cover different areas, since a coarse image tokenizer mixes up shapes of equal area;
* every instruction is twelve words and signs long. A visual token of the original then stands equally far from its
  place in the edited image in every example, and one attention head can copy it. With instructions of several
  lengths a small policy spends most of its training on finding that place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from earl.statistics import seeds

GRID = 4
"""Cells along one side of a scene."""
CELL = 16
"""Pixels along one side of a cell."""
SIZE = GRID * CELL
"""Pixels along one side of an image."""

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (42, 82, 224),
    "yellow": (244, 208, 45),
    "purple": (148, 60, 184),
    "cyan": (62, 200, 214),
}
BACKGROUNDS = {
    "white": (250, 250, 248),
    "grey": (132, 132, 134),
    "black": (22, 22, 26),
    "pink": (250, 190, 202),
}
SHAPES = ("circle", "square", "triangle")
ORDINALS = ("one", "two", "three", "four")

SIMPLE_TASKS = ("recolour", "remove", "add", "background")
COMPLEX_TASKS = ("move", "swap", "count")
TASKS = SIMPLE_TASKS + COMPLEX_TASKS

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
EMPTY = 0
KINDS = len(COLOURS) * len(SHAPES)
"""Objects are numbered 1 .. KINDS; 0 is an empty cell."""

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """A background (index into BACKGROUND_NAMES) and the 16 cells in reading order (0 = empty, else an object)."""

    background: int
    cells: tuple[int, ...]

    def occupied(self) -> list[int]:
        """Indices of the cells that hold an object."""
        return [cell for cell, kind in enumerate(self.cells) if kind != EMPTY]

    def empty(self) -> list[int]:
        """Indices of the cells that hold none."""
        return [cell for cell, kind in enumerate(self.cells) if kind == EMPTY]

    def with_cells(self, changes: dict[int, int]) -> Scene:
        """The same scene with some cells replaced."""
        return Scene(self.background, tuple(changes.get(cell, kind) for cell, kind in enumerate(self.cells)))


@dataclass(frozen=True)
class Edit:
    """One editing example. Boxes in `reasoning` are [x1, y1, x2, y2] in pixels, the far edges exclusive."""

    task: str
    instruction: str
    reasoning: dict[str, str]
    original: Scene
    edited: Scene


class _Retry(Exception):
    """The drawn scene does not allow the drawn edit; draw again."""


def kind_of(colour: int, shape: int) -> int:
    """The number of the object with this colour and shape (indices into COLOUR_NAMES and SHAPES)."""
    return 1 + shape * len(COLOURS) + colour


def colour_and_shape(kind: int) -> tuple[int, int]:
    """Inverse of `kind_of`."""
    shape, colour = divmod(kind - 1, len(COLOURS))
    return colour, shape


def name(kind: int) -> str:
    """An object in words: "red circle"."""
    colour, shape = colour_and_shape(kind)
    return f"{COLOUR_NAMES[colour]} {SHAPES[shape]}"


def box(cell: int) -> list[int]:
    """The pixels of a cell as [x1, y1, x2, y2]."""
    row, column = divmod(cell, GRID)
    return [column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL]


def draw_scene(rng: np.random.Generator, low: int = 2, high: int = 4) -> Scene:
    """A scene of `low` to `high` objects (both included), all different, in different cells."""
    count = int(rng.integers(low, high + 1))
    cells = [EMPTY] * (GRID * GRID)
    places = rng.permutation(GRID * GRID)[:count]
    kinds = 1 + rng.permutation(KINDS)[:count]
    for place, kind in zip(places, kinds, strict=True):
        cells[place] = int(kind)
    return Scene(int(rng.integers(len(BACKGROUNDS))), tuple(cells))


def edit(seed: int, index: int, tasks: Sequence[str] = TASKS) -> Edit:
    """Example `index` of the endless sequence `seed`; its task is tasks[index mod len(tasks)].

    A task named twice in `tasks` gets twice the share. The example depends on nothing but the arguments.
    """
    task = tasks[index % len(tasks)]
    return draw_edit(seeds.generator("shapes", seed, index, task), task)


def draw_edit(rng: np.random.Generator, task: str, low: int = 2, high: int = 4) -> Edit:
    """An edit of the given task on a scene of `low` to `high` objects. KeyError for an unknown task."""
    build = _BUILDERS[task]
    while True:
        scene = draw_scene(rng, low, high)
        try:
            instruction, step, edited = build(rng, scene)
        except _Retry:
            continue
        return Edit(task, instruction, {"scene": _describe(scene), "edit": step}, scene, edited)


def unchanged(edit: Edit) -> Edit:
    """The example with the original as its edited image: the edit was not made."""
    return replace(edit, edited=edit.original)


def damaged(rng: np.random.Generator, edit: Edit) -> Edit:
    """The example with a mistake beside the right edit: an object that it leaves alone is removed or replaced.

    Where the edit leaves no object alone, it is as it was.
    """
    pairs = enumerate(zip(edit.original.cells, edit.edited.cells, strict=True))
    alone = [cell for cell, (before, after) in pairs if before == after != EMPTY]
    if not alone:
        return edit
    cell = _choose(rng, alone)
    kind = _choose(rng, [EMPTY, _choose(rng, _absent(edit.edited))])
    return replace(edit, edited=edit.edited.with_cells({cell: kind}))


def _describe(scene: Scene) -> str:
    objects = ", ".join(f"{name(scene.cells[cell])} {box(cell)}" for cell in scene.occupied())
    return f"{objects} on {BACKGROUND_NAMES[scene.background]}"


def _choose(rng: np.random.Generator, options: Sequence[int]) -> int:
    if not options:
        raise _Retry
    return int(options[rng.integers(len(options))])


def _absent(scene: Scene) -> list[int]:
    return [kind for kind in range(1, KINDS + 1) if kind not in scene.cells]


_Built = tuple[str, str, Scene]


def _recolour(rng: np.random.Generator, scene: Scene) -> _Built:
    cell = _choose(rng, scene.occupied())
    old, shape = colour_and_shape(scene.cells[cell])
    new = _choose(rng, [c for c in range(len(COLOURS)) if kind_of(c, shape) in _absent(scene)])
    instruction = f"Change the colour of the {name(scene.cells[cell])} from {COLOUR_NAMES[old]} to {COLOUR_NAMES[new]}."
    step = f"{box(cell)} turns from {COLOUR_NAMES[old]} to {COLOUR_NAMES[new]}"
    return instruction, step, scene.with_cells({cell: kind_of(new, shape)})


def _remove(rng: np.random.Generator, scene: Scene) -> _Built:
    cell = _choose(rng, scene.occupied())
    instruction = f"Remove the {name(scene.cells[cell])}, so that its cell is empty."
    return instruction, f"{box(cell)} becomes empty", scene.with_cells({cell: EMPTY})


def _add(rng: np.random.Generator, scene: Scene) -> _Built:
    cell, kind = _choose(rng, scene.empty()), _choose(rng, _absent(scene))
    row, column = divmod(cell, GRID)
    instruction = f"Add a {name(kind)} in row {ORDINALS[row]} and in column {ORDINALS[column]}."
    return instruction, f"{box(cell)} gets a {name(kind)}", scene.with_cells({cell: kind})


def _background(rng: np.random.Generator, scene: Scene) -> _Built:
    old = BACKGROUND_NAMES[scene.background]
    choice = _choose(rng, [b for b in range(len(BACKGROUNDS)) if b != scene.background])
    new = BACKGROUND_NAMES[choice]
    instruction = f"Change the colour of the whole background from {old} to {new}."
    return instruction, f"{[0, 0, SIZE, SIZE]} turns from {old} to {new}", Scene(choice, scene.cells)


def _move(rng: np.random.Generator, scene: Scene) -> _Built:
    mover, anchor = (scene.occupied()[i] for i in rng.permutation(len(scene.occupied()))[:2])
    side, offset = (("left", -1), ("right", 1))[int(rng.integers(2))]
    column = anchor % GRID + offset
    goal = anchor + offset
    if not 0 <= column < GRID or scene.cells[goal] != EMPTY:
        raise _Retry
    kind = scene.cells[mover]
    instruction = f"Move the {name(kind)} to the {side} of the {name(scene.cells[anchor])}."
    step = f"{name(kind)} goes from {box(mover)} to {box(goal)}"
    return instruction, step, scene.with_cells({mover: EMPTY, goal: kind})


def _swap(rng: np.random.Generator, scene: Scene) -> _Built:
    first, second = (scene.occupied()[i] for i in rng.permutation(len(scene.occupied()))[:2])
    a, b = scene.cells[first], scene.cells[second]
    instruction = f"Let the {name(a)} and the {name(b)} swap their places."
    step = f"{name(a)} goes to {box(second)}, {name(b)} goes to {box(first)}"
    return instruction, step, scene.with_cells({first: b, second: a})


def _count(rng: np.random.Generator, scene: Scene) -> _Built:
    free = [r for r in range(GRID) if not any(scene.cells[r * GRID : (r + 1) * GRID])]
    row, kind, number = _choose(rng, free), _choose(rng, _absent(scene)), int(rng.integers(2, GRID + 1))
    cells = [row * GRID + column for column in range(number)]
    instruction = f"Fill row {ORDINALS[row]} from the left with exactly {ORDINALS[number - 1]} {name(kind)}s."
    step = f"{name(kind)} at " + ", ".join(str(box(cell)) for cell in cells)
    return instruction, step, scene.with_cells(dict.fromkeys(cells, kind))


_BUILDERS: dict[str, Callable[[np.random.Generator, Scene], _Built]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "background": _background,
    "move": _move,
    "swap": _swap,
    "count": _count,
}


def _coverage(shape: str) -> np.ndarray:
    """How much of each pixel of a cell a shape covers: float64 [CELL, CELL] in 0..1, anti-aliased."""
    fine = (np.arange(CELL * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    y, x = np.meshgrid(fine, fine, indexing="ij")
    middle = CELL / 2
    if shape == "circle":
        inside = (y - middle) ** 2 + (x - middle) ** 2 <= 5.2**2
    elif shape == "square":
        inside = (abs(y - middle) <= 6.25) & (abs(x - middle) <= 6.25)
    else:
        inside = (y >= 2.5) & (y <= 13.5) & (abs(x - middle) <= (y - 2.5) * 6 / 11)
    blocks = inside.reshape(CELL, _SUPERSAMPLING, CELL, _SUPERSAMPLING)
    return blocks.mean(axis=(1, 3))


def _cell_images() -> np.ndarray:
    """Every possible cell: uint8 [backgrounds, 1 + KINDS, CELL, CELL, 3]."""
    cells = np.empty((len(BACKGROUNDS), 1 + KINDS, CELL, CELL, 3))
    cells[:] = np.array(list(BACKGROUNDS.values()), float)[:, None, None, None, :]
    for kind in range(1, KINDS + 1):
        colour, shape = colour_and_shape(kind)
        cover = _coverage(SHAPES[shape])[..., None]
        cells[:, kind] = cover * np.array(COLOURS[COLOUR_NAMES[colour]], float) + (1 - cover) * cells[:, kind]
    return np.rint(cells).astype(np.uint8)


CELL_IMAGES = _cell_images()
"""uint8 [backgrounds, 1 + KINDS, CELL, CELL, 3]: what each cell content looks like on each background."""


def render(scene: Scene) -> np.ndarray:
    """The scene's image, uint8 [SIZE, SIZE, 3]."""
    cells = CELL_IMAGES[scene.background][list(scene.cells)].reshape(GRID, GRID, CELL, CELL, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(SIZE, SIZE, 3)
