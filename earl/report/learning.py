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
from earl.run import replays
from earl.statistics.intervals import Interval

LEAST = 10
"""Iterations that know a measure, from which on something is said of it."""
SHARE, FEWEST = 5, 5
"""The first and the last fifth of the iterations are compared, but five at least: the error of fewer is not known."""
CLEAR = 2.31
"""Standard errors that a change takes to be clear: Student's t for 95% and the 8 degrees of freedom of twice five."""
UNIFORM = 0.5
"""Share of groups with equal rewards, from which on half of the sampling teaches nothing."""
COLLAPSE = 1 / 3
"""Entropy, as a share of that at the start, below which it is spoken of."""

FEW = 10
"""Prompts below which a bootstrap interval is plainly too narrow: of two, it holds the mean half of the time."""


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
        return abs(self.change) > CLEAR * self.error

    @property
    def is_clear_rise(self) -> bool:
        return self.is_clear and self.change > 0


def trend(metrics: Sequence[Mapping[str, Any]], measure: str) -> Trend | None:
    """Return how a measure has changed; None where fewer than ten iterations know it."""
    values = _known(metrics, measure)
    if len(values) < LEAST:
        return None
    size = max(FEWEST, len(values) // SHARE)
    first, last = values[:size], values[-size:]
    return Trend(fmean(first), fmean(last), sqrt((variance(first) + variance(last)) / size))


def repeats(run: Run, metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how often a training prompt came on average, by the rollouts on disk; None where there are none."""
    found: Counter[tuple[str, str]] = Counter()
    for row in metrics:
        prompts = set()
        for path in sorted(replays.iteration_of(run, row["iteration"]).rollouts(0).parent.glob("*.parquet")):
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
    training, change = trend(metrics, "reward_mean"), held_out and held_out.change
    rises, risen = change is not None and change.low > 0, training is not None and training.is_clear_rise
    rewards = _held_out(change, training, times_seen) if change else _training(training)
    known = change is not None or training is not None
    return [*rewards, *_signal(metrics, known and not (rises or risen))]


def _training(training: Trend | None) -> Iterator[str]:
    if training is not None:
        clear = ("rise" if training.change > 0 else "fall") if training.is_clear else "show no clear change"
        yield f"Rewards of training prompts {clear} ({training.change:+.2f}); no evaluation compares two policies."


def _held_out(change: Interval, training: Trend | None, times_seen: float | None) -> Iterator[str]:
    few = f" There are {change.n} prompts, too few for an interval to hold." if change.n < FEW else ""
    interval = f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}].{few}"
    rises = change.low > 0
    if rises:
        yield f"Held-out rewards rise: {interval}"
    elif change.high < 0:
        yield f"Held-out rewards fall: {interval} Compare with a smaller learning_rate or a larger kl_coeff."
    else:
        yield f"Held-out rewards show no clear change: {interval}"
    if not rises and training is not None and training.is_clear_rise:
        risen = f"Rewards of training prompts rise ({training.change:+.2f}), held-out ones"
        seen = f": each came {times_seen:.1f} times" if times_seen and times_seen >= 1.5 else ""
        remedy = "train on more of them" if seen else "training may fit what only the judge likes, or its own prompts"
        if change.high >= training.change:
            yield f"{risen} perhaps as much: evaluate on more prompts to tell."
        else:
            yield f"{risen} {'do not' if change.mean <= 0 else 'less, if at all'}{seen}; {remedy}."
    elif times_seen and times_seen >= 3:
        yield f"Training prompts came {times_seen:.1f} times each: watch that held-out rewards keep up."


def _signal(metrics: Sequence[Mapping[str, Any]], stands_still: bool) -> Iterator[str]:
    """Say what there is of the steps.

    Args:
        stands_still: neither held-out rewards nor those of training prompts rise, as far as these are known.
    """
    cosines, uniform = (_known(metrics, name) for name in ("gradient_cosine", "zero_std_fraction"))
    if len(cosines) >= LEAST:
        mean, error = fmean(cosines), sqrt(variance(cosines) / len(cosines))
        value = f"{mean:.2f} \N{PLUS-MINUS SIGN} {error:.2f}"
        told = f"The gradients of two halves of a step have a cosine of {value} on average"
        if mean > 2 * error:
            yield f"{told}: {mean:.0%} of what a half has in squared norm is signal, the rest noise."
        elif stands_still:  # Over many steps, what no single one shows may add up.
            yield f"{told}: no signal is to be seen in single steps; larger batches or clearer rewards have more."
    if uniform and fmean(uniform) >= UNIFORM:
        yield f"In {fmean(uniform):.0%} of the groups all rewards are equal, so that they teach nothing."
    entropy = trend(metrics, "entropy")
    if entropy is not None and entropy.before > 0 and entropy.after < COLLAPSE * entropy.before:
        fallen = f"from {entropy.before:.3g} to {entropy.after:.3g} nats a token"
        collapse = " while rewards do not rise, a collapse" if stands_still else ""
        yield f"Entropy has fallen {fallen}{collapse}; entropy_coeff works against it."


def _known(metrics: Sequence[Mapping[str, Any]], measure: str) -> list[float]:
    return [row[measure] for row in metrics if row.get(measure) is not None]
