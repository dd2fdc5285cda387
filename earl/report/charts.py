"""Small line charts as SVG text: no script, no font of their own, colours from the page's style sheet.

The page sets the colours by class, so that light, dark and print need no second drawing. Coordinates are rounded:
equal numbers give equal bytes.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from html import escape

# A screen shows no more; longer series are averaged in bins.
MOST_POINTS = 240
# Points are marked, and answer to the pointer, where there are few.
MOST_MARKS = 60
MINUS = "\N{MINUS SIGN}"
DIGITS = 3
"""Significant digits of a number."""
_LARGEST = Fraction(sys.float_info.max)
# Values that lie closer together, relative to their size, differ by rounding alone.
_RESOLUTION = Fraction(1, 10**9)
# Below it floats lose digits; an axis does not go into them.
_SMALLEST = Fraction(1, 10**300)


@dataclass(frozen=True)
class Line:
    """One line: values over iterations, optionally with a band.

    ``newest`` is the last value itself, where ``y`` has means of several; ``colour`` an index into the page's palette.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    newest: float
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    colour: int = 0


def line(label: str, points: Iterable[tuple], colour: int = 0) -> Line | None:
    """Make a line from (x, y) or (x, y, low, high). None where no point is left.

    Points are left out where a value is missing or not finite.
    """
    kept = [point for point in points if all(value is not None and math.isfinite(value) for value in point)]
    if not kept:
        return None
    x, y, *band = (list(values) for values in zip(*kept, strict=True))
    low, high = band or ((), ())
    return _thinned(Line(label, x, y, y[-1], low, high, colour))


def _thinned(full: Line) -> Line:
    size = math.ceil(len(full.x) / MOST_POINTS)
    if size == 1:
        return full

    def bins(values: Sequence[float]) -> list[float]:
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        return [_mean(part) for part in parts]

    return replace(full, **{name: bins(getattr(full, name)) for name in ("x", "y", "low", "high")})


def _mean(values: Sequence[float]) -> float:
    # Divided before they are added: the sum of the largest floats is not a float.
    mean = sum(value / len(values) for value in values)
    return max(min(values), min(max(values), mean))


