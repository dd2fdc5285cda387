"""Learning rates: a linear warm-up to a peak, then constant, linear or cosine down to a final rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step alone.

    Attributes:
        peak: the rate after the warm-up.
        steps: after which it is at its final value; without any it never falls.
        final: the rate from there on.
        shape: how it falls, "linear" or "cosine"; "constant": not at all.
        warmup: steps over which it rises linearly; the first has `peak / warmup`.
        decay: last ones of the steps, over which it falls; None: all after the warm-up.
    """

    peak: float
    steps: int | None = None
    final: float = 0.0
    shape: str = "constant"
    warmup: int = 0
    decay: int | None = None

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0.

        With f the fraction of the decay that is done, final + (peak - final) * share, where the share is 1 - f for
        "linear" and (1 + cos(pi f)) / 2 for "cosine".
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.shape == "constant" or self.steps is None:
            return self.peak
        decay = self.steps - self.warmup if self.decay is None else self.decay
        done = min(max(step - (self.steps - decay), 0) / decay, 1.0) if decay else 1.0
        share = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (self.peak - self.final) * share
