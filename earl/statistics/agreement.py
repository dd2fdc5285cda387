"""How far two judges agree on the same episodes: correlations, shifts, and the order within groups.

Pure numbers, no files. What is undefined (a constant score, nothing to compare) is None, never 0.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Bounds the memory of Kendall's tau: pairs compared at once.
_PAIRS_AT_ONCE = 20_000_000


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Linear correlation; None where one is constant."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None where one is constant."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b (Kendall 1945): pairs ordered alike less pairs ordered otherwise, with ties accounted for."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    surplus = untied_x = untied_y = 0
    rows = max(1, _PAIRS_AT_ONCE // max(1, len(x)))
    for start in range(0, len(x), rows):
        order_x, order_y = (np.sign(values[start : start + rows, None] - values).astype(np.int8) for values in (x, y))
        surplus += int((order_x * order_y).sum(dtype=np.int64))
        untied_x += int(np.count_nonzero(order_x))
        untied_y += int(np.count_nonzero(order_y))
    return surplus / float(np.sqrt(untied_x) * np.sqrt(untied_y)) if untied_x and untied_y else None


@dataclass(frozen=True)
class PairOrder:
    """Pairs of episodes of one group, by how two judges order them."""

    alike: int
    opposite: int
    tied_before: int
    """Equal for the first judge alone."""
    tied_after: int
    tied_both: int

    @property
    def share(self) -> float | None:
        """Share of pairs ordered alike among those that both judges order; None where there are none."""
        ordered = self.alike + self.opposite
        return self.alike / ordered if ordered else None


def pair_order(groups: Iterable[Hashable], before: Sequence[float], after: Sequence[float]) -> PairOrder:
    """Count the pairs within each group: what a learner that compares within groups sees of a judge."""
    members: dict[Hashable, list[tuple[float, float]]] = {}
    for group, *pair in zip(groups, before, after, strict=True):
        members.setdefault(group, []).append(tuple(pair))
    counts = dict.fromkeys(("alike", "opposite", "tied_before", "tied_after", "tied_both"), 0)
    for group in members.values():
        for one, other in itertools.combinations(group, 2):
            counts[_order(one[0] - other[0], one[1] - other[1])] += 1
    return PairOrder(**counts)


def _order(before: float, after: float) -> str:
    if before == 0 or after == 0:
        return "tied_both" if before == after else "tied_before" if before == 0 else "tied_after"
    return "alike" if (before > 0) == (after > 0) else "opposite"


def measure(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """Return the agreement on some episodes.

    Args:
        rows: One mapping an episode: ``group``, and ``before`` and ``after``, what each judge gave: ``status`` and the
            measures, None where it gave none.
        measures: Names of the scores to compare.

    Returns:
        Numbers of episodes and failures, and for each measure that both gave on some episode the correlations, means,
        the mean of after - before, and the order of pairs.
    """
    statuses = [(row["before"]["status"], row["after"]["status"]) for row in rows]
    return {
        "episodes": len(rows),
        "judged_by_both": statuses.count(("ok", "ok")),
        "failed_before": sum(before == "failed" != after for before, after in statuses),
        "failed_after": sum(after == "failed" != before for before, after in statuses),
        "failed_both": statuses.count(("failed", "failed")),
        "measures": {name: found for name in measures if (found := _measure(rows, name))},
    }


def _measure(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    known = [
        (row["group"], row["before"][name], row["after"][name])
        for row in rows
        if row["before"][name] is not None and row["after"][name] is not None
    ]
    if not known:
        return None
    groups, before, after = zip(*known, strict=True)
    order = pair_order(groups, before, after)
    return {
        "n": len(known),
        "pearson": pearson(before, after),
        "spearman": spearman(before, after),
        "kendall": kendall(before, after),
        "mean_before": float(np.mean(before)),
        "mean_after": float(np.mean(after)),
        "mean_difference": float(np.mean(after) - np.mean(before)),
        "ordered_alike": order.share,
        "pairs": vars(order),
    }
