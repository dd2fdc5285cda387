"""Rewards from scores: formulas by hand, and what is never made up."""

import math

import pytest

from earl.messages.errors import EarlError
from earl.statistics import rewards

SCORES = {"edit_success": 6.0, "overedit": 4.0, "naturalness": 9.0, "artifacts": 10.0, "ground_score": 5.0}


def _episode(**changes):
    return {"finish_reason": "stop", "status": "ok", **SCORES, **changes}


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("viescore", math.sqrt(4 * 9)),
        ("ground_score", 5.0),
        ("sqrt(viescore_pqxground_score)", math.sqrt(9 * 5)),
    ],
)
def test_the_three_rewards_by_hand(which, expected):
    assert rewards.episode_reward(_episode(), which) == pytest.approx(expected)


@pytest.mark.parametrize("name", rewards.SUB_SCORES)
def test_one_zero_sub_score_makes_viescore_zero(name):
    assert rewards.episode_reward(_episode(**{name: 0.0}), "viescore") == 0.0


@pytest.mark.parametrize("changes", [{"finish_reason": "length"}, {"status": "no_image"}])
@pytest.mark.parametrize("which", rewards.FINAL_REWARDS)
def test_no_finished_image_earns_zero(changes, which):
    assert rewards.episode_reward(_episode(**changes), which) == 0.0


def test_zero_for_no_image_needs_no_scores():
    scores = dict.fromkeys(SCORES)
    assert rewards.episode_reward({"finish_reason": "stop", "status": "no_image", **scores}, "viescore") == 0.0


def test_a_failed_judgement_has_no_reward_unless_the_policy_failed_first():
    scores = dict.fromkeys(SCORES)
    assert rewards.episode_reward({"finish_reason": "stop", "status": "failed", **scores}, "viescore") is None
    assert rewards.episode_reward({"finish_reason": "length", "status": "failed", **scores}, "viescore") == 0.0


@pytest.mark.parametrize("value", [None, math.nan, -0.1, 10.5])
def test_a_score_that_is_no_score_is_refused(value):
    with pytest.raises(EarlError, match="overedit"):
        rewards.episode_reward(_episode(overedit=value), "viescore")


def test_a_score_that_is_not_needed_may_be_missing():
    assert rewards.episode_reward(_episode(ground_score=None), "viescore") == pytest.approx(6.0)
    with pytest.raises(EarlError, match="ground_score"):
        rewards.episode_reward(_episode(ground_score=None), "ground_score")


def test_an_unknown_reward_names_the_known_ones():
    with pytest.raises(EarlError, match="viescore"):
        rewards.final_reward(SCORES, "vie")


def test_failed_fraction_at_and_above_the_limit():
    assert rewards.check_failed_fraction(1, 20, 0.05, "somewhere") == 0.05
    with pytest.raises(EarlError, match=r"somewhere.*2 of 20.*10\.0%.*0\.05"):
        rewards.check_failed_fraction(2, 20, 0.05, "somewhere")
