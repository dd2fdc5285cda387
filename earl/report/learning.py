"""Whether a run is learning, in sentences: what the curves of its report say, for someone who has not read many.

Thresholds are rules of thumb, from runs of the shapes world; each sentence gives the numbers that it goes by.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance
from typing import Any

from earl.files import tables
from earl.files.evaluations import prompt_of
from earl.files.layout import Run
from earl.report.contents import Comparison

SHARE = 5
"""The first and the last fifth of the iterations are compared."""
NOISE = 0.1
"""Cosine of the gradients of two halves of a step, below which it is mostly noise."""
UNIFORM = 0.5
"""Share of groups with equal rewards, from which on half of the sampling teaches nothing."""
COLLAPSE = 0.3
"""Entropy, as a share of that at the start, below which samples hardly differ."""


@dataclass(frozen=True)
class Trend:
    """The mean of a measure over the first and the last iterations, and the standard error of their difference."""

    before: float
    after: float
    error: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def is_clear(self) -> bool:
        return abs(self.change) > 2 * self.error


def trend(metrics: Sequence[Mapping[str, Any]], measure: str) -> Trend | None:
    """Return how a measure has changed; None where fewer than ten iterations know it."""
    values = [row[measure] for row in metrics if row.get(measure) is not None]
    size = len(values) // SHARE
    if size < 2:
        return None
    first, last = values[:size], values[-size:]
    return Trend(fmean(first), fmean(last), sqrt((variance(first) + variance(last)) / size))


def repeats(run: Run, metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how often a training prompt came on average, by the rollouts on disk; None where there are none."""
    found: Counter[tuple[str, str]] = Counter()
    for row in metrics:
        prompts = set()
        for path in sorted(run.iteration(row["iteration"]).rollouts(0).parent.glob("*.parquet")):
            read = tables.read_table(path, tables.ROLLOUTS, ["dataset", "example_id"]).to_pylist()
            prompts |= {prompt_of(each) for each in read}
        found.update(prompts)
    return found.total() / len(found) if found else None


def sentences(metrics: Sequence[Mapping[str, Any]], held_out: Comparison | None, times_seen: float | None) -> list[str]:
    """Return what there is to say about a run's learning, the most important first.

    Args:
        metrics: of its iterations, in order.
        held_out: the reward of its headline evaluation under the first and the last policy.
        times_seen: how often a training prompt came; see `repeats`.
    """
    return [*_rewards(trend(metrics, "reward_mean"), held_out, times_seen), *_signal(metrics)]


def _rewards(training: Trend | None, held_out: Comparison | None, times_seen: float | None) -> Iterator[str]:
    change = held_out and held_out.change
    if not change:
        return
    interval = f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    rises, risen = change.low > 0, training is not None and training.is_clear and training.change > 0
    if rises:
        yield f"Held-out rewards rise: {interval}."
    elif change.high < 0:
        yield f"Held-out rewards fall: {interval}. Compare with a smaller learning_rate or a larger kl_coeff."
    else:
        yield f"Held-out rewards show no clear change: {interval}."
    if risen and not rises:
        seen = f": each came {times_seen:.1f} times" if times_seen and times_seen >= 1.5 else ""
        remedy = "train on more of them" if seen else "training may fit what only the judge likes, or its own prompts"
        yield f"Rewards of training prompts rise ({training.change:+.2f}), held-out ones do not{seen}; {remedy}."
    elif times_seen and times_seen >= 3:
        yield f"Training prompts came {times_seen:.1f} times each: watch that held-out rewards keep up."


def _signal(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def mean(measure: str) -> float | None:
        values = [row[measure] for row in metrics if row.get(measure) is not None]
        return fmean(values) if values else None

    cosine, uniform, entropy = mean("gradient_cosine"), mean("zero_std_fraction"), trend(metrics, "entropy")
    if cosine is not None:
        agree = "hardly agree" if cosine < NOISE else "agree"
        noise = "; steps are mostly noise, which larger batches or clearer rewards reduce" if cosine < NOISE else ""
        yield f"The gradients of two halves of a step {agree} (cosine {cosine:.2f}){noise}."
    if uniform is not None and uniform >= UNIFORM:
        yield f"In {uniform:.0%} of the groups all rewards are equal, so that they teach nothing."
    if entropy is not None and entropy.before > 0 and entropy.after < COLLAPSE * entropy.before:
        fallen = f"from {entropy.before:.3g} to {entropy.after:.3g} nats a token"
        yield f"Entropy has fallen {fallen}: samples hardly differ."
