"""Percentile bootstrap intervals (Efron 1979), resampling prompts. Deterministic: equal values give equal intervals.

Where training runs with several seeds are evaluated on the same prompts, both are resampled (`over_seeds_and_prompts`).
The unit that is drawn again is the prompt, never the episode: several samples of one prompt are averaged first,
because they share its difficulty and would make an interval too narrow.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np

from earl.statistics import seeds

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Bounds the memory of a large evaluation: indices drawn at once.
_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, in the unit of the values; ``n`` values were drawn from."""

    mean: float
    low: float
    high: float
    n: int


def mean_by_prompt(values: Iterable[tuple[Hashable, float | None]]) -> dict[Hashable, float]:
    """Average (prompt, value) pairs by prompt, in order of first appearance; None (unknown) values are left out."""
    grouped: dict[Hashable, list[float]] = {}
    for prompt, value in values:
        if value is not None:
            grouped.setdefault(prompt, []).append(value)
    return {prompt: fmean(found) for prompt, found in grouped.items()}


def bootstrap(values: Iterable[float], resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of ``values`` with its percentile bootstrap interval, or None when there are none.

    The interval spans the (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of the means of ``resamples``
    draws with replacement. Draws come from a generator keyed by (n, resamples) alone.
    """
    sample = np.fromiter(values, dtype=np.float64)
    if not len(sample):
        return None
    generator = seeds.generator("bootstrap", len(sample), resamples)
    means = np.concatenate(
        [
            sample[generator.integers(len(sample), size=(count, len(sample)))].mean(axis=1)
            for count in _portions(resamples, max(1, _DRAWS_AT_ONCE // len(sample)))
        ]
    )
    return _interval(sample, float(sample.mean()), means, confidence)


def expected_best(values: Sequence[float], count: int) -> float:
    """Expected largest of ``count`` of the values, drawn without putting back: 1 <= count <= len(values).

    Of n values in ascending order, the i-th (from 1) is the largest of a draw in C(i - 1, count - 1) of C(n, count)
    cases.
    """
    ordered = sorted(values)
    cases = [comb(place, count - 1) for place in range(len(ordered))]
    return sum(case * value for case, value in zip(cases, ordered, strict=True)) / comb(len(ordered), count)


def spread(values: Iterable[tuple[Hashable, float | None]]) -> dict[str, float | int] | None:
    """Mean over prompts of each prompt's mean, with its 95% interval; population std and number of the values.

    The mean is that over episodes wherever no judgement failed.

    Args:
        values: (prompt, value) pairs, one an episode; None: unknown, and left out. None is returned if all are.
    """
    pairs = list(values)
    known = [value for _, value in pairs if value is not None]
    interval = bootstrap(mean_by_prompt(pairs).values())
    if interval is None:
        return None
    return {
        "mean": interval.mean,
        "std": float(np.std(known)),
        "n": len(known),
        "low": interval.low,
        "high": interval.high,
    }


def best_of(values: Iterable[tuple[Hashable, float | None]]) -> dict[str, dict[str, float | int]]:
    """The best of k samples, by k = 1, 2, 4, ... and all; nothing where each prompt has one sample.

    For each prompt it is the expectation over k of its samples, drawn without putting back; a prompt with fewer known
    values than k is left out of that k.

    Args:
        values: (prompt, value) pairs, one an episode; None: unknown, since the judgement failed.
    """
    known: dict[Hashable, list[float]] = {}
    samples: Counter[Hashable] = Counter()
    for prompt, value in values:
        samples[prompt] += 1
        known.setdefault(prompt, []).extend([] if value is None else [value])
    most = max(samples.values(), default=1)
    sizes = sorted({2**power for power in range(most.bit_length())} | {most}) if most > 1 else []
    found = {}
    for size in sizes:
        interval = bootstrap(expected_best(each, size) for each in known.values() if len(each) >= size)
        if interval is not None:
            found[str(size)] = vars(interval)
    return found


def paired_bootstrap(before: Mapping[Hashable, float], after: Mapping[Hashable, float]) -> Interval | None:
    """Mean of after - before over the prompts that both hold, with its 95% interval; None when they share none.

    Pairing removes the spread between easy and hard prompts, which two separate intervals would carry.
    """
    return bootstrap(after[prompt] - before[prompt] for prompt in before if prompt in after)


def over_seeds_and_prompts(values: np.ndarray) -> Interval:
    """Mean of values [seeds, prompts] with its 95% interval over both: what another seed and other prompts would give.

    Each draw takes seeds and, independently, prompts, with replacement, the same prompts for all seeds: the
    hierarchical bootstrap of crossed factors (Owen 2007, "The pigeonhole bootstrap"). With few seeds it is narrower
    than it should be, as every bootstrap of a small sample.
    """
    return _interval(values, float(values.mean()), _crossed_means(values))


def ratio(over: np.ndarray, under: np.ndarray) -> Interval:
    """Ratio of the means of two arrays of values [seeds, prompts], paired, with its 95% interval over both.

    Where the mean below may be 0 the interval says nothing.
    """
    return _interval(over, float(over.mean() / under.mean()), _crossed_means(over) / _crossed_means(under))


def _crossed_means(values: np.ndarray) -> np.ndarray:
    """Means of draws of seeds and prompts, [RESAMPLES]; equal draws for arrays of equal shape."""
    generator = seeds.generator("crossed bootstrap", *values.shape, RESAMPLES)
    means = []
    for count in _portions(RESAMPLES, max(1, _DRAWS_AT_ONCE // values.shape[1])):
        by_prompt = values[generator.integers(values.shape[0], size=(count, values.shape[0]))].mean(axis=1)
        prompts = generator.integers(values.shape[1], size=(count, values.shape[1]))
        means.append(np.take_along_axis(by_prompt, prompts, axis=1).mean(axis=1))
    return np.concatenate(means)


def _interval(values: np.ndarray, mean: float, means: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), values.size)


def _portions(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
