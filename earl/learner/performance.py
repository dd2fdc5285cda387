"""What a stage's work took: seconds and peak memory by phase, tokens per second.

Kept apart from metrics, which hold nothing that differs between two runs over the same files.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from resource import RUSAGE_SELF, getrusage
from typing import Any, ClassVar

import torch


class Clock:
    """What each phase took, in the order in which the phases were first entered. Phases may lie in one another.

    Attributes:
        seconds: by phase, summed over its blocks.
        peaks: the most bytes that were in use at once during a phase: of the GPU by tensors, else of main memory by the
            process.
    """

    _open: ClassVar[list[int]] = []
    """Peaks so far of the phases that this process is in, of any clock. There is one counter, and each phase resets
    it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block to a phase."""
        self._fold(_peak_memory(self.device))
        _reset_peak_memory(self.device)
        self._open.append(0)
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # kernels run on after the call that starts them
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            peak = max(self._open.pop(), _peak_memory(self.device))
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
            self._fold(peak)

    def _fold(self, peak: int) -> None:
        self._open[:] = [max(before, peak) for before in self._open]


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # Elsewhere a process keeps its peak.
        file.write("5")


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes in use at once since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def summary(
    seconds: dict[str, float], peaks: list[dict[str, int]], tokens: int, device: torch.device
) -> dict[str, Any]:
    """Return what `train/performance.json` holds.

    Args:
        seconds: by phase, of the first rank.
        peaks: by phase, of each rank; see `Clock`.
        tokens: of the prompts and completions that were trained on, on all ranks together.
    """
    learning = sum(seconds.get(name, 0.0) for name in ("forward", "reference", "backward", "step"))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": len(peaks),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "tokens": tokens,
        "tokens_per_second": round(tokens / learning, 2) if tokens else 0.0,
        "peak_memory_bytes": [max(own.values()) for own in peaks],
        "peak_memory_bytes_by_phase": {name: max(own.get(name, 0) for own in peaks) for name in peaks[0]},
    }
