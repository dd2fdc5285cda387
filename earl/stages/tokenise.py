"""Tokenise: raw image pairs to a folder of tokenised Parquet files, with the policy's vision tokenizer.

Both images of a pair get the size of the original scaled to ``image_area``, so that the edit has the grid of the
original; boxes in pixels in the reasoning text scale with it. A row that cannot be used is written down with its
reason, and a run that was killed goes on with the shards it has.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from earl import code_version
from earl.config.paths import vision_tokenizer_folder
from earl.data.boxes import misfits, scale_boxes
from earl.data.example import CODEBOOK_SIZE
from earl.data.grids import stored
from earl.data.raw import RawRow, RawSource, Window
from earl.data.selection import Selection
from earl.data.shards import Reject, ShardWriter
from earl.emu3 import checkpoint, vision
from earl.execution import runtime
from earl.files import atomic, images, manifest, pictures, tables
from earl.files.pictures import Rejected

if TYPE_CHECKING:
    from transformers import Emu3VQVAE

    from earl.config.schema import Config
    from earl.config.sections import BoxUnit

ROWS_PER_FILE = 1024
ROWS_AT_ONCE = 128
"""Rows whose images are in memory together, from which batches of one shape are made."""


@dataclass(frozen=True)
class _Pair:
    """A row that can be tokenised."""

    row: RawRow
    instruction: str
    reasoning: list[dict[str, str]] | None
    original: np.ndarray
    edited: np.ndarray | None
    misfits: list[str]
    """Lists of four numbers in the reasoning that are not boxes in the unit of the data set."""


@dataclass(frozen=True)
class _Problem:
    """Why a row cannot be, and the column that says so."""

    column: str
    reason: str


def run(config: "Config", dataset: str, raw: Path, out: Path) -> None:
    """Tokenise a raw data set.

    Args:
        config: The run's resolved configuration: vision tokenizer, ``image_area``, and of the entry of this name in
            ``raw_datasets`` where it has one: columns, whether images are kept, and how many rows may be rejected.
        dataset: The data set's name, which every row gets.
        raw: Parquet or Arrow file, folder of such files, or pattern (`earl.data.raw.RawSource`).
        out: The folder to write (`earl.data.shards`).

    Raises:
        EarlError: naming file and column, when a raw file is damaged, lacks a column or is empty, or more rows are
            rejected than may be. The shards that were written wait beside ``out`` then, for a run over the same
            data with the same code and settings.
    """
    from tqdm import tqdm

    entry = config.raw_datasets.get(dataset)
    source = (
        RawSource(raw, entry.columns, Selection.of(entry), entry.instruction_prefix, entry.task_name)
        if entry
        else RawSource(raw)
    )
    keep_images = entry.keep_images if entry else True
    unit = entry.boxes if entry else "pixels"
    device = runtime.prepare(config)
    folder = vision_tokenizer_folder(config)
    model = checkpoint.load_vision_tokenizer(folder, device)
    metadata = {
        "dataset": dataset,
        CODEBOOK_SIZE: str(model.config.codebook_size),
        "image_area": str(config.image_area),
        "raw_footers_digest": source.footers_digest,
        "vision_tokenizer_digest": manifest.digest_folder(folder),
    }
    made_from = metadata | {
        "boxes": unit,
        "code_version": code_version(),
        "cpu_threads": config.cpu_threads,
        "device": str(device),
        "keep_images": keep_images,
        "raw_times": source.times,
        "rows": source.settings,
    }
    fraction = entry.max_rejected_fraction if entry else 0.0
    with (
        atomic.resumable_folder(out, json.dumps(made_from, sort_keys=True)) as unfinished,
        manifest.reading(raw),
        tqdm(total=len(source), desc=f"tokenise {dataset}", unit="pair", file=sys.stderr) as progress,
        ThreadPoolExecutor(config.cpu_threads) as pool,
    ):
        writer = ShardWriter(unfinished, metadata, len(source), fraction, keep_images)
        tokeniser = _Tokeniser(dataset, model, config.image_area, keep_images, unit, pool)
        for number, window in enumerate(source.windows(ROWS_PER_FILE)):
            if not writer.is_done(number):
                writer.write(number, *tokeniser.columns(source, window))
            progress.update(window.rows)
        writer.finish()
    if tokeniser.misfits:
        print(
            f"tokenise {dataset}: {tokeniser.misfits:,} lists of four numbers in reasoning, such as "
            f"{tokeniser.misfit_example}, are not boxes in unit {unit!r} and were left as they are; set "
            f"raw_datasets.{dataset}.boxes to the unit of the boxes, or to 'none'",
            file=sys.stderr,
        )
    print(f"tokenise {dataset}: {writer.text()}", file=sys.stderr)


def scaled_size(width: int, height: int, area: int, factor: int) -> tuple[int, int]:
    """Return (width, height) of about ``area`` pixels with the same aspect ratio, both multiples of ``factor``."""
    scale = math.sqrt(area / (width * height))
    sides = (max(1, math.floor(side * scale / factor + 0.5)) * factor for side in (width, height))
    return next(sides), next(sides)


class _Tokeniser:
    """Makes the columns of a shard: threads decode images while the device encodes those before."""

    def __init__(
        self,
        dataset: str,
        model: "Emu3VQVAE",
        area: int,
        keep_images: bool,
        unit: "BoxUnit",
        pool: ThreadPoolExecutor,
    ) -> None:
        self.misfits = 0
        """How many lists of four numbers were left as they are (`earl.data.boxes.misfits`)."""
        self.misfit_example: str | None = None
        self._dataset = dataset
        self._model = model
        self._area = area
        self._factor = 2 ** (len(model.config.channel_multiplier) - 1)
        self._keep_images = keep_images
        self._unit = unit
        self._pool = pool

    def columns(self, source: RawSource, window: Window) -> tuple[dict[str, list], list[Reject]]:
        """Return the columns of a window's rows, and those of its rows that were rejected."""
        columns: dict[str, list] = {name: [] for name in tables.TOKENISED.names}
        rejects: list[Reject] = []
        for part in _one_ahead(source.read(window, ROWS_AT_ONCE), self._submit):
            pairs = []
            for row, future in part:
                found = future.result()
                if isinstance(found, _Problem):
                    file = source.label(window.file)
                    rejects.append(Reject(file, row.row, row.example_id, found.column, found.reason))
                else:
                    pairs.append(found)
                    self.misfits += len(found.misfits)
                    self.misfit_example = self.misfit_example or next(
                        (f"{text} in {window.file.name}: row {row.row}" for text in found.misfits), None
                    )
            self._add(columns, pairs)
        return columns, rejects

    def _submit(self, row: RawRow) -> "Future[_Pair | _Problem]":
        return self._pool.submit(_prepared, row, self._area, self._factor, self._unit)

    def _add(self, columns: dict[str, list], pairs: list[_Pair]) -> None:
        known = [pixels for pair in pairs for pixels in (pair.original, pair.edited) if pixels is not None]
        codebook_size = self._model.config.codebook_size
        grids = (stored(tokens, codebook_size) for tokens in vision.encode(self._model, known))
        for pair in pairs:
            columns["original_tokens"].append(next(grids))
            columns["target_tokens"].append(None if pair.edited is None else next(grids))
        columns["dataset"] += [self._dataset] * len(pairs)
        columns["example_id"] += [pair.row.example_id for pair in pairs]
        columns["task"] += [pair.row.task for pair in pairs]
        columns["instruction"] += [pair.instruction for pair in pairs]
        columns["reasoning"] += [pair.reasoning for pair in pairs]
        columns["original"] += [self._stored(pair, "original", pair.original) for pair in pairs]
        columns["target"] += [self._stored(pair, "target", pair.edited) for pair in pairs]

    def _stored(self, pair: _Pair, name: str, pixels: np.ndarray | None) -> dict[str, bytes | str] | None:
        data = images.encode(pixels) if self._keep_images and pixels is not None else None
        return images.struct(data, f"{pair.row.example_id}-{name}.png")


