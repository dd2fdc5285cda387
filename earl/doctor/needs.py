"""What an experiment takes of a node, by the estimates of `earl.estimate`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from earl.doctor.wanted import Needs, Wanted
from earl.estimate import disk, fit, gpus, memory, models
from earl.run import resources

if TYPE_CHECKING:
    from earl.config.schema import Config

PROCESS = 2_000_000_000
"""Bytes of main memory that a rank takes beside weights: Python, torch, CUDA, episodes of an iteration."""
SHOWN = 50_000_000
"""Bytes below which a part of that is not named."""
LEARNER = 20
"""Bytes a weight of a learner on the CPU: float32 weights, two moments, gradients, reference."""


def of(
    config: "Config",
    path: Path | None = None,
    gpu_count: int | None = None,
    judge: str | None = None,
    by_segment: bool = True,
) -> Wanted:
    """Return what a node is to have; what is given besides takes the place of what the configuration says.

    In a job on several nodes, that is what each of them is to have.

    Args:
        by_segment: whether iterations run as segments, or stage by stage.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    heaviest = "iterate" if by_segment else "train"
    if gpu_count is None and config.device == "cuda":
        gpu_count = 1
    if judge is None and config.judge == "openai":
        judge = config.reward_function_api_base

    def misfits(name: str, size: int, count: int) -> Sequence[str]:
        gpu = gpus.Gpu(name, size, *gpus.UNKNOWN)
        asked = gpus.Asked(gpu, count, nodes, "this node has")
        return [str(one) for one in fit.check(config, by_segment, lambda rule: asked)]

    return Wanted(
        path or Path(config.base_exp_dir),
        gpu_count,
        judge,
        disk=_disk(config, by_segment),
        memory=_memory(config, -(-resources.ranks(config, heaviest) // nodes), by_segment),
        misfits=misfits,
        splits_gpus=resources.gpus(config, heaviest) > nodes,
    )


def _disk(config: "Config", by_segment: bool) -> Needs:
    """Return what a run still has to write. What it has written is there."""
    found = disk.of(config, models.text(config), by_segment)
    most = max(found.checkpoints, found.most_checkpoints)
    return Needs(max(0, found.needed - disk.written(config)), f"{most} checkpoints of {found.checkpoint / 1e9:.1f} GB")


def _memory(config: "Config", ranks: int, by_segment: bool) -> Needs:
    """Return what the ranks of a node take of its main memory.

    Each keeps the weights of an engine that sleeps on a GPU, or everything where there is none; the first one gathers
    the weights that it writes, and a reference that is offloaded is split over all.
    """
    count = memory.weights_of(models.text(config))
    value = 2 if config.dtype == "bfloat16" else 4
    parts = {f"ranks: {ranks}": ranks * PROCESS, "weights of a checkpoint": 4 * count}
    if config.device == "cpu":
        parts |= {"engines": ranks * value * count, "learner": LEARNER * count}
    elif by_segment:
        parts["engines asleep"] = ranks * value * count
    if config.reference_offload:
        parts["reference"] = value * count * ranks // resources.ranks(config, "train")
    shown = [f"{name}, {size / 1e9:.1f} GB" for name, size in parts.items() if size >= SHOWN]
    return Needs(sum(parts.values()), "; ".join(shown))
