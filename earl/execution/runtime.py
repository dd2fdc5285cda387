"""How a stage's process computes: device, threads, determinism."""

import os
from typing import TYPE_CHECKING

from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch

    from earl.config.schema import Config


def prepare(config: "Config") -> "torch.device":
    """Fix what the bytes of a result depend on, and return the device to compute on.

    The number of CPU threads is the configuration's, not the machine's: sums are then split alike everywhere.

    Raises:
        EarlError: when the configuration asks for a GPU and there is none.
    """
    # cuBLAS is deterministic only with a fixed workspace, and reads this before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(config.cpu_threads)
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor finds bugs, and costs time; no kernel here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise EarlError("device is 'cuda', but no GPU is visible here; set device to 'auto' or 'cpu'")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def dtype(config: "Config") -> "torch.dtype":
    """Return the torch type of ``config.dtype``."""
    import torch

    return getattr(torch, config.dtype)


def policy_dtype(config: "Config") -> "torch.dtype":
    """Return the torch type of ``config.policy_dtype``."""
    import torch

    return getattr(torch, config.policy_dtype)


def release_memory(device: "torch.device") -> None:
    """Give back the GPU memory that torch keeps for later, so that something else may take it."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
