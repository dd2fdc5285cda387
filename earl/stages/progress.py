"""What a rank of a segment has done: for its record, and for a line an iteration."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from earl.learner.performance import Clock

if TYPE_CHECKING:
    import torch

KINDS = ("rollouts", "scores", "evaluations", "train", "checkpoints")
"""Files that a segment writes."""


class Progress:
    """Seconds and peak memory by phase, bytes by kind of file, and iterations.

    Attributes:
        written: bytes of the files that this rank wrote, by kind.
        iterations: those that were trained for the first time; ``again`` are those that were complete already.
    """

    def __init__(self, device: "torch.device") -> None:
        self._clock = Clock(device)
        self._told: dict[str, float] = {}
        self.written: dict[str, int] = {}
        self.iterations: list[int] = []
        self.again: list[int] = []

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the block to a phase."""
        return self._clock.phase(name)

    def wrote(self, kind: str, *paths: Path) -> None:
        """Add the bytes of files and folders."""
        found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()]
        self.written[kind] = self.written.get(kind, 0) + sum(file.stat().st_size for file in found)

    def trained(self, index: int, again: bool) -> None:
        (self.again if again else self.iterations).append(index)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase so far."""
        return {name: round(value, 3) for name, value in self._clock.seconds.items()}

    def peaks(self) -> dict[str, int]:
        """Return the peak memory of each phase so far, in bytes; see `Clock`."""
        return dict(self._clock.peaks)

    def news(self) -> str:
        """Return the seconds since the last call, and by phase, as text."""
        found = {name: value - self._told.get(name, 0.0) for name, value in self._clock.seconds.items()}
        self._told = dict(self._clock.seconds)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.items() if seconds >= 0.05)
        return f"{sum(found.values()):.1f} s ({parts})"
