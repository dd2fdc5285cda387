"""Dynamic sampling: which prompts a round has, which groups count and which are trained, with numbers by hand."""

import re
from pathlib import Path

import pytest

from earl.config import load
from earl.config.schema import Config
from earl.learner import episodes
from earl.messages.errors import EarlError
from earl.stages import generate, rounds
from tests.support.experiments import error_of, experiment

SCORES = ("edit_success", "overedit", "naturalness", "artifacts")
FAILED = None


def configured(wanted: int = 2, **fields: object) -> Config:
    """Three prompts at first, then two at a time, two completions of each."""
    sampling = {"usable_groups": wanted, "max_rounds": 2, "prompts_per_round": 2}
    values = {"run_name": "a", "base_exp_dir": "runs", "train_paths_file": ["x"], "val_paths_file": []}
    values |= {"episodes_per_iteration": 6, "generations_per_sample": 2, "judge": "program", "max_failed_fraction": 0.5}
    return Config(**(values | {"dynamic_sampling": sampling, "zero_variance_groups": "mask"} | fields))


def outcomes(config: Config, *groups: tuple[float | None, ...]) -> list[episodes.Outcome]:
    """Outcomes of groups by the VIEScores of their episodes."""
    return episodes.reward_all(episodes.Source(rows(*groups), [], [], None), config, "iteration")


def rows(*groups: tuple[float | None, ...]) -> list[dict]:
    return [row(group, sample, score) for group, scores in enumerate(groups) for sample, score in enumerate(scores)]


def row(group: int, sample: int, score: float | None, **changes: object) -> dict:
    return {
        "episode_id": f"000001-{group:04d}-{sample:02d}",
        "group_id": f"000001-{group:04d}",
        "prompt_token_ids": [1],
        "completion_token_ids": [1, 2],
        "completion_text": "",
        "finish_reason": "stop",
        "status": "failed" if score is FAILED else "ok",
        **dict.fromkeys((*SCORES, "ground_score"), score),
        **changes,
    }


def trained(found: list[episodes.Outcome]) -> list[int]:
    return sorted({int(each.row["group_id"][-4:]) for each in found if each.used})


# Which prompts a round has


def test_the_prompts_of_rounds_follow_one_another():
    config = configured()
    assert [config.prompts_of_round(number) for number in range(config.rounds)] == [range(3), range(3, 5), range(5, 7)]
    assert (config.most_prompts, config.most_episodes, config.most_trained_groups) == (7, 14, 2)
    as_many = configured(dynamic_sampling={"usable_groups": 2, "max_rounds": 1})
    assert [as_many.prompts_of_round(number) for number in (0, 1)] == [range(3), range(3, 6)]
    plain = configured(dynamic_sampling=None)
    assert (plain.rounds, plain.most_prompts, plain.rollout_files, plain.most_trained_groups) == (1, 3, 1, 3)


@pytest.mark.parametrize(
    ("shards", "parts"),
    [
        (1, [range(3), range(3, 5), range(5, 7)]),
        (2, [range(1), range(1, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7)]),
        (3, [*(range(i, i + 1) for i in range(3)), range(3, 3), range(3, 4), range(4, 5), range(5, 5), range(5, 6)]),
    ],
)
def test_each_round_is_cut_into_as_many_shards(shards, parts):
    """A round with fewer prompts than shards leaves some of them empty."""
    config = configured(rollout_shards=shards)
    found = [generate.shard_of(config, shard) for shard in range(config.rollout_files)]
    assert config.rollout_files == 3 * shards
    assert found[: len(parts)] == parts
    assert [index for part in found for index in part] == list(range(7))
    assert config.in_files(len(found)).rollout_shards == shards
    with pytest.raises(EarlError, match=f"shard {len(found)} does not exist"):
        generate.shard_of(config, len(found))


def test_a_round_that_is_not_needed_has_no_prompts():
    config = configured()
    enough, few = (rounds.Earlier(usable, 2, ["a"]) for usable in (2, 1))
    assert (generate.wanted(config, 1, enough), generate.wanted(config, 1, few)) == (range(0), range(3, 5))
    assert generate.wanted(config, 0) == range(3)


def test_how_many_episodes_and_rounds_there_may_be():
    config = configured()
    assert [list(rounds.counts(config, number)) for number in (1, 2, 3)] == [[6], [6, 10], [6, 10, 14]]
    assert [rounds.sampled(config, groups) for groups in (3, 5, 7)] == [1, 2, 3]
    assert rounds.sampled(configured(dynamic_sampling=None), 3) == 1


# Which groups are trained


