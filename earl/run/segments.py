"""Segments: the iterations that one program, `earl iterate`, makes with its models in memory.

What the workflow and the program both need to know. Nothing here reads a file or loads a model.
"""

from typing import TYPE_CHECKING

from earl.messages.errors import EarlError
from earl.run.state import Retention

if TYPE_CHECKING:
    from earl.config.schema import Config


def processes(config: "Config") -> int:
    """Return the number of ranks of a segment."""
    return config.segment_processes or config.train_processes


def check(config: "Config") -> None:
    """Refuse what a segment cannot do.

    Raises:
        EarlError: an engine is to be split over several GPUs.
    """
    if config.engine == "vllm" and config.vllm_tensor_parallel_size > 1:
        raise EarlError(
            f"vllm_tensor_parallel_size is {config.vllm_tensor_parallel_size}, but in a segment each rank samples with "
            "an engine of its own on one GPU; set it to 1, or run by stage (granularity=stage)"
        )


def has_checkpoint(config: "Config", index: int, last: int) -> bool:
    """Return whether the segment that ends with iteration ``last`` writes a checkpoint after iteration ``index``."""
    due = index % config.segment_checkpoint_every_n_iterations == 0
    return due or index == last or Retention.of(config).saves(index)
