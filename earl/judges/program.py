"""The judge of the shapes world: a program that measures pixels where other judges ask a model.

It sees what a model judge sees (original, target and edited pixels) and fills the same columns, so everything behind it
is the same. The images are compared cell by cell of the shapes world:

* edit success: how far the pixels that the edit should change have gone from the original to the target;
* overedit: how many cells changed where they should not have (10 = none);
* naturalness: does the picture show objects, on one background;
* artifacts: does each cell look like something this world contains (10 = no artifacts);
* ground score: success, less what was damaged.

Scores are meant to teach edits. So a copy of the original scores 0 for success (a dead zone takes up what the vision
tokenizer changes by itself), damage is costed in objects and not in pixels (most of a scene is background), and a
background changed in part already pays, since nobody changes 64 tokens rightly by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earl.judges import Judgement, Verdict
from earl.shapes import world

CHANGED = 8 / 255
"""A pixel belongs to the edit where original and target differ by more than this in some channel."""
DEAD_ZONE, DONE = 0.2, 0.85
"""Share of the way from original to target below which a cell counts as not edited, and from which as done."""
UNTOUCHED, RUINED = 0.06, 0.2
"""Root mean square difference from the original up to which a cell is intact, and from which it is lost."""
CHANGED_OBJECT, GONE_OBJECT = 4.0, 6.0
"""What an object costs that looks different, and one that is gone, in lost empty cells.

A policy that does not know yet which object is meant would otherwise do best by removing several.
"""
DAMAGE_LIMIT = 8.0
"""Damage, in empty cells, at which the overedit score reaches 0."""
CLEAN, BROKEN = 0.05, 0.16
"""Distance of a cell from the nearest picture of this world up to which it is clean, and from which it is broken."""
BROKEN_LIMIT = 0.5
"""Share of broken cells at which the artifact score reaches 0."""
ODD_BACKGROUND = 0.6
"""What of naturalness is lost when half of the cells have another background than the rest."""
MIN_PIXELS = 16
"""A cell takes part in a measurement only with this many pixels."""


@dataclass(frozen=True)
class _Measures:
    """Per image, in the order of the judgements: float64 [N] each."""

    done: np.ndarray
    """Share of the edit that was carried out, 0..1, mean over the cells it concerns."""
    damage: np.ndarray
    """Damaged cells outside the edit, objects counted more than once."""
    broken: np.ndarray
    """Share of cells that look like nothing in this world, 0..1."""
    backgrounds: np.ndarray
    """Share of cells whose background is not the most frequent one, 0..1."""
    objects: np.ndarray
    """Number of cells that show an object."""


class ProgramJudge:
    """Scores edits in the shapes world by measuring pixels. Needs the target; the same input gives the same scores."""

    name = "program"
    model = None
    revision = None
    rubrics_digest = None

    def score(self, judgements: Sequence[Judgement]) -> list[Verdict]:
        """One verdict per judgement, in order; `failed` where there is no target or an image has another size."""
        verdicts: list[Verdict | None] = [_refusal(judgement) for judgement in judgements]
        rows = [row for row, verdict in enumerate(verdicts) if verdict is None]
        if rows:
            pictures = [_cells([getattr(judgements[row], which) for row in rows]) for which in _IMAGES]
            for row, verdict in zip(rows, _verdicts(_measure(*pictures)), strict=True):
                verdicts[row] = verdict
        return verdicts


_IMAGES = ("original", "target", "edited")


def _refusal(judgement: Judgement) -> Verdict | None:
    for which in _IMAGES:
        image = getattr(judgement, which)
        if image is None:
            return Verdict("failed", f"the program judge compares with the target, and there is no {which} image")
        if image.shape != (world.SIZE, world.SIZE, 3) or image.dtype != np.uint8:
            return Verdict(
                "failed",
                f"the program judge knows the shapes world only, uint8 images of {world.SIZE}x{world.SIZE} pixels; "
                f"the {which} image is {image.dtype} {list(image.shape)}",
            )
    return None


def foreign(image: np.ndarray) -> str | None:
    """Return why an image is none of the shapes world, which this judge alone knows; None where it may be one.

    Args:
        image: uint8 [height, width, 3].
    """
    height, width = image.shape[:2]
    if (height, width) != (world.SIZE, world.SIZE):
        return f"holds an image of {width}x{height} pixels, not {world.SIZE}x{world.SIZE}"
    distance = _nearest(_cells([image]))[1]
    if _ramp(distance, CLEAN, BROKEN).mean() >= BROKEN_LIMIT:
        return "holds an image that shows nothing of the shapes world"
    return None


def _cells(images: list[np.ndarray]) -> np.ndarray:
    """float32 [N, cells, pixels of a cell, 3] in 0..1."""
    grid, cell = world.GRID, world.CELL
    stack = np.stack(images).astype(np.float32) / 255
    blocks = stack.reshape(-1, grid, cell, grid, cell, 3).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(len(images), grid * grid, cell * cell, 3)


_KNOWN = world.CELL_IMAGES.reshape(-1, world.CELL**2 * 3).astype(np.float32) / 255
_PER_BACKGROUND = world.CELL_IMAGES.shape[1]


def _nearest(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the most similar picture of a cell (background * (1 + KINDS) + object) and its distance, [N, cells]."""
    flat = cells.reshape(-1, _KNOWN.shape[1])
    squares = (flat**2).sum(1, keepdims=True) + (_KNOWN**2).sum(1) - 2 * flat @ _KNOWN.T
    nearest = squares.argmin(1)
    distance = np.sqrt(np.maximum(squares[np.arange(len(flat)), nearest], 0) / _KNOWN.shape[1])
    return nearest.reshape(cells.shape[:2]), distance.reshape(cells.shape[:2])


