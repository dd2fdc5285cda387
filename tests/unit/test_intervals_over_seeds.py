"""Intervals over seeds and prompts, `earl.statistics.intervals`."""

import numpy as np
import pytest

from earl.statistics import intervals


def test_it_is_as_wide_as_both_spreads_are():
    # Means of draws are normal with variance (spread of seeds)^2 / seeds + (spread of prompts)^2 / prompts, where a
    # value is the sum of its seed's effect and its prompt's.
    of_seed, of_prompt = np.linspace(-1, 1, 40), np.linspace(-3, 3, 300)
    found = intervals.over_seeds_and_prompts(2 + of_seed[:, None] + of_prompt)
    half = 1.96 * (of_seed.var() / 40 + of_prompt.var() / 300) ** 0.5
    assert found.mean == pytest.approx(2)
    assert found.high - 2 == pytest.approx(half, rel=0.05)
    assert 2 - found.low == pytest.approx(half, rel=0.05)


def test_of_one_seed_it_is_an_interval_over_prompts():
    values = np.linspace(0, 1, 200) ** 2
    one, plain = intervals.over_seeds_and_prompts(values[None]), intervals.bootstrap(values)
    assert (one.mean, one.n) == (plain.mean, plain.n)
    assert one.low == pytest.approx(plain.low, abs=0.01)
    assert one.high == pytest.approx(plain.high, abs=0.01)


def test_a_ratio_is_paired():
    below = 1 + np.linspace(0, 1, 50) * np.linspace(1, 2, 4)[:, None]
    found = intervals.ratio(3 * below, below)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3, 3))
