"""Charts of any finite numbers: axes, labels and drawings, however the numbers were rounded."""

import itertools
import math
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from earl.report import charts, dots

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LARGEST = sys.float_info.max
"""Neighbouring floats as a plain sum of products and a fused one give them: two runs of one figure that is constant."""
NEIGHBOURS = (3.3029661, math.nextafter(3.3029661, 4.0))


def nearly_equal(values):
    """Pairs that differ in the last bits alone."""
    pairs = st.tuples(values, st.integers(0, 8)).map(lambda drawn: (drawn[0], drawn[0] + drawn[1] * math.ulp(drawn[0])))
    return pairs.filter(lambda pair: math.isfinite(pair[1]))


PAIRS = st.tuples(FINITE, FINITE).map(sorted) | nearly_equal(FINITE)
HARD = [
    NEIGHBOURS,
    (0.0, 0.0),
    (5e-324, 5e-324),
    (-5e-324, 5e-324),
    (1e-13, 2e-13),
    (-LARGEST, LARGEST),
    (LARGEST, LARGEST),
    (0.0, 5e-324),
]


def hard(function):
    for pair in HARD:
        function = example(pair)(function)
    return function


def coordinates(svg):
    """Every number in the attributes of a drawing."""
    found = re.findall(r' (?:d|x|y|cx|cy|r|viewBox)="([^"]*)"', svg)
    assert found
    return [float(number) for text in found for number in text.translate(SPLIT).split()]


SPLIT = str.maketrans("MLHVZ", "     ")


@given(PAIRS)
@hard
def test_ticks_of_any_numbers_rise_and_enclose_them(pair):
    low, high = pair
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 5
    assert all(map(math.isfinite, found))
    assert all(one < other for one, other in itertools.pairwise(found))
    assert found[0] <= low
    assert found[-1] >= high


@given(PAIRS)
@hard
def test_no_two_labels_of_an_axis_are_alike(pair):
    labels = charts.labels(charts.ticks(*pair))
    assert len(set(labels)) == len(labels)


@given(st.lists(FINITE, min_size=1, max_size=5) | PAIRS.map(list))
@example(list(NEIGHBOURS))
@example([LARGEST, -LARGEST])
def test_every_point_of_a_chart_lies_in_the_drawing(values):
    band = [(index, value, min(value, values[0]), max(value, values[0])) for index, value in enumerate(values)]
    drawn = charts.line_chart("any", [charts.line("values", band)], width=360, height=190)
    for number in coordinates(drawn):
        assert 0 <= number <= 360


@given(st.lists(FINITE, min_size=1, max_size=5) | PAIRS.map(list))
@example(list(NEIGHBOURS))
@example([LARGEST, -LARGEST])
def test_every_dot_lies_in_the_drawing(values):
    rows = [dots.Dot("run", value, min(values), max(values), values[0]) for value in values]
    for number in coordinates(dots.dot_chart("any", rows)):
        assert 0 <= number <= 520


@given(FINITE, FINITE, st.floats(0, allow_infinity=False))
@example(0.0, 0.0, 0.0)
@example(1.0, LARGEST, 5e-324)
def test_an_interval_of_any_numbers_lies_in_its_bar(low, high, reach):
    low, high = sorted((low, high))
    for number in coordinates(charts.interval_bar(low, low, high, reach)):
        assert 0 <= number <= 200


@given(FINITE)
@example(5e-324)
@example(-LARGEST)
@example(99999.7)
@example(9.9996e-8)
def test_a_number_is_told_to_three_digits(value):
    text = charts.number(value).replace(charts.MINUS, "-")
    assert len(text) <= len("-1.23e-324")
    if abs(value) > sys.float_info.min:
        assert float(text) == pytest.approx(value, rel=0.0051) or abs(value) > 1.79e308


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.9996e7, "1e8"), (0.00099996, "0.001"), (5e-324, "4.94e-324"), (99999.7, "1e5"), (0.99999, "1")],
)
def test_rounding_up_to_the_next_power_of_ten_by_hand(value, text):
    assert charts.number(value).replace(charts.MINUS, "-") == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (3.2, 4.4, [3, 3.5, 4, 4.5]),
        (0, 0, [0, 0.5, 1]),
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (1e-13, 3e-13, [1e-13, 1.5e-13, 2e-13, 2.5e-13, 3e-13]),
        (-1e-13, 2e-13, [-1e-13, 0, 1e-13, 2e-13]),
        (*NEIGHBOURS, [2.5, 3, 3.5, 4]),
        (-2, -2, [-2.2, -2.1, -2, -1.9, -1.8]),
    ],
)
def test_ticks_by_hand(low, high, expected):
    """Numbers that differ in their last bits alone are one number: the axis reaches a tenth of it to both sides."""
    assert charts.ticks(low, high) == expected


def test_labels_have_the_digits_that_tell_them_apart():
    assert charts.labels([4.849, 4.85, 4.851]) == ["4.849", "4.85", "4.851"]
    assert charts.labels([0, 0.5, 1]) == ["0", "0.5", "1"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out_like_a_missing_value(value):
    drawn = charts.line("gaps", [(1, 2.0), (2, value), (3, 4.0)])
    assert (drawn.x, drawn.y) == ([1, 3], [2.0, 4.0])
    assert charts.line("nothing", [(1, value)]) is None


def test_a_long_series_of_the_largest_numbers_is_averaged_without_overflow():
    drawn = charts.line("long", ((index, LARGEST) for index in range(3000)))
    assert all(map(math.isfinite, drawn.y))
