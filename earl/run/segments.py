"""Segments: the iterations that one program, `earl iterate`, makes with its models in memory.

What the workflow and the program both need to know. Nothing here loads a model.
"""

from typing import TYPE_CHECKING

from earl.config import freeze
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import state

if TYPE_CHECKING:
    from earl.config.schema import Config


def processes(config: "Config") -> int:
    """Return the number of ranks of a segment."""
    return config.segment_processes or config.train_processes


def idle_ranks(config: "Config", ranks: int) -> str | None:
    """Return how many of a segment's ranks never sample, and what the plan accepts against it; None where all do."""
    shards, most = config.rollout_shards, config.most_rollout_shards
    if ranks <= shards:
        return None
    wanted = min(ranks, most)
    needed = max(wanted, config.train_processes)
    advice = [f"raise it to {wanted}"] if shards < wanted else []
    advice += [f"lower segment_processes to {needed}"] if needed < ranks else []
    if wanted < needed:
        advice.append(f"an iteration has only {most} {'shard' if most == 1 else 'shards'} for the ranks that train")
    told = f"{ranks - shards} of {ranks} ranks never sample, since rollout_shards is {shards}"
    return f"{told}; {'; '.join(advice)}"


def start(config: "Config", run: Run) -> int:
    """Return where a segment starts: the newest iteration with a checkpoint. Those after it are trained again.

    Raises:
        EarlError: one of them was trained with another configuration, which would give another policy.
    """
    found, newest, digest = state.newest_checkpoint(run), state.newest_complete(run), freeze.config_digest(config)
    for index in range(found + 1, newest + 1):
        metrics = run.iteration(index).metrics
        if metrics.is_file() and state.read_metrics(run, index).get("config_digest", digest) != digest:
            raise EarlError(
                f"{metrics}: iteration {index} was trained with another configuration, and the newest checkpoint is "
                f"that of iteration {found}; bring the newest one back before the configuration changes: earl restore "
                f"--run {run.path} --iteration {newest}; or have iterations {index} to {newest} trained anew: "
                f"earl rewind --run {run.path} --iteration {index}"
            )
    return found


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
    return due or index == last or state.Retention.of(config).saves(index)
