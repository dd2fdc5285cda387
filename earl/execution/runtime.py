"""How a stage's process computes: device, threads, determinism."""

import os
from typing import TYPE_CHECKING

from earl.execution import gpus
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch

    from earl.config.schema import Config


def prepare(config: "Config") -> "torch.device":
    """Fix what the bytes of a result depend on, and return the device to compute on.

    The number of CPU threads is the configuration's, not the machine's: sums are then split alike everywhere.

    Raises:
        EarlError: see `refusal`.
    """
    # cuBLAS is deterministic only with a fixed workspace, and reads this before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if reason := refusal(config.device):
        raise EarlError(f"device {reason}")
    import torch

    torch.set_num_threads(config.cpu_threads)
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor finds bugs, and costs time; no kernel here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.device("cuda" if config.device != "cpu" and sees_gpu() else "cpu")


def refusal(device: str) -> str | None:
    """Return why the configuration's `device` cannot be had here, and what to do; None where it can.

    `auto` is for machines of either kind, but not for one whose GPUs torch does not see, nor for a job that was given
    GPUs there. Imports torch only where a GPU is asked for, or there.
    """
    if device == "cpu":
        return None
    if given := gpus.asked_for():
        why = f" and the environment says {given}"
    else:
        why = " and this machine has GPUs" if gpus.visible() else ""
    if (device == "auto" and not why) or sees_gpu():
        return None
    import torch

    build = f"torch {torch.__version__} sees no GPU here"
    if torch.version.cuda is None and torch.version.hip is None:
        remedy = "install a build of torch for GPUs, or set device to 'cpu'"
    else:
        remedy = "look at what nvidia-smi says and at CUDA_VISIBLE_DEVICES, or set device to 'cpu'"
    return f"is {device!r}{why}, but {build}; {remedy}"


def sees_gpu() -> bool:
    """Return whether torch sees a GPU, without starting CUDA: a process that has started it cannot fork any more."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def dtype(name: str) -> "torch.dtype":
    """Return the torch type that the configuration calls ``name``."""
    import torch

    return getattr(torch, name)


def release_memory(device: "torch.device") -> None:
    """Give back the GPU memory that torch keeps for later, so that something else may take it."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