def test_the_first_usable_groups_are_trained_in_the_order_of_prompts():
    """Group 0 is equal, of group 2 one episode is judged; 1, 3 and 4 differ, 4 after enough of them."""
    found = outcomes(configured(), (5, 5), (4, 6), (3, FAILED), (0, 9), (1, 2))
    assert trained(found) == [1, 3]
    equal, surplus = "the rewards of its group are all equal", "enough groups before it are usable"
    reasons = [equal, equal, None, None, equal, "judgement failed", None, None, surplus, surplus]
    assert [each.reason for each in found] == reasons
    assert [each.reward for each in found[8:]] == [1.0, 2.0]
    assert [each.advantage for each in found[8:]] == [None, None]
    assert [each.advantage for each in found if each.used] == pytest.approx([-1, 1, -1, 1], abs=1e-3)
    metrics = episodes.metrics(found)
    counted = ("groups", "usable_groups", "trained_groups", "used_episodes", "surplus_episodes", "completion_tokens")
    assert [metrics[name] for name in counted] == [5, 3, 2, 4, 2, 8]
    assert metrics["zero_std_fraction"] == 2 / 5
    assert metrics["reward_mean"] == pytest.approx((5 + 5 + 4 + 6 + 3 + 0 + 9 + 1 + 2) / 9), "of all that were sampled"
    assert episodes.warnings(found, 2) == []


def test_where_too_few_are_usable_those_are_trained_with_a_warning():
    found = outcomes(configured(3), (5, 5), (4, 6), (3, 3))
    assert trained(found) == [1]
    (warning,) = episodes.warnings(found, 3)
    assert warning == "after all rounds, fewer than the 3 groups of dynamic_sampling.usable_groups are usable"
    nothing = outcomes(configured(3), (5, 5), (3, 3))
    assert trained(nothing) == []
    assert episodes.warnings(nothing, 3) == ["no group's rewards differ, so no episode has an advantage"]


def test_all_groups_are_trained_without_it():
    found = outcomes(configured(dynamic_sampling=None, zero_variance_groups="keep"), (5, 5), (4, 6), (0, 9), (1, 2))
    assert trained(found) == [0, 1, 2, 3]
    metrics = episodes.metrics(found)
    assert [metrics[name] for name in ("groups", "usable_groups", "trained_groups")] == [4, 3, 4]


def test_a_group_counts_where_a_component_of_its_rewards_differs():
    """sqrt(4 * 9) = sqrt(9 * 4): rewards of 6 by other ways."""
    other = {"edit_success": 9.0, "overedit": 9.0, "naturalness": 4.0, "artifacts": 4.0}
    this = {"edit_success": 4.0, "overedit": 4.0, "naturalness": 9.0, "artifacts": 9.0}
    alike = [row(0, 0, 6.0, **this), row(0, 1, 6.0, **other)]
    source = episodes.Source([*alike, *rows((), (1, 1))], [], [], None)
    components = {"semantic_consistency": 1.0, "perceptual_quality": 1.0}
    names = [
        episodes.usable_groups(episodes.judged(source, config, "iteration"))
        for config in (configured(), configured(advantage_components=components))
    ]
    assert names == [[], ["000001-0000"]]


def test_nothing_that_can_be_used_is_no_usable_group():
    """Two failed judgements, two completions that are too long; what the judge may fail on is looked at first."""
    config = configured(max_completion_len=1)
    source = episodes.Source(rows((FAILED, FAILED), (1, 2)), [], [], None)
    assert episodes.usable_groups(episodes.judged(source, config, "iteration")) == []
    strict = configured(max_failed_fraction=0.4)
    with pytest.raises(EarlError, match="failed on 2 of 4 episodes"):
        episodes.judged(source, strict, "iteration")


def test_the_order_of_prompts_is_that_of_their_numbers():
    found = [episodes.Outcome(row(group, i, 1.0), float(i), None) for group in (10000, 9999) for i in (0, 1)]
    assert episodes.usable_groups(found) == ["000001-9999", "000001-10000"]


# What makes no sense

SAMPLING = {"usable_groups": 16, "max_rounds": 1}
MASK = {"zero_variance_groups": "mask"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic_sampling": SAMPLING}, "zero_variance_groups is `keep`, but dynamic_sampling .*set it to `mask`"),
        (
            MASK | {"dynamic_sampling": {"usable_groups": 33, "max_rounds": 1}},
            "dynamic_sampling.usable_groups is 33, but an iteration has at most 32 groups; lower it, or raise max_rou",
        ),
        (
            MASK | {"dynamic_sampling": {"usable_groups": 20, "max_rounds": 3, "prompts_per_round": 1}},
            "usable_groups is 20, but an iteration has at most 19 groups",
        ),
        (
            MASK
            | {"dynamic_sampling": {"usable_groups": 4, "max_rounds": 1}}
            | {"optimizer_steps_per_iteration": 5, "importance_ratio": "behavior"},
            "optimizer_steps_per_iteration is 5, but an iteration is trained on only 4 groups; lower it",
        ),
        ({"dynamic_sampling": {"usable_groups": 4}}, "dynamic_sampling.max_rounds is missing"),
        ({"dynamic_sampling": {"usable_groups": 0, "max_rounds": 1}}, "dynamic_sampling.usable_groups is 0"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, fields, message):
    assert re.search(message, error_of(experiment(tmp_path, **fields)))


def test_what_goes_together_is_accepted(tmp_path: Path):
    assert load.load(experiment(tmp_path, **MASK, dynamic_sampling=SAMPLING)).config.rounds == 2