def _one_ahead(
    parts: Iterator[list[RawRow]], submit: "Callable[[RawRow], Future]"
) -> "Iterator[list[tuple[RawRow, Future]]]":
    """Yield rows with what becomes of them, each part only when the one after it has been started."""
    waiting: list[tuple[RawRow, Future]] = []
    for part in parts:
        started = [(row, submit(row)) for row in part]
        yield waiting
        waiting = started
    yield waiting


def _prepared(row: RawRow, area: int, factor: int, unit: "BoxUnit") -> _Pair | _Problem:
    """Decode, check and resize one row."""
    if row.problem:
        return _Problem(*row.problem)
    column = "instruction"
    try:
        instruction = row.checked_instruction()
        column = "reasoning"
        reasoning = row.reasoning_pairs()
        column = "original"
        original = pictures.read(row.original)
        column = "edited"
        edited = pictures.read(row.edited) if row.has_edited else None
    except Rejected as problem:
        return _Problem(column, str(problem))
    height, width = original.shape[:2]
    size = scaled_size(width, height, area, factor)
    misfitting = [found for _, text in reasoning or () for found in misfits(text, unit, width, height)]
    if reasoning is not None:
        reasoning = [{"key": key, "value": _fitted(text, unit, (width, height), size)} for key, text in reasoning]
    edited = None if edited is None else _resized(edited, size)
    return _Pair(row, instruction, reasoning, _resized(original, size), edited, misfitting)


def _fitted(text: str, unit: "BoxUnit", before: tuple[int, int], after: tuple[int, int]) -> str:
    # Relative boxes hold at any size.
    if unit != "pixels":
        return text
    return scale_boxes(text, after[0] / before[0], after[1] / before[1], *before)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