def _distance(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Sum of absolute differences per cell over the pixels marked by `where` [N, cells, pixels]: [N, cells]."""
    return (np.abs(a - b).mean(-1) * where).sum(-1)


def _difference(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Root mean square difference per cell over the pixels marked by `where` [N, cells, pixels]: [N, cells]."""
    squares = ((a - b) ** 2).mean(-1) * where
    return np.sqrt(squares.sum(-1) / np.maximum(where.sum(-1), 1))


def _ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high`, linear between."""
    return np.clip((value - low) / (high - low), 0.0, 1.0)


def _measure(original: np.ndarray, target: np.ndarray, edited: np.ndarray) -> _Measures:
    meant = np.abs(original - target).max(-1) > CHANGED
    concerned = meant.sum(-1) >= MIN_PIXELS
    way = 1 - _distance(edited, target, meant) / np.maximum(_distance(original, target, meant), 1e-6)
    done = (_ramp(way, DEAD_ZONE, DONE) * concerned).sum(1) / np.maximum(concerned.sum(1), 1)

    nearest, distance = _nearest(edited)
    backgrounds, objects = np.divmod(nearest, _PER_BACKGROUND)

    kept = ~meant
    lost = _ramp(_difference(edited, original, kept), UNTOUCHED, RUINED) * (kept.sum(-1) >= MIN_PIXELS)
    had_object = _nearest(original)[0] % _PER_BACKGROUND != world.EMPTY
    cost = np.where(had_object, np.where(objects == world.EMPTY, GONE_OBJECT, CHANGED_OBJECT), 1.0)
    damage = (lost * cost).sum(1)

    votes = (backgrounds[..., None] == np.arange(len(world.BACKGROUNDS))).sum(1)
    return _Measures(
        done=done,
        damage=damage,
        broken=_ramp(distance, CLEAN, BROKEN).mean(1),
        backgrounds=1 - votes.max(1) / nearest.shape[1],
        objects=(objects != world.EMPTY).sum(1),
    )


def _verdicts(m: _Measures) -> list[Verdict]:
    kept = 1 - np.clip(m.damage / DAMAGE_LIMIT, 0.0, 1.0)
    scores = {
        "edit_success": m.done,
        "overedit": kept,
        # No edit of this world empties a scene, so a picture without objects is not one of its pictures.
        "naturalness": (1 - np.minimum(m.backgrounds / 0.5, 1.0) * ODD_BACKGROUND) * (m.objects > 0),
        "artifacts": 1 - np.clip(m.broken / BROKEN_LIMIT, 0.0, 1.0),
        "ground_score": m.done * kept,
    }
    columns = {column: np.round(10 * values, 2) for column, values in scores.items()}
    return [
        Verdict("ok", _words(m, row), **{column: float(values[row]) for column, values in columns.items()})
        for row in range(len(m.done))
    ]


def _words(m: _Measures, row: int) -> str:
    return json.dumps(
        {
            "edit_done": round(float(m.done[row]), 3),
            "damaged_cells": round(float(m.damage[row]), 3),
            "broken_cells_share": round(float(m.broken[row]), 3),
            "odd_background_share": round(float(m.backgrounds[row]), 3),
            "objects": int(m.objects[row]),
        }
    )
