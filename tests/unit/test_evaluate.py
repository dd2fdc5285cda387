"""Evaluate joins rollouts and scores, adds rewards and sums them up; intervals come from a bootstrap over prompts."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earl.config import load, paths
from earl.data.grids import stored
from earl.files import evaluations, images, manifest, tables
from earl.messages.errors import EarlError
from earl.stages import evaluate, generate
from earl.statistics import intervals
from tests.support.evaluation_files import demo_config, episode, write_inputs

NAME = "heldout_greedy"
EPISODES = [
    episode(0, (4.0, 9.0, 9.0, 10.0)),  # sqrt(min(4, 9) * min(9, 10)) = 6
    episode(0, (8.0, 8.0, 8.0, 8.0), sample=1, finish_reason="length"),  # cut off: 0
    episode(1, None, status="no_image", edited=None, task="swap"),  # nothing to see: 0
    episode(2, None, status="failed", task="swap"),  # the judge's fault: unknown
]


@pytest.fixture(scope="module")
def config():
    return demo_config()


@pytest.mark.parametrize("same", [True, False])
def test_two_prompts_of_one_name_are_refused_before_anything_is_sampled(tmp_path, same):
    """A row twice is one prompt; two instructions under one example_id could not be told apart across policies."""
    columns = {name: [None] * 2 for name in tables.TOKENISED.names} | {
        "dataset": ["d"] * 2,
        "example_id": ["17"] * 2,
        "instruction": ["remove the cat", "remove the cat" if same else "remove the dog"],
        "original_tokens": [stored(np.zeros((1, 1), int), 256)] * 2,
    }
    tables.write_table(tmp_path / "0000.parquet", tables.TOKENISED, columns, {"dataset": "d"}, rows_per_group=32)
    manifest.seal(tmp_path)
    # Without room for a prompt, sampling ends where it would begin.
    fields = {f"evaluations.{NAME}.paths_file": [str(tmp_path)], f"evaluations.{NAME}.prompts": 2, "max_prompt_len": 1}
    config = load.load("config/demo.jsonnet", fields).config
    policy = paths.resolve(config, "package:shapes/base_policy")
    expected = "the prompt has" if same else "two prompts of dataset 'd' have the example_id '17'; name a column"
    with pytest.raises(EarlError, match=expected):
        generate.run_evaluation(config, NAME, 0, generate.Sampler.load(config, policy), tmp_path / "out.parquet")


def run(folder, episodes, config, reverse=False):
    rollouts, scores = write_inputs(folder, 5, episodes, reverse)
    out = folder / "000005.parquet"
    evaluate.run(config, NAME, 5, rollouts, scores, out)
    return tables.read_table(out, evaluations.EVALUATION).to_pylist(), json.loads((folder / "000005.json").read_text())


def test_rewards_by_hand(tmp_path, config):
    rows, _ = run(tmp_path, EPISODES, config)
    assert [row["reward"] for row in rows] == [6.0, 0.0, 0.0, None]
    assert [row["viescore"] for row in rows] == [6.0, 0.0, 0.0, None]


def test_summary_by_hand(tmp_path, config):
    _, summary = run(tmp_path, EPISODES, config)
    assert (summary["n"], summary["prompts"], summary["failed"], summary["no_image"]) == (4, 3, 1, 1)
    assert summary["reward"]["n"] == 3
    assert summary["reward"]["mean"] == pytest.approx(1.5)  # of a prompt with 3 on average and one with 0
    assert summary["reward"]["std"] == pytest.approx(math.sqrt((16 + 4 + 4) / 3))
    assert summary["edit_success"]["mean"] == pytest.approx(6.0)  # (4 + 8) / 2: only images that were judged
    assert summary["ground_score"] is None
    assert summary["finish_reason"] == {"length": 0.25, "stop": 0.75}
    assert summary["completion_tokens"] == {"mean": 2.0, "max": 2}
    assert summary["tasks"]["add"]["reward"]["mean"] == pytest.approx(3.0)
    assert summary["tasks"]["swap"]["reward"]["mean"] == 0.0
    assert (summary["iteration"], summary["temperature"], summary["policy_digest"]) == (5, 0.1, "ab12")


def test_the_interval_of_the_mean_draws_prompts_not_episodes(tmp_path, config):
    """Eight samples of one prompt tell nothing of other prompts, so the interval has no width."""
    _, summary = run(tmp_path, [episode(0, float(score), sample=score) for score in range(8)], config)
    assert summary["reward"]["low"] == summary["reward"]["high"] == summary["reward"]["mean"] == 3.5


def test_images_stay_in_the_rollouts(tmp_path, config):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    picture = images.struct(images.encode(noise))
    run(tmp_path, [row | {"original": picture, "target": picture} for row in EPISODES], config)
    names = pq.read_schema(tmp_path / "000005.parquet").names
    assert names == evaluations.EVALUATION.names
    assert {"original", "target", "edited"} == set(tables.ROLLOUTS.names) - set(names)
    table, rollouts = (tmp_path / f"000005{suffix}.parquet" for suffix in ("", ".rollouts"))
    assert rollouts.stat().st_size > len(picture["bytes"]) > table.stat().st_size


def test_scores_join_by_episode_not_by_place(tmp_path, config):
    straight, _ = run(tmp_path / "a", EPISODES, config)
    backwards, _ = run(tmp_path / "b", EPISODES, config, reverse=True)
    assert straight == backwards


def test_equal_inputs_give_equal_bytes(tmp_path, config):
    for folder in ("a", "b"):
        run(tmp_path / folder, EPISODES, config)
    for name in ("000005.parquet", "000005.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_viescore_is_unknown_where_the_judge_gave_the_ground_score_alone(tmp_path):
    config = demo_config(
        reward_compute_viescore=False, reward_compute_ground_score=True, reward_final_reward="ground_score"
    )
    rows, _ = run(tmp_path, [episode(0, None, ground_score=7.0)], config)
    assert (rows[0]["reward"], rows[0]["viescore"]) == (7.0, None)


def test_scores_of_other_rollouts_are_refused(tmp_path, config):
    write_inputs(tmp_path, 5, EPISODES)
    scores = (tmp_path / "000005.scores.parquet").read_bytes()
    rollouts, path = write_inputs(tmp_path, 5, [row | {"instruction": "another"} for row in EPISODES])
    path.write_bytes(scores)
    with pytest.raises(EarlError, match=r"000005\.scores\.parquet: rollouts_digest .* run the score stage again"):
        evaluate.run(config, NAME, 5, rollouts, path, tmp_path / "out.parquet")


def test_a_missing_episode_is_named(tmp_path, config):
    rollouts, scores = write_inputs(tmp_path, 5, EPISODES)
    table = tables.read_table(scores, tables.SCORES)
    tables.write_table(scores, tables.SCORES, table.slice(1), tables.read_metadata(scores))
    with pytest.raises(EarlError, match=r"scores\.parquet: column 'episode_id' differs .* 'p-0000-00'"):
        evaluate.run(config, NAME, 5, rollouts, scores, tmp_path / "out.parquet")


def test_a_missing_score_stops_and_writes_nothing(tmp_path):
    config = demo_config().model_copy(update={"reward_final_reward": "ground_score"})
    rollouts, scores = write_inputs(tmp_path, 5, EPISODES)
    with pytest.raises(EarlError, match=r"000005\.scores\.parquet: .*ground_score"):
        evaluate.run(config, NAME, 5, rollouts, scores, tmp_path / "out.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([rollouts.name, scores.name])


def test_an_unknown_evaluation_names_the_known_ones(tmp_path, config):
    rollouts, scores = write_inputs(tmp_path, 5, EPISODES)
    with pytest.raises(EarlError, match=r"'nowhere' is not in .* evaluations .*heldout_greedy"):
        evaluate.run(config, "nowhere", 5, rollouts, scores, tmp_path / "out.parquet")


def test_mean_by_prompt_averages_samples_and_skips_the_unknown():
    pairs = [("a", 1.0), ("b", 10.0), ("a", 3.0), ("c", None)]
    assert intervals.mean_by_prompt(pairs) == {"a": 2.0, "b": 10.0}


def test_bootstrap_agrees_with_the_normal_interval_of_many_coins():
    """Of 400 coins, half heads: 0.5 +- 1.96 * 0.5 / sqrt(400) = 0.451 .. 0.549; counts come in steps of 1 / 400."""
    found = intervals.bootstrap([0.0, 1.0] * 200)
    assert (found.mean, found.n) == (0.5, 400)
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004))


def test_bootstrap_does_not_depend_on_how_many_draws_fit_in_memory(monkeypatch):
    values = [float(value) for value in range(37)]
    whole = intervals.bootstrap(values)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 1000)
    assert intervals.bootstrap(values) == whole


def test_paired_bootstrap_uses_shared_prompts_and_cancels_their_difficulty():
    before = {"easy": 9.0, "hard": 1.0, "gone": 5.0}
    after = {"hard": 2.0, "easy": 10.0, "new": 0.0}
    assert intervals.paired_bootstrap(before, after) == intervals.Interval(1.0, 1.0, 1.0, 2)


def test_no_values_have_no_interval():
    assert intervals.bootstrap([]) is None
    assert intervals.paired_bootstrap({"a": 1.0}, {"b": 1.0}) is None


@given(st.lists(st.integers(0, 40).map(lambda quarter: quarter / 4), min_size=1, max_size=30), st.integers(-8, 8))
def test_a_shift_of_all_values_shifts_the_interval(values, shift):
    plain = intervals.bootstrap(values, resamples=200)
    moved = intervals.bootstrap([value + shift for value in values], resamples=200)
    assert plain.low <= plain.high
    for end in ("mean", "low", "high"):
        assert getattr(moved, end) == pytest.approx(getattr(plain, end) + shift)


def test_the_two_parts_of_viescore_stand_beside_it(tmp_path, config):
    rows, summary = run(tmp_path, EPISODES, config)
    assert [row["semantic_consistency"] for row in rows] == [4.0, 8.0, None, None]
    assert [row["perceptual_quality"] for row in rows] == [9.0, 8.0, None, None]
    assert (summary["semantic_consistency"]["mean"], summary["semantic_consistency"]["std"]) == (6.0, 2.0)


def test_expected_best_by_hand():
    """Of 1, 3, 8 two can be drawn in three ways: best of them 3, 8, 8."""
    assert intervals.expected_best([8, 1, 3], 1) == pytest.approx(4)
    assert intervals.expected_best([8, 1, 3], 2) == pytest.approx(19 / 3)
    assert intervals.expected_best([8, 1, 3], 3) == 8


def test_best_of_n_by_hand(tmp_path, config):
    """Rewards 1, 3, 8 of prompt 0; 2, 4 and a failed judgement of prompt 1, which has no best of three."""
    rewards = [(0, 1.0), (0, 3.0), (0, 8.0), (1, 2.0), (1, 4.0), (1, None)]
    rows = [
        episode(prompt, reward, sample=i, status="ok" if reward else "failed")
        for i, (prompt, reward) in enumerate(rewards)
    ]
    _, summary = run(tmp_path, rows, config)
    best = summary["best_of"]
    assert list(best) == ["1", "2", "3"]
    assert [best[k]["n"] for k in best] == [2, 2, 1]
    assert [best[k]["mean"] for k in best] == pytest.approx([(4 + 3) / 2, (19 / 3 + 4) / 2, 8])
    _, summary = run(tmp_path, EPISODES[1:], config)
    assert summary["best_of"] == {}, "one sample a prompt"
