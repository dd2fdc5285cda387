"""What a stage's work took: seconds by phase, tokens per second, peak memory.

Kept apart from metrics, which hold nothing that differs between two runs over the same files.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch


class Clock:
    """Seconds by phase, in the order in which the phases were first entered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to those of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # kernels run on after the call that starts them
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU count from here; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use at once: of the GPU by tensors, else of main memory by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def summary(seconds: dict[str, float], peaks: list[int], tokens: int, device: torch.device) -> dict[str, Any]:
    """Return what `train/performance.json` holds.

    Args:
        seconds: by phase, of the first rank.
        peaks: see `peak_memory`, of each rank.
        tokens: of the prompts and completions that were trained on, on all ranks together.
    """
    learning = sum(seconds.get(name, 0.0) for name in ("forward", "reference", "backward", "step"))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": len(peaks),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "tokens": tokens,
        "tokens_per_second": round(tokens / learning, 2) if tokens else 0.0,
        "peak_memory_bytes": peaks,
    }
