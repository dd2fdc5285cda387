"""The link to the starting policy, and policies that are not those on record."""

import json
import re
import shutil
from pathlib import Path

import pytest

from earl.files import manifest
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan, state
from tests.support import run_of_six
from tests.support.run_of_six import make_config, problems


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of_six.write(tmp_path)


def test_a_policy_outside_is_linked_absolutely_so_that_the_run_may_move(tmp_path):
    model = tmp_path / "elsewhere" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    state.start(Run(tmp_path / "runs" / "a"), model)
    assert Run(tmp_path / "runs" / "a").iteration(0).policy.readlink() == model
    (tmp_path / "deeper").mkdir()
    moved = Run((tmp_path / "runs").rename(tmp_path / "deeper" / "runs") / "a")
    assert (moved.iteration(0).policy / "config.json").is_file()
    state.check_start(moved)


def test_a_policy_inside_moves_with_the_folder_of_all_runs(tmp_path):
    model = tmp_path / "runs" / "shared" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    state.start(Run(tmp_path / "runs" / "a"), model)
    moved = Run((tmp_path / "runs").rename(tmp_path / "moved") / "a")
    assert (moved.iteration(0).policy / "config.json").is_file()


def test_a_link_to_nothing_is_told_by_planning_status_and_verification(run, tmp_path):
    (tmp_path / "model").rename(tmp_path / "gone")
    link = run.iteration(0).policy
    complaint = rf"{link}: is a link to ../../../model, where no folder is; .*earl start --run {run.path} --policy"
    with pytest.raises(EarlError, match=complaint):
        plan.plan(make_config(tmp_path, num_iterations=9))
    assert plan.plan(make_config(tmp_path)).segments == [], "a run that is done needs it no more"
    assert re.search(complaint, state.status(run, 9).text())
    assert [file for file, _ in problems(run)] == ["iterations/000000/policy"]
    state.start(run, tmp_path / "gone")
    assert plan.plan(make_config(tmp_path, num_iterations=9)).newest == 6


def test_a_trained_run_is_not_linked_to_another_policy(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"another": 1}')
    with pytest.raises(EarlError, match="was trained from"):
        state.start(run, tmp_path / "other")
    assert run.iteration(0).policy.resolve() == tmp_path / "model"


def test_a_run_without_its_record_is_not_linked_to_another_policy_either(run, tmp_path):
    state.start_record(run.iteration(0)).unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"another": 1}')
    with pytest.raises(EarlError, match=r"was trained from .* \(see .*000001/train/metrics.json\)"):
        state.start(run, tmp_path / "other")
    state.start(run, tmp_path / "model")
    # Once it is rewound, and the record is gone, it may start from another one.
    state.rewind(run, 1)
    state.start_record(run.iteration(0)).unlink()
    state.start(run, tmp_path / "other")


@pytest.mark.parametrize("by_segment", [True, False])
def test_a_policy_that_is_not_the_one_on_record_is_refused_by_the_plan(run, tmp_path, by_segment):
    longer = make_config(tmp_path, num_iterations=9)
    policy = run.iteration(6).policy
    (policy / "weights").write_text("of another run")
    manifest.seal(policy)
    complaint = r"000006/policy: is policy \w+, but .*000006/train/metrics.json says \w+; remove .* earl restore --run"
    with pytest.raises(EarlError, match=complaint):
        plan.plan(longer, by_segment)
    shutil.rmtree(policy)
    # An unsealed one is compared where it is read; a sealed one, which costs nothing, at once.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"another": 1}')
    run.iteration(0).policy.unlink()
    run.iteration(0).policy.symlink_to(tmp_path / "other")
    assert plan.plan(longer, by_segment).newest == 6
    manifest.seal(tmp_path / "other")
    with pytest.raises(EarlError, match=r"000000/policy: is policy .*start.json says .*earl start --run"):
        plan.plan(longer, by_segment)
    assert problems(run)[0][0] == "iterations/000000/policy"


def test_a_record_of_the_start_that_the_first_iteration_contradicts_is_refused(run, tmp_path):
    record = state.start_record(run.iteration(0))
    state.check_policy(run, 0, json.loads(record.read_text())["policy_digest"])
    (tmp_path / "model" / "weights").write_text("of another model")
    manifest.seal(tmp_path / "model")
    digest = manifest.digest_folder(tmp_path / "model")
    record.write_text(json.dumps({"policy": "model", "policy_digest": digest}))
    with pytest.raises(EarlError, match=r"but .*000001/train/metrics.json says"):
        state.check_start(run)
