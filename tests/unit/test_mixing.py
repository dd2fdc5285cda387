"""Mixtures worked out by hand, and draws that depend on (seed, iteration) alone."""

import subprocess
import sys
from collections import Counter

import pytest

from earl.data import mixing
from earl.messages.errors import EarlError


def counts(mixture: mixing.Mixture) -> list[Counter]:
    """Return how often each row of each data set stands in a mixture."""
    found = [Counter() for _ in mixture.parts]
    for index in range(len(mixture)):
        dataset, row = mixture[index]
        found[dataset][row] += 1
    return found


def test_a_coefficient_of_one_takes_every_row_once() -> None:
    mixture = mixing.mixture([3, 2], [1, 1.0], seed=0)
    assert [mixture[i] for i in range(len(mixture))] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_above_one_repeats_and_adds_a_random_fraction() -> None:
    (rows,) = counts(mixing.mixture([10], [2.3], seed=0))
    # 10 rows twice, and 3 of them a third time.
    assert sorted(rows.values()) == [2] * 7 + [3] * 3
    assert set(rows) == set(range(10))


def test_below_one_takes_a_random_fraction() -> None:
    (rows,) = counts(mixing.mixture([200], [0.13], seed=0))
    assert len(rows) == 26
    assert set(rows.values()) == {1}
    (others,) = counts(mixing.mixture([200], [0.13], seed=1))
    assert set(rows) != set(others)


def test_the_papers_coefficients_mean_their_decimals() -> None:
    mixture = mixing.mixture([1000, 20, 20, 50, 20, 10, 3], [0.13, 6, 6, 0.7, 1.55, 3.7, 11], seed=42)
    # 3.7 x 10 is 37, though the float 3.7 lies off it; 1.55 x 20 = 31.
    assert [len(part) for part in mixture.parts] == [130, 120, 120, 35, 31, 37, 33]
    assert len(mixture) == 506


def test_an_empty_list_upsamples_all_to_the_largest() -> None:
    rows = counts(mixing.mixture([7, 3, 1], [], seed=0))
    assert [sum(row.values()) for row in rows] == [7, 7, 7]
    assert sorted(rows[1].values()) == [2, 2, 3]
    assert rows[2] == {0: 7}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100])
def test_permuted_is_a_permutation(size: int) -> None:
    assert sorted(mixing.permuted(i, size, "key") for i in range(size)) == list(range(size))


def test_permutations_are_about_uniform() -> None:
    orders = Counter(tuple(mixing.permuted(i, 3, key) for i in range(3)) for key in range(1200))
    # 200 of each are expected, with a standard deviation of 13.
    assert len(orders) == 6
    assert all(130 < count < 270 for count in orders.values())


def test_prompts_of_an_iteration_are_distinct_though_rows_repeat() -> None:
    mixture = mixing.mixture([4, 4], [6, 1], seed=0)
    drawn = mixing.prompts(mixture, seed=1, iteration=3, count=8)
    assert sorted(drawn) == [(d, r) for d in range(2) for r in range(4)]


def test_prompts_depend_on_seed_and_iteration_alone() -> None:
    mixture = mixing.mixture([1000], [1], seed=0)
    first = mixing.prompts(mixture, seed=1, iteration=5, count=16)
    for iteration in range(5):
        mixing.prompts(mixture, seed=1, iteration=iteration, count=16)
    assert mixing.prompts(mixture, seed=1, iteration=5, count=16) == first
    assert mixing.prompts(mixture, seed=1, iteration=6, count=16) != first
    assert mixing.prompts(mixture, seed=2, iteration=5, count=16) != first
    code = "from earl.data.mixing import *; print(prompts(mixture([1000], [1], 0), 1, 5, 16))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(first)


def test_fewer_prompts_are_the_front_of_more() -> None:
    mixture = mixing.mixture([50], [1], seed=0)
    assert mixing.prompts(mixture, 0, 1, 20)[:5] == mixing.prompts(mixture, 0, 1, 5)


def test_data_sets_are_drawn_by_their_share() -> None:
    mixture = mixing.mixture([1000, 1000], [3, 1], seed=0)
    drawn = Counter(d for i in range(100) for d, _ in mixing.prompts(mixture, 0, i, 16))
    # 1,200 of 1,600 are expected, with a standard deviation of 17.
    assert 1120 < drawn[0] < 1280


def test_millions_of_rows_are_not_held() -> None:
    mixture = mixing.mixture([10**9, 10**8], [0.5, 6], seed=0)
    assert len(mixture) == 11 * 10**8
    drawn = mixing.prompts(mixture, 0, 1, 64)
    assert len(set(drawn)) == 64
    assert all(0 <= row < (10**9, 10**8)[dataset] for dataset, row in drawn)


@pytest.mark.parametrize(
    ("sizes", "coefficients", "part"),
    [
        ([3, 0], [1, 1], "data set 1"),
        ([3, 3], [1], "1 coefficients for 2 data sets"),
        ([3], [0], "positive"),
        ([3], [-1], "positive"),
        ([3], [float("nan")], "positive"),
        ([3], [0.1], "no row"),
        ([], [], "no data set"),
    ],
)
def test_mistakes_are_named(sizes: list[int], coefficients: list[float], part: str) -> None:
    with pytest.raises(EarlError, match=part):
        mixing.mixture(sizes, coefficients, seed=0)


def test_more_prompts_than_rows_is_an_error() -> None:
    # Half of ten rows is five, and repeats do not count.
    mixture = mixing.mixture([10, 3], [0.5, 4], seed=0)
    assert len(mixing.prompts(mixture, 0, 1, 8)) == 8
    with pytest.raises(EarlError, match="8 different rows, but 9 prompts"):
        mixing.prompts(mixture, 0, 1, 9)
