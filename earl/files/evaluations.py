"""The table of an evaluation: rollouts without their images, scores, and what was computed of them."""

from typing import Any

import pyarrow as pa

from earl.files import tables

WITHOUT_IMAGES = [field.name for field in tables.ROLLOUTS if field.type != tables.IMAGE]
"""Columns of the rollouts that the table repeats."""
EVALUATION = pa.schema(
    [
        *map(tables.ROLLOUTS.field, WITHOUT_IMAGES),
        *[field for field in tables.SCORES if field.name not in ("episode_id", "group_id")],
        pa.field("reward", pa.float32()),
        pa.field("viescore", pa.float32()),
        pa.field("semantic_consistency", pa.float32()),
        pa.field("perceptual_quality", pa.float32()),
    ],
    metadata={"earl_table": "evaluation"},
)


def prompt_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return what identifies a prompt across policies: (dataset, example_id)."""
    return row["dataset"], row["example_id"]
