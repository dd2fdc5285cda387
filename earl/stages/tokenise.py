"""Tokenise: raw image pairs to a folder of tokenised Parquet files, with the policy's vision tokenizer.

Both images of a pair get the size of the original scaled to ``image_area``, so that the edit has the grid of the
original; boxes in the reasoning text scale with it.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from earl import runtime
from earl.config.paths import resolve
from earl.data.tokenised import CODEBOOK_SIZE
from earl.emu3 import checkpoint, vision
from earl.errors import EarlError
from earl.files import atomic, images, manifest, tables

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import Emu3VQVAE

    from earl.config.schema import Config

ROWS_PER_FILE = 1024
# A reader of one row reads its group: few rows keep that cheap for images of 256 x 256 pixels.
ROWS_PER_GROUP = 32
_OPTIONAL = ("task", "reasoning")
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def run(config: "Config", dataset: str, raw: Path, out: Path) -> None:
    """Tokenise a raw data set.

    Args:
        config: The run's resolved configuration: vision tokenizer and ``image_area``.
        dataset: The data set's name, which every row gets.
        raw: Parquet file of schema `earl.files.tables.RAW` (``task`` and ``reasoning`` may be absent). A row may
            have no edited image: it can be a prompt, but no example to fine-tune on.
        out: The folder to write: 0000.parquet, ... of schema `earl.files.tables.TOKENISED`, sealed.

    Raises:
        EarlError: naming file, row and column, when the raw file is damaged or empty, an image does not decode, or
            the reasoning is no JSON object of text; nothing is left behind then.
    """
    from tqdm import tqdm

    total = _row_count(raw)
    device = runtime.prepare(config)
    folder = resolve(config, config.vision_tokenizer_path)
    model = checkpoint.load_vision_tokenizer(folder, device)
    codebook_size = model.config.codebook_size
    metadata = {
        "dataset": dataset,
        CODEBOOK_SIZE: str(codebook_size),
        "image_area": str(config.image_area),
        "raw_digest": manifest.digest_file(raw),
        "vision_tokenizer_digest": manifest.digest_folder(folder),
    }
    with (
        atomic.folder(out) as temporary,
        tqdm(total=total, desc=f"tokenise {dataset}", unit="pair", file=sys.stderr) as progress,
    ):
        for index, (first_row, rows) in enumerate(_read(raw)):
            columns = _tokenised(rows, f"{raw}: row", first_row, dataset, config.image_area, model, progress)
            file = temporary / f"{index:04d}.parquet"
            tables.write_table(
                file, tables.TOKENISED, columns, metadata, codebook_size - 1, rows_per_group=ROWS_PER_GROUP
            )
        manifest.seal(temporary)


def scaled_size(width: int, height: int, area: int, factor: int) -> tuple[int, int]:
    """Return (width, height) of about ``area`` pixels with the same aspect ratio, both multiples of ``factor``."""
    scale = math.sqrt(area / (width * height))
    sides = (max(1, math.floor(side * scale / factor + 0.5)) * factor for side in (width, height))
    return next(sides), next(sides)


def scale_boxes(text: str, scale_x: float, scale_y: float) -> str:
    """Return ``text`` with every box ``[x1, y1, x2, y2]`` scaled; whole numbers stay whole, others get two decimals."""
    if scale_x == scale_y == 1:
        return text

    def scaled(match: re.Match[str]) -> str:
        numbers = zip(match.groups(), (scale_x, scale_y, scale_x, scale_y), strict=True)
        return f"[{', '.join(_scale_number(number, scale) for number, scale in numbers)}]"

    return _BOX.sub(scaled, text)


def _scale_number(number: str, scale: float) -> str:
    value = float(number) * scale
    return f"{value:.2f}" if "." in number else str(math.floor(value + 0.5))


def _row_count(raw: Path) -> int:
    with tables.open_table(raw) as source:
        found = source.schema_arrow
        wanted = [name for name in tables.RAW.names if name not in _OPTIONAL or name in found.names]
        tables.check_columns(raw, found, tables.RAW, wanted)
        if not source.metadata.num_rows:
            raise EarlError(f"{raw}: the data set is empty; give a file with at least one row")
        return source.metadata.num_rows


def _read(raw: Path) -> Iterator[tuple[int, "pa.Table"]]:
    """Yield the number of a first row and the rows from there on, as many as go into one file."""
    import pyarrow as pa

    with tables.open_table(raw) as source:
        wanted = [name for name in tables.RAW.names if name in source.schema_arrow.names]
        first_row = 0
        try:
            for batch in source.iter_batches(ROWS_PER_FILE, columns=wanted):
                rows = pa.Table.from_batches([batch])
                for name in wanted:
                    tables.check_values(raw, tables.RAW.field(name), rows.column(name))
                yield first_row, rows
                first_row += len(rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise EarlError(f"{raw}: is damaged after row {first_row} ({error}); write or download it again") from error


def _tokenised(
    rows: "pa.Table", where: str, first_row: int, dataset: str, area: int, model: "Emu3VQVAE", progress: Any
) -> dict[str, list]:
    """Return the columns of one file."""
    factor = 2 ** (len(model.config.channel_multiplier) - 1)
    columns: dict[str, list] = {name: [] for name in tables.TOKENISED.names}
    for start in range(0, len(rows), vision.BATCH):
        pairs: list[tuple[np.ndarray, np.ndarray | None]] = []
        part = rows.slice(start, vision.BATCH).to_pylist()
        for offset, row in enumerate(part, start=first_row + start):
            original, target, scale = _pair(row, f"{where} {offset}", area, factor)
            pairs.append((original, target))
            columns["reasoning"].append(_reasoning(row.get("reasoning"), scale, f"{where} {offset}"))
        tokens = iter(vision.encode(model, [pixels for pair in pairs for pixels in pair if pixels is not None]))
        for row, pair in zip(part, pairs, strict=True):
            for name, pixels in zip(("original", "target"), pair, strict=True):
                columns[f"{name}_tokens"].append(None if pixels is None else next(tokens).tolist())
                data = None if pixels is None else images.encode(pixels)
                columns[name].append(images.struct(data, f"{row['example_id']}-{name}.png"))
        progress.update(len(part))
    given = rows.to_pydict()
    columns["dataset"] = [dataset] * len(rows)
    columns["task"] = given.get("task", [None] * len(rows))
    columns |= {name: given[name] for name in ("example_id", "instruction")}
    return columns


def _pair(
    row: dict[str, Any], where: str, area: int, factor: int
) -> tuple[np.ndarray, np.ndarray | None, tuple[float, float]]:
    """Return original and edited image (if there is one) at the size to tokenise, and the scale of x and y."""
    original = _decoded(row["original"], f"{where}, column 'original'")
    edited = None if row.get("edited") is None else _decoded(row["edited"], f"{where}, column 'edited'")
    height, width = original.shape[:2]
    size = scaled_size(width, height, area, factor)
    scale = (size[0] / width, size[1] / height)
    return _resized(original, size), None if edited is None else _resized(edited, size), scale


def _decoded(image: dict[str, Any], where: str) -> np.ndarray:
    if image["bytes"] is None:
        raise EarlError(f"{where}: the image has no bytes, only a path; write the bytes into the file")
    return images.decode(image["bytes"], where)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _reasoning(text: str | None, scale: tuple[float, float], where: str) -> list[dict[str, str]] | None:
    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise EarlError(f"{where}, column 'reasoning': is not JSON ({error}); mend or remove the row") from error
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise EarlError(f"{where}, column 'reasoning': must be a JSON object of text; mend or remove the row")
    return [{"key": key, "value": scale_boxes(value, *scale)} for key, value in values.items()]