def number(value: float, digits: int = DIGITS) -> str:
    """Return so many significant digits (of a whole number below 100,000 all), in the shortest form.

    The minus sign is a real one.
    """
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 5:
        return _without_zeros(f"{value:.{max(0, digits - 1 - int(exponent))}f}").replace("-", MINUS)
    return f"{_without_zeros(mantissa)}e{int(exponent)}".replace("-", MINUS)


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def labels(values: Sequence[float]) -> list[str]:
    """Return different values as text: `DIGITS` digits, or as many as tell them apart."""
    texts: list[str] = []
    for digits in range(DIGITS, 18):
        texts = [number(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round values (steps of 1, 2 or 5 times a power of ten) that enclose low..high; at least two.

    Values that differ by rounding alone, as machines round a constant differently, count as one: then the axis reaches
    a tenth of it further to both sides. Where a round value is larger than any float, the largest stands for it.
    """
    # Exact arithmetic: no step vanishes, overflows, or depends on how a processor rounds.
    bottom, top = Fraction(str(low)), Fraction(str(high))
    size = max(abs(bottom), abs(top))
    if size < _SMALLEST or top - bottom <= size * _RESOLUTION:
        reach = Fraction(1) if size < _SMALLEST else size / 10
        bottom, top = (max(-_LARGEST, bottom - reach) if bottom else bottom), min(_LARGEST, top + reach)
    finest = (top - bottom) / (most - 1)
    power = Fraction(10) ** (Decimal(finest.numerator) / Decimal(finest.denominator)).adjusted()
    for mantissa in (1, 2, 5, 10, 20):
        step = power * mantissa
        first, last = math.floor(bottom / step), math.ceil(top / step)
        if last - first < most:
            break
    return [float(max(-_LARGEST, min(_LARGEST, index * step))) for index in range(first, last + 1)]


def position(value: float, low: float, high: float) -> float:
    """Return where a value lies between ``low`` (0) and ``high`` (1); 0 where the two are equal."""
    if low == high:
        return 0.0
    # Divided first: the distance of the largest floats is not a float.
    size = max(abs(low), abs(high))
    return (value / size - low / size) / (high / size - low / size)


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing: ``left..right`` by ``top..bottom`` in pixels."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            round(self.left + position(x, *self.x) * (self.right - self.left), 1),
            round(self.bottom - position(y, *self.y) * (self.bottom - self.top), 1),
        )


def line_chart(
    title: str, lines: Sequence[Line], width: int = 360, height: int = 190, floor: float | None = None
) -> str:
    """Draw lines over iterations; ``floor`` is a value that the axis must reach down to."""
    values = [v for each in lines for v in (*each.y, *each.low, *each.high)] + ([] if floor is None else [floor])
    across = [v for each in lines for v in each.x]
    y_ticks = ticks(min(values), max(values), most=8 if height > 300 else 5)
    y_labels = labels(y_ticks)
    frame = _Frame(
        left=10 + 6.6 * max(map(len, y_labels)),
        right=width - 12,
        top=10,
        bottom=height - 24,
        x=(min(across), max(across)),
        y=(y_ticks[0], y_ticks[-1]),
    )
    parts = [*_y_axis(frame, y_ticks, y_labels), *_x_axis(frame)]
    for each in lines:
        parts += _drawn(frame, each)
    label = escape(_in_words(title, lines), quote=True)
    body = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}</svg>'


def _in_words(title: str, lines: Sequence[Line]) -> str:
    parts = [
        f"{each.label}: {number(each.y[0])} at iteration {each.x[0]:g}"
        + (f", {number(each.y[-1])} at iteration {each.x[-1]:g}" if len(each.x) > 1 else "")
        for each in lines
    ]
    return f"{title}. {'; '.join(parts)}."


def _y_axis(frame: _Frame, values: Sequence[float], texts: Sequence[str]) -> list[str]:
    parts = []
    for value, text in zip(values, texts, strict=True):
        _, y = frame.place(frame.x[0], value)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y}H{frame.right:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{frame.left - 6:.1f}" y="{y + 4:.1f}">{text}</text>')
    return parts


def _x_axis(frame: _Frame) -> list[str]:
    low, high = frame.x
    # Iterations are whole.
    between = [v for v in ticks(low, high, 6) if low < v < high and v == round(v)] if high > low else []
    room = (high - low) / 12
    chosen = sorted({low, high, *(v for v in between if v - low > room and high - v > room)})
    parts = []
    for value in chosen:
        x, _ = frame.place(value, frame.y[0])
        parts.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{frame.bottom + 17:.1f}">{value:g}</text>')
    return parts


def _drawn(frame: _Frame, each: Line) -> list[str]:
    points = [frame.place(x, y) for x, y in zip(each.x, each.y, strict=True)]
    parts = []
    if len(each.low) > 1:
        upper = [frame.place(x, y) for x, y in zip(each.x, each.high, strict=True)]
        lower = [frame.place(x, y) for x, y in zip(each.x, each.low, strict=True)]
        parts.append(f'<path class="band c{each.colour}" d="M{_path(upper + lower[::-1])}Z"/>')
    elif len(each.low) == 1:
        (x, high), (_, low) = frame.place(each.x[0], each.high[0]), frame.place(each.x[0], each.low[0])
        parts.append(f'<path class="line c{each.colour}" d="M{x} {low}V{high}"/>')
    if len(points) > 1:
        parts.append(f'<path class="line c{each.colour}" d="M{_path(points)}"/>')
    if len(points) <= MOST_MARKS:
        for (x, y), iteration, value in zip(points, each.x, each.y, strict=True):
            words = f"{escape(each.label)}, iteration {iteration:g}: {number(value)}"
            size = 2.6 if len(points) <= 12 else 1.8
            parts.append(
                f'<circle class="mark c{each.colour}" cx="{x}" cy="{y}" r="{size}"><title>{words}</title></circle>'
            )
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x} {y}" for x, y in points)


def interval_bar(mean: float, low: float, high: float, reach: float, width: int = 200, height: int = 18) -> str:
    """Draw a change with its interval around a zero line; ``reach`` is the value at both ends of the axis (0: 1)."""
    middle, reach = height / 2, reach or 1.0

    def place(value: float) -> float:
        return round(width / 2 + max(-1.0, min(1.0, value / reach)) * (width / 2 - 6), 1)

    # Three colours of meaning: better, worse, or not told apart from zero.
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    return (
        f'<svg class="interval {kind}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<path class="axis" d="M6 {middle}H{width - 6}"/><path class="zero" d="M{width / 2} 2V{height - 2}"/>'
        f'<path class="whisker" d="M{place(low)} {middle}H{place(high)}"/>'
        f'<circle cx="{place(mean)}" cy="{middle}" r="4"/></svg>'
    )
