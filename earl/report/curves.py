"""Training of several runs side by side: figures of metrics.json by iteration, as a table for terminals and as charts.

A replay has no rewards of its own from the iteration on in which it trains on other policies' episodes, and shows none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earl.files import objects
from earl.files.layout import Run
from earl.report import charts
from earl.run import replays

MEASURES = {
    "reward_mean": ("Training reward", "mean over the iteration's episodes"),
    "loss": ("Loss", "its gradient teaches, its value says little"),
    "kl": ("KL to the reference", "nats per token, k3 estimate"),
    "entropy": ("Entropy", "nats per token"),
    "gradient_norm": ("Gradient norm", "before clipping at 1"),
    "gradient_cosine": ("Gradient signal", "cosine of the gradients of two halves of a step; near 0: mostly noise"),
    "logprob_mismatch_mean": ("Log-prob mismatch", "between policy and sampler, nats per token"),
    "effective_sample_size": ("Effective sample size", "of the importance ratios; 1 where policy and sampler agree"),
    "corrected_fraction": ("Corrected tokens", "fraction truncated or left out by sampler_correction"),
}
MOST_ROWS = 25
"""Iterations that the table for terminals shows, at most; the charts have all."""


@dataclass(frozen=True)
class Curves:
    """The metrics of one run by iteration."""

    label: str
    metrics: list[dict[str, Any]]

    def values(self, measure: str) -> dict[int, float]:
        """Return the known values of a measure by iteration."""
        known = {row["iteration"]: replays.own(row).get(measure) for row in self.metrics}
        return {index: value for index, value in known.items() if value is not None}

    def until(self, last: int) -> "Curves":
        """Return the iterations up to ``last``."""
        return Curves(self.label, [row for row in self.metrics if row["iteration"] <= last])


def read(run: Path, label: str) -> Curves:
    """Read the metrics of a run.

    Raises:
        EarlError: a file is damaged.
    """
    rows = []
    for path in sorted(Run(run).path.glob("iterations/*/train/metrics.json")):
        rows.append(objects.read(path))
    return Curves(label, rows)


def shown(curves: Sequence[Curves]) -> list[str]:
    """Return the measures that any of the runs has."""
    return [measure for measure in MEASURES if any(each.values(measure) for each in curves)]


def table(curves: Sequence[Curves]) -> str:
    """Return the figures by iteration for a terminal: the runs as A, B, ... side by side under each measure."""
    letters = [chr(ord("A") + place) for place in range(len(curves))]
    measures = shown(curves)
    if not measures:
        return "no iteration has been trained"
    found = {(measure, place): each.values(measure) for measure in measures for place, each in enumerate(curves)}
    indices = sorted({index for values in found.values() for index in values})
    columns = [(measure, place) for measure in measures for place in range(len(curves))]
    rows = [
        ["", *(measure if place == 0 else "" for measure, place in columns)],
        ["iteration", *(letters[place] for _, place in columns)],
        *([str(index), *(_cell(found[column].get(index)) for column in columns)] for index in _thinned(indices)),
    ]
    legend = [f"{letter}  {each.label}" for letter, each in zip(letters, curves, strict=True)]
    return "\n".join([*legend, *_aligned(rows, len(curves))])


def _thinned(indices: Sequence[int]) -> list[int]:
    """At most `MOST_ROWS` of the iterations, evenly, the first and the last among them."""
    if len(indices) <= MOST_ROWS:
        return list(indices)
    return [indices[round(row * (len(indices) - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS)]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(rows: list[list[str]], runs: int) -> list[str]:
    """Align columns on the right; the name of a measure may reach over the columns of its runs."""
    names, *rest = rows
    widths = [max(len(row[column]) for row in rest) for column in range(len(rest[0]))]
    for first in range(1, len(names), runs):
        missing = len(names[first]) - sum(widths[first : first + runs]) - 2 * (runs - 1)
        widths[first + runs - 1] += max(0, missing)
    head = " " * widths[0]
    for first in range(1, len(names), runs):
        head += "  " + names[first].rjust(sum(widths[first : first + runs]) + 2 * (runs - 1))
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rest]
    return [head, *lines]


def drawn(curves: Sequence[Curves], palette: int) -> list[dict[str, Any]]:
    """Return one chart a measure: title, note, lines in the order of the runs."""
    found = []
    for measure in shown(curves):
        lines = [
            charts.line(each.label, sorted(each.values(measure).items()), place % palette)
            for place, each in enumerate(curves)
        ]
        title, note = MEASURES[measure]
        found.append({"title": title, "note": note, "lines": [line for line in lines if line]})
    return found
