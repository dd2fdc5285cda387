"""Small tokenised data sets."""

from pathlib import Path

import numpy as np

from earl.data.grids import stored
from earl.files import images, tables

PICTURE = images.struct(images.encode(np.zeros((64, 64, 3), np.uint8)))


def cell(tokens: list[list[int]], codebook_size: int = 256) -> dict[str, int | bytes]:
    return stored(np.array(tokens), codebook_size)


def tokenised_columns(rows: int) -> dict[str, list]:
    """Rows of 2 x 3 tokens; row i holds i as its first token."""
    return {
        "dataset": ["d"] * rows,
        "example_id": [f"e{i}" for i in range(rows)],
        "task": [None] * rows,
        "instruction": [f"edit {i}" for i in range(rows)],
        "reasoning": [[{"key": "scene", "value": "a circle"}]] * rows,
        "original_tokens": [cell([[i, 1, 2], [3, 4, 5]]) for i in range(rows)],
        "target_tokens": [cell([[i, 1, 2], [3, 4, 5]]) for i in range(rows)],
        "original": [PICTURE] * rows,
        "target": [None] * rows,
    }


def write_tokenised(path: Path, columns: dict[str, list], **metadata: str) -> Path:
    tables.write_table(path, tables.TOKENISED, columns, metadata, rows_per_group=4)
    return path
