"""The state of a run folder: progress, retention of checkpoints, going back, and what is missing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earl.config.freeze import frozen_text
from earl.emu3.vocabulary import Vocabulary
from earl.files import manifest
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan, segments, state, verify
from tests.support import run_of_six
from tests.support.run_of_six import make_config, problems


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of_six.write(tmp_path)


# Progress


def test_metrics_make_an_iteration_complete_whatever_became_of_its_checkpoint(run):
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (6, 6)
    (run.iteration(6).policy / manifest.NAME).unlink()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (6, 5)
    (run.iteration(5).trainer / manifest.NAME).unlink()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (6, 4)
    run.iteration(6).metrics.unlink()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (5, 4)


def test_a_checkpoint_that_was_written_before_its_metrics_does_not_count(run):
    run.iteration(6).metrics.unlink()
    assert state.newest_checkpoint(run) == 5


def test_nothing_is_complete_before_the_start(tmp_path):
    assert state.newest_complete(Run(tmp_path / "none")) == 0
    assert state.newest_checkpoint(Run(tmp_path / "none")) == 0


def test_a_file_in_the_path_of_a_run_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EarlError, match=r"file: a file stands where a folder has to be; give another base_exp_dir"):
        state.newest_complete(Run(tmp_path / "file"))


def test_start_links_relatively_and_records_the_digest(run, tmp_path):
    link = run.iteration(0).policy
    assert link.readlink() == Path("../../../model")
    record = json.loads(state.start_record(run.iteration(0)).read_text())
    assert record == {"policy": "../../../model", "policy_digest": manifest.digest_folder(tmp_path / "model")}


def test_start_refuses_what_is_no_model(tmp_path):
    with pytest.raises(EarlError, match=r"model_path"):
        state.start(Run(tmp_path / "a"), tmp_path)


def test_status_tells_progress_and_checkpoints(run):
    shutil.rmtree(run.iteration(6).policy)
    text = state.status(run, last=20).text()
    assert "complete     6 of 20, newest checkpoint 5" in text
    assert "0, 1, 2, 3, 4, 5 (" in text


# Retention


def test_what_is_kept_worked_out_by_hand():
    retention = state.Retention(save_every=5, keep_every=20, last=100)
    # 19 and 20 to go on from, 15 was the newest multiple of 5 until 20 became complete.
    assert [i for i in range(20) if retention.keeps(i, newest=19)] == [0, 15, 18, 19]
    assert [i for i in range(48) if retention.keeps(i, newest=47)] == [0, 20, 40, 45, 46, 47]
    assert retention.dropped_by(20) == [15, 18]
    assert retention.dropped_by(22) == []
    assert retention.keeps(100, newest=150)
    # 16 and 12 are the references that 18 and 16 train with, from 17 and 15.
    refreshed = state.Retention(None, None, 100, refresh_every=4)
    assert [i for i in range(18) if refreshed.keeps(i, newest=17)] == [0, 16, 17]
    assert [i for i in range(17) if refreshed.keeps(i, newest=16)] == [0, 12, 15, 16]
    assert [i for i in range(1, 13) if refreshed.saves(i)] == [4, 8, 12]
    assert refreshed.dropped_by(17) == [12, 15]
    # null keeps all that are saved, as in the reference; where none is saved, there is none to keep.
    assert [i for i in range(24) if state.Retention(5, None, 100).keeps(i, newest=23)] == [0, 5, 10, 15, 20, 22, 23]
    assert [i for i in range(24) if state.Retention(None, None, 100).keeps(i, newest=23)] == [0, 22, 23]


@given(
    save=st.none() | st.integers(1, 7),
    keep=st.none() | st.integers(1, 7),
    last=st.integers(1, 40),
    newest=st.integers(1, 40),
    refresh=st.none() | st.integers(1, 7),
)
def test_dropping_after_each_iteration_leaves_what_is_kept(save, keep, last, newest, refresh):
    retention = state.Retention(save, keep, last, refresh)
    on_disk = {0}
    for done in range(1, newest + 1):
        on_disk |= {done}
        on_disk -= set(retention.dropped_by(done))
    assert on_disk == {i for i in range(newest + 1) if retention.keeps(i, newest)}


def test_prune_after_an_iteration_drops_what_it_made_superfluous(run):
    assert state.prune(run, state.Retention(None, None, 6), after=5) == [3]
    assert not run.iteration(3).policy.exists()
    assert not run.iteration(3).trainer.exists()
    assert run.iteration(3).metrics.is_file()
    assert run.iteration(2).policy.is_dir()


def test_prune_of_the_whole_run_also_clears_half_written_files(run):
    leftovers = [run.iteration(4).path / ".policy.tmp-17", run.iteration(4).path / "scores" / ".0000.parquet.tmp-17"]
    leftovers[0].mkdir()
    leftovers[1].write_text("")
    assert state.prune(run, state.Retention(None, 2, 6)) == [1, 3]
    assert [i for i in range(7) if run.iteration(i).policy.is_dir()] == [0, 2, 4, 5, 6]
    assert not any(path.exists() for path in leftovers)
    assert (run.iteration(0).policy / "config.json").is_file(), "the starting policy is another's"


def test_after_a_segments_checkpoint_the_earlier_ones_that_are_not_kept_go(run):
    shutil.rmtree(run.iteration(6).policy)
    # 5 is the newest there is, and 4 is the one before it; 2 is a multiple that is kept.
    assert state.prune_before(run, state.Retention(2, 2, 9), newest=5) == [1, 3]
    assert [i for i in range(1, 7) if run.iteration(i).policy.is_dir()] == [2, 4, 5]
    assert state.prune(run, state.Retention(None, None, 9)) == [2]
    assert [i for i in range(1, 7) if run.iteration(i).policy.is_dir()] == [4, 5]


@pytest.mark.parametrize(
    ("save", "keep", "saved"),
    [(5, 20, [5, 10, 15, 20, 23]), (5, None, [5, 10, 15, 20, 23]), (None, 7, [7, 14, 21, 23]), (None, None, [23])],
)
def test_which_checkpoints_outlast_the_next_worked_out_by_hand(save, keep, saved):
    assert [i for i in range(1, 24) if state.Retention(save, keep, 23).saves(i)] == saved


def test_rewind_forgets_training_and_keeps_scores(run):
    evaluation = run.evaluation("held_out", 5)
    evaluation.folder.mkdir(parents=True)
    evaluation.summary.write_text("{}")
    assert state.rewind(run, 5) == [5, 6]
    assert state.newest_complete(run) == 4
    assert run.iteration(5).scores(0).is_file()
    assert not evaluation.summary.exists()


def test_rewind_needs_no_checkpoint_before(run):
    state.prune(run, state.Retention(None, None, 6))
    with pytest.raises(EarlError, match="has not been trained"):
        state.rewind(run, 7)
    assert state.newest_complete(run) == 6
    assert state.rewind(run, 3) == [3, 4, 5, 6]
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (2, 0)


# Where a segment starts


def test_a_segment_starts_at_the_newest_checkpoint_unless_another_configuration_trained_what_follows(run, tmp_path):
    config = make_config(tmp_path, num_iterations=9)
    for index in (5, 6):
        shutil.rmtree(run.iteration(index).trainer)
    assert segments.start(config, run) == 4
    other = make_config(tmp_path, num_iterations=9, learning_rate=1e-4)
    complaint = r"000005/train/metrics.json: iteration 5 was trained with another.*earl rewind --run .* --iteration 5$"
    for ask in (lambda: segments.start(other, run), lambda: plan.plan(other), lambda: plan.plan(other, False)):
        with pytest.raises(EarlError, match=complaint):
            ask()
    state.rewind(run, 5)
    assert segments.start(other, run) == 4


# Damage


@pytest.mark.parametrize("content", ["", '{"inputs": {"ro', "{}", "[]", '{"policy_digest": "0", "inputs": {}}'])
def test_damaged_metrics_are_refused_with_what_to_do(run, tmp_path, content):
    (run.iteration(6).policy / "manifest.json").unlink()
    run.iteration(6).metrics.write_text(content)
    longer = make_config(tmp_path, num_iterations=9)
    complaint = rf"000006/train/metrics.json: .*earl rewind --run {run.path} --iteration 6"
    for ask in (lambda: plan.plan(longer), lambda: plan.plan(longer, False), lambda: state.read_metrics(run, 6)):
        with pytest.raises(EarlError, match=complaint):
            ask()
    assert state.rewind(run, 6) == [6]


def test_metrics_that_are_missing_before_the_newest_are_named_with_what_makes_them(run, tmp_path):
    shutil.rmtree(run.iteration(3).path / "train")
    said = plan.plan(make_config(tmp_path, num_iterations=9)).text()
    assert f"iteration 3 has no metrics: ask for {run.iteration(3).metrics}" in said
    assert [problem for file, problem in problems(run) if file.endswith("000003/train/metrics.json")] == [
        f"is missing; have it made again: ask the workflow for {run.iteration(3).metrics}"
    ]
    assert state.rewind(run, 3) == [4, 5, 6]
    assert "no metrics" not in plan.plan(make_config(tmp_path, num_iterations=9)).text()


def test_status_names_a_checkpoint_that_is_not_whole(run):
    (run.iteration(3).policy / "weights").write_text("cut")
    assert re.search(r"problem .*000003/policy/weights: has 3 bytes", state.status(run, 6).text())


# A policy that is not there


def test_a_policy_that_is_not_on_disk_is_named_with_what_brings_it_back(run, tmp_path):
    for folder in (run.iteration(3).policy, run.iteration(3).trainer):
        shutil.rmtree(folder)
    for read in (Vocabulary.from_folder, lambda folder: state.start(Run(tmp_path / "b"), folder)):
        told = rf"000003/policy: is missing: .*earl restore --run {run.path} --iteration 3 brings it back$"
        with pytest.raises(EarlError, match=told):
            read(run.iteration(3).policy)
        with pytest.raises(EarlError, match=rf"iteration 7 has not been trained; earl status --run {run.path}"):
            read(run.iteration(7).policy)
        with pytest.raises(EarlError, match=r"not been started; earl start --run"):
            read(Run(tmp_path / "b").iteration(0).policy)
        with pytest.raises(EarlError, match=r"elsewhere: is missing; give the folder of a policy"):
            read(tmp_path / "elsewhere")
    with pytest.raises(EarlError, match=r"policy/tokenizer\.json: does not exist"):
        Vocabulary.from_folder(run.iteration(2).policy)


# Before the start


def test_before_its_start_a_run_has_not_started_and_that_is_all(tmp_path):
    run = Run(tmp_path / "a")
    run.path.mkdir()
    run.config.write_text(frozen_text(make_config(tmp_path)))
    assert state.status(run, 6).text() == f"{run.path}: has not started; 6 iterations are planned"
    with pytest.raises(EarlError, match=rf"^{run.path}: has not started, so there is nothing to verify$"):
        verify.verify(run)


def test_a_trained_run_whose_start_is_gone_is_not_one_that_has_not_started(run):
    state.start_record(run.iteration(0)).unlink()
    assert [file for file, _ in problems(run)] == ["iterations/000000/start.json"]
    assert state.status(run, 6).text().startswith("complete     6 of 6, newest checkpoint 6\n")


def test_status_does_not_name_a_checkpoint_that_is_not_there(run, tmp_path):
    (tmp_path / "model").rename(tmp_path / "gone")
    for index in range(1, 7):
        shutil.rmtree(run.iteration(index).policy)
    first, second, *_ = state.status(run, 6).text().splitlines()
    assert first == "complete     6 of 6, no checkpoint"
    assert second.startswith("checkpoints  none ")
