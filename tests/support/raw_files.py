"""Small files of raw pairs, configurations that name them, and the rows that were rejected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from earl.config.schema import Config
from earl.files import images, tables
from tests.support.evaluation_files import demo_config

PICTURE = images.struct(images.encode(np.zeros((64, 64, 3), np.uint8)))


def parquet(path: Path, **fields: Any) -> Config:
    """The demo with one more raw data set, `d`."""
    return demo_config(**{"raw_datasets.d": {"source": "parquet", "path": str(path), **fields}})


def raw_columns(rows: int) -> dict[str, list]:
    return {
        "example_id": [f"e{i}" for i in range(rows)],
        "task": ["remove"] * rows,
        "instruction": ["remove the circle"] * rows,
        "reasoning": [json.dumps({"where": "[0, 0, 32, 16]"})] * rows,
        "original": [PICTURE] * rows,
        "edited": [PICTURE] * rows,
    }


def write_raw(path: Path, columns: dict[str, list]) -> Path:
    tables.write_table(path, tables.RAW, columns, {})
    return path


def rejected(folder: Path) -> list[dict]:
    return [row for file in sorted((folder / "_rejected").glob("*")) for row in pq.read_table(file).to_pylist()]
