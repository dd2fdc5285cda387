"""A chart of means with their intervals, one row each: SVG text, in the manner of `earl.report.charts`."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from earl.report import charts

ROW = 22
"""Pixels between rows."""
LETTER = 6.3
"""Pixels of a letter of a label, about."""


@dataclass(frozen=True)
class Dot:
    """One row. Without ``low`` and ``high`` it has no interval; ``other`` marks figures that are not ours.

    ``before`` is where it came from: a ring, from which a line leads to the mean.
    """

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    before: float | None = None
    other: bool = False


def dot_chart(title: str, dots: Sequence[Dot], width: int = 520) -> str:
    """Draw means with their intervals over one axis; rows stand in the order given."""
    values = [value for dot in dots for value in (dot.mean, dot.low, dot.high, dot.before) if value is not None]
    axis = charts.ticks(min(values), max(values), most=6)
    left = 12 + LETTER * max(len(dot.label) for dot in dots)
    height = ROW * len(dots) + 30

    def place(value: float) -> float:
        return round(left + charts.position(value, axis[0], axis[-1]) * (width - 16 - left), 1)

    parts = []
    for value, label in zip(axis, charts.labels(axis), strict=True):
        x = place(value)
        parts.append(f'<path class="grid" d="M{x} 4V{height - 24}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{height - 8}">{label}</text>')
    for row, dot in enumerate(dots):
        parts += _row(dot, 4 + ROW * (row + 0.5), left, place)
    words = "; ".join(f"{dot.label}: {charts.number(dot.mean)}" for dot in dots)
    told = escape(f"{title}. {words}.", quote=True)
    return (
        f'<svg class="chart dots" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">{"".join(parts)}</svg>'
    )


def _row(dot: Dot, y: float, left: float, place) -> list[str]:
    colour = "c5" if dot.other else "c0"
    words = f"{escape(dot.label)}: {charts.number(dot.mean)}"
    parts = [f'<text class="tick" text-anchor="end" x="{left - 8:.1f}" y="{y + 4:.1f}">{escape(dot.label)}</text>']
    if dot.low is not None and dot.high is not None:
        words += f" [{charts.number(dot.low)}, {charts.number(dot.high)}]"
        parts.append(f'<path class="line {colour}" d="M{place(dot.low)} {y:.1f}H{place(dot.high)}"/>')
    if dot.before is not None:
        words += f", before {charts.number(dot.before)}"
        parts.append(f'<path class="way" d="M{place(dot.before)} {y:.1f}H{place(dot.mean)}"/>')
        parts.append(f'<circle class="ring c5" cx="{place(dot.before)}" cy="{y:.1f}" r="3.5"/>')
    shape = "ring" if dot.other else "mark"
    parts.append(
        f'<circle class="{shape} {colour}" cx="{place(dot.mean)}" cy="{y:.1f}" r="4"><title>{words}</title></circle>'
    )
    return parts
