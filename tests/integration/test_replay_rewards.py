"""Another reward over stored scores: what the scores hold decides, not what the run had asked for."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import freeze, load
from earl.files import manifest, tables
from earl.messages.errors import EarlError
from earl.run import plan, state, verify
from earl.run.layout import Run
from earl.stages import replay, rescore, restore, train


@pytest.fixture
def source(small_run):
    """A run of two iterations. Its configuration asks for no ground score; its judge, a program, gives one."""
    return small_run


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the run that a test may change, beside it, where its links hold."""
    run = Run(source.path.with_name(f"copy-{tmp_path.name}"))
    shutil.copytree(source.path, run.path, symlinks=True)
    change_config(run, run_name=run.path.name)
    return run


@pytest.fixture
def out(source, tmp_path):
    """Where a replay goes."""
    return source.path.with_name(f"replay-{tmp_path.name}")


def change_config(run, **fields):
    """Have the run's frozen configuration say something else."""
    values = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(values | fields))


def take_away(run, score, iteration=2):
    """Have an iteration's scores say nothing of one sub-score, as if the judge had never been asked for it."""
    path = run.iteration(iteration).scores(0)
    table = tables.read_table(path, tables.SCORES)
    index = table.schema.get_field_index(score)
    table = table.set_column(index, score, pa.nulls(len(table), pa.float32()))
    tables.write_table(path, tables.SCORES, table, tables.read_metadata(path))
    metrics = json.loads(run.iteration(iteration).metrics.read_text())
    metrics["inputs"]["scores"] = [manifest.digest_file(path)]
    run.iteration(iteration).metrics.write_text(json.dumps(metrics))


def rewards_and(score, run, index, scores=None):
    """Return the rewards that training gave the judged episodes, and their sub-score."""
    judged = (scores or run.iteration(index).scores(0)), run.iteration(index).episodes
    scores, episodes = (pq.read_table(path).sort_by("episode_id").to_pylist() for path in judged)
    pairs = [(e["reward"], s[score]) for s, e in zip(scores, episodes, strict=True) if s["status"] == "ok"]
    assert pairs
    return pairs


def test_a_replay_may_take_any_reward_that_the_stored_scores_hold(source, out):
    replayed = replay.run(source.path, out, {"reward_final_reward": "ground_score"}).run
    for index in (1, 2):
        pairs = rewards_and("ground_score", replayed, index, source.iteration(index).scores(0))
        assert all(reward == score for reward, score in pairs)
    both = {"reward_final_reward": "sqrt(viescore_pqxground_score)", "num_iterations": 1}
    replay.run(source.path, out.with_name("both"), both)
    replay.run(source.path, out.with_name("parts"), {"advantage_components": {"ground_score": 1.0}})


def test_what_a_model_was_asked_for_does_not_decide_either(copied, out):
    """A model judge's scores may be of a time when the configuration asked for more."""
    change_config(copied, judge="openai", reward_function_api_base="http://localhost:1")
    settings = {"reward_final_reward": "ground_score", "num_iterations": 1}
    replayed = replay.run(copied.path, out, settings)
    assert replayed.config.reward_compute_ground_score, "it says what its rewards are made of"


def test_after_a_rewind_another_reward_trains_over_the_same_scores(copied):
    state.rewind(copied, 2)
    before = copied.iteration(2).scores(0).read_bytes()
    config = load.changed(load.read(copied.config), {"reward_final_reward": "ground_score"})
    freeze.write(config, copied.config, accept_changes=True)
    assert plan.plan(config, by_segment=False).iterations == range(2, 3)
    train.run(config, copied.path, 2)
    assert all(reward == score for reward, score in rewards_and("ground_score", copied, 2))
    assert copied.iteration(2).scores(0).read_bytes() == before


@pytest.mark.parametrize(
    ("score", "settings", "field", "flag"),
    [
        ("ground_score", {"reward_final_reward": "ground_score"}, "reward_final_reward", "reward_compute_ground_score"),
        ("overedit", {}, "reward_final_reward", "reward_compute_viescore"),
        (
            "naturalness",
            {"reward_final_reward": "ground_score", "advantage_components": {"perceptual_quality": 1.0}},
            "advantage_components",
            "reward_compute_viescore",
        ),
    ],
)
def test_a_score_that_is_not_stored_is_missed_before_anything_is_trained(copied, out, score, settings, field, flag):
    take_away(copied, score)
    with pytest.raises(EarlError) as refused:
        replay.run(copied.path, out, settings)
    told = str(refused.value)
    assert str(copied.iteration(2).scores(0)) in told
    for part in (f"column '{score}'", field, f"earl rescore --run {copied.path}", f"--set {flag}=true", "--scores"):
        assert part in told
    assert not out.exists()
    # The same where the run itself goes on with another reward.
    config = load.changed(load.read(copied.config), settings)
    assert plan.plan(config, by_segment=False).iterations == range(3, 3), "what is trained already is not asked"
    state.rewind(copied, 2)
    with pytest.raises(EarlError, match=f"column '{score}'"):
        plan.plan(config)


def test_a_replay_takes_the_scores_of_another_judge(copied, out):
    """The way out: the stored rollouts are scored again, and trained over with these scores."""
    take_away(copied, "ground_score")
    rescore.run(copied.path, "again", {"reward_compute_ground_score": True})
    replayed = replay.run(copied.path, out, {"reward_final_reward": "ground_score"}, scores="again").run
    for index in (1, 2):
        scores = Run(copied.path / "rescored" / "again").iteration(index).scores(0)
        assert all(reward == score for reward, score in rewards_and("ground_score", replayed, index, scores))
        recorded = json.loads(replayed.iteration(index).metrics.read_text())["inputs"]["scores"]
        assert recorded == [manifest.digest_file(scores)]
    assert load.read(replayed.config).reward_compute_ground_score
    assert verify.verify(replayed, deep=True).problems == []
    digest = manifest.digest_folder(replayed.iteration(2).policy)
    for folder in (replayed.iteration(2).policy, replayed.iteration(2).trainer):
        shutil.rmtree(folder)
    restore.run(replayed.path, 2)
    assert manifest.digest_folder(replayed.iteration(2).policy) == digest
    with pytest.raises(EarlError, match="is the replay of"):
        replay.run(copied.path, out, {})


def test_scores_that_nobody_made_are_named(copied, out):
    with pytest.raises(EarlError, match=r"rescored/strict.*earl rescore .*--name strict"):
        replay.run(copied.path, out, {}, scores="strict")
    rescore.run(copied.path, "first", {}, iterations=[1])
    with pytest.raises(EarlError, match=r"rescored/first/iterations/000002/scores.*earl rescore .*--name first"):
        replay.run(copied.path, out, {}, scores="first")
    assert replay.run(copied.path, out, {"num_iterations": 1}, scores="first")
