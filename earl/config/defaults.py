"""Defaults that follow from other fields."""

import re
from collections.abc import Mapping
from typing import Any

GPU_BYTES = 80e9
"""Memory of the GPUs that the paper's judge ran on, and most run on today."""
WEIGHTS_SHARE = 0.5
"""Of a GPU's memory, for a judge's weights at most; cache, images and CUDA graphs need the rest."""
SPLITS = (1, 2, 4, 8)
"""GPUs that a model can be split over: they divide the number of its attention heads."""
_BILLIONS = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[Bb](?![A-Za-z0-9])")


def judge_gpus(fields: Mapping[str, Any]) -> int:
    """Return how many GPUs the judge `vllm` needs, by the size that its model's name says.

    Args:
        fields: the configuration's fields before `judge_tensor_parallel_size`; those that are wrong are missing.
    """
    found = _BILLIONS.findall(str(fields.get("reward_function_api_model_name", "")).rpartition("/")[2])
    if not found or fields.get("device") == "cpu":
        return 1
    weights = float(found[0]) * 1e9 * (4 if fields.get("dtype") == "float32" else 2)
    return next((count for count in SPLITS if weights / count <= WEIGHTS_SHARE * GPU_BYTES), SPLITS[-1])
