"""Runs with a curriculum: by stage, by segment, in other shards, resumed and verified."""

import json
import shutil

import pytest

from earl.config import load
from earl.emu3 import sequence
from earl.files import tables
from earl.files.layout import Run
from earl.run import curriculum, state, verify
from earl.stages import iterate, restore
from tests.support import bare_loop
from tests.support.segment_runs import assert_same, begin, configure, contents

pytestmark = pytest.mark.slow

# Nearly every group is below the band: 4 prompts an iteration of 12, so that all rest when the fourth begins.
FIELDS = {
    "curriculum": {"rest_iterations": 3, "minimum_mean_reward": 9.5},
    "raw_datasets.shapes_rl.count": 12,
    "evaluations": {},
}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> Run:
    return bare_loop.run_all(configure(tmp_path_factory.mktemp("by-stage"), **FIELDS))


def prompts_of(run: Run, index: int) -> list[str]:
    """Digests of the prompts of an iteration, in the order of their groups, whatever its shards."""
    found = {}
    for path in sorted(run.iteration(index).rollouts(0).parent.glob("*.parquet")):
        for row in tables.read_table(path, tables.ROLLOUTS, ("group_id", "prompt_token_ids")).to_pylist():
            found[row["group_id"]] = sequence.digest(row["prompt_token_ids"])
    return [found[group] for group in sorted(found)]


def metrics(run: Run, index: int) -> dict:
    return json.loads(run.iteration(index).metrics.read_text())


def test_prompts_of_no_use_rest_and_come_back_where_too_few_are_left(by_stage):
    drawn = [prompts_of(by_stage, index) for index in (1, 2, 3, 4)]
    resting = [curriculum.ledger(load.read(by_stage.config), by_stage, index).resting for index in (1, 2, 3, 4)]
    assert not resting[0]
    for index in (1, 2):
        assert resting[index]
        assert resting[index].isdisjoint(drawn[index])
    left = {prompt for prompts in drawn[:3] for prompt in prompts} - resting[3]
    assert len(left) < 4, "too few"
    assert left <= set(drawn[3])
    assert len(set(drawn[3])) == 4
    assert [metrics(by_stage, index)["passed_over_prompts"] for index in (1, 4)] == [0, 12 - 4]
    plain = by_stage.path.parent / "plain"
    config = configure(plain, **FIELDS | {"curriculum": None, "num_iterations": 2})
    shutil.copytree(by_stage.path.parent / "shared", plain / "shared")
    assert prompts_of(bare_loop.run_all(config), 2) != drawn[1], "what the curriculum changes"


def test_a_segment_writes_the_bytes_of_the_stages(tmp_path, by_stage):
    run = begin(tmp_path / "segment", by_stage, **FIELDS)
    config = load.read(run.config)
    iterate.run(config, run.path, 3)  # and a second segment, which reads the ledger of another's episodes
    iterate.run(config, run.path, 4)
    assert_same(run, by_stage, checkpoints=(2, 3, 4))
    # Killed before its last checkpoints: trained again over stored rollouts, which are found to be of the ledger.
    for index in (3, 4):
        shutil.rmtree(run.iteration(index).policy)
    rollouts = {path: path.stat().st_mtime_ns for path in run.path.glob("iterations/*/rollouts/*")}
    run.iteration(4).metrics.unlink()
    iterate.run(config, run.path, 4)
    assert rollouts == {path: path.stat().st_mtime_ns for path in run.path.glob("iterations/*/rollouts/*")}
    assert_same(run, by_stage, checkpoints=(2, 3, 4))


def test_other_shards_draw_the_same(tmp_path, by_stage):
    run = begin(tmp_path / "whole", by_stage, **FIELDS | {"rollout_shards": 1})
    iterate.run(load.read(run.config), run.path, 4)
    for index in (1, 2, 3, 4):
        assert prompts_of(run, index) == prompts_of(by_stage, index)
        assert metrics(run, index)["passed_over_prompts"] == metrics(by_stage, index)["passed_over_prompts"]
        assert metrics(run, index)["policy_digest"] == metrics(by_stage, index)["policy_digest"]


def test_episodes_that_have_changed_make_the_next_rollouts_anew(tmp_path, by_stage):
    """Were all groups of iteration 3 of use, other prompts would have been drawn for iteration 4."""
    shutil.copytree(by_stage.path.parent, tmp_path / "copy", symlinks=True)
    run = Run(tmp_path / "copy" / "a")
    assert verify.verify(run, deep=True).problems == []
    table = tables.read_table(run.iteration(3).episodes, tables.EPISODES).to_pydict()
    tables.write_table(run.iteration(3).episodes, tables.EPISODES, table | {"reward": [10.0] * 4 + [9.9] * 4}, {})
    problems = [item for item in verify.verify(run, deep=True).problems if "curriculum_digest" in item.problem]
    assert {item.file for item in problems} == {str(run.iteration(4).rollouts(shard)) for shard in range(4)}
    config, before = load.read(run.config), contents(run)
    state.rewind(run, 4)
    iterate.run(config, run.path, 4)
    assert prompts_of(run, 4) != prompts_of(by_stage, 4)
    assert {path for path, digest in contents(run).items() if before.get(path) != digest} >= {
        f"iterations/000004/rollouts/{shard:04d}.parquet" for shard in range(4)
    }


def test_an_iteration_is_restored_over_its_rollouts(tmp_path, by_stage):
    shutil.copytree(by_stage.path.parent, tmp_path / "copy", symlinks=True)
    run = Run(tmp_path / "copy" / "a")
    for name in ("policy", "trainer"):
        shutil.rmtree(run.iteration(3).path / name)
    restore.run(run.path, 3)
    assert_same(run, by_stage, checkpoints=(1, 2, 3, 4))
