"""The state of a run folder: progress, retention of checkpoints, going back, and the chain of digests."""

import errno
import getpass
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earl import code_version
from earl.config import load
from earl.config.freeze import config_digest, frozen_text
from earl.config.schema import Config, Evaluation
from earl.emu3.vocabulary import Vocabulary
from earl.execution import processes
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan, segments, state, verify


def make_config(tmp_path: Path, **fields: object) -> Config:
    defaults = {
        "run_name": "a", "base_exp_dir": str(tmp_path), "train_paths_file": [str(tmp_path / "train.parquet")],
        "val_paths_file": [str(tmp_path / "held_out.parquet")], "judge": "program", "num_iterations": 6,
        "keep_checkpoints_every_n_iterations": None, "save_checkpoints_every_n_iterations": None,
        "vision_tokenizer_path": "package:shapes/vision_tokenizer",
    }  # fmt: skip
    return Config.model_validate(defaults | fields)


def checkpoint(run: Run, index: int) -> str:
    """Write a complete checkpoint; return the policy's digest."""
    for folder in (run.iteration(index).policy, run.iteration(index).trainer):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"{folder.name} {index}")
        manifest.seal(folder)
    return manifest.digest_folder(run.iteration(index).policy)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of six iterations with all its checkpoints, as stages leave it."""
    return write_run(tmp_path)


def write_run(tmp_path: Path, **fields: object) -> Run:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.parquet").write_text("prompts")
    config = make_config(tmp_path, **fields)
    made = Run(tmp_path / "a")
    state.start(made, model)
    made.config.write_text(frozen_text(config))
    policy = manifest.digest_folder(model)
    for index in range(1, 7):
        iteration = made.iteration(index)
        for path in (iteration.rollouts(0), iteration.scores(0), iteration.episodes):
            path.parent.mkdir(parents=True)
            path.write_text(f"{path.parent.name} {index}")
        told = {"policy_digest": policy, "config_digest": config_digest(config)}
        pq.write_table(pa.table({"x": [index]}).replace_schema_metadata(told), iteration.rollouts(0))
        inputs = {"policy": policy, "rollouts": [manifest.digest_file(iteration.rollouts(0))]}
        inputs["scores"] = [manifest.digest_file(iteration.scores(0))]
        policy = checkpoint(made, index)
        metrics = {"inputs": inputs, "policy_digest": policy, "config_digest": config_digest(config)}
        metrics["episodes_digest"] = manifest.digest_file(iteration.episodes)
        iteration.metrics.write_text(json.dumps(metrics | {"code_version": code_version()}))
    return made


def edit_metrics(run: Run, index: int, **fields: object) -> None:
    path = run.iteration(index).metrics
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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
    # null keeps all that are saved, as in the reference; where none is saved, there is none to keep.
    assert [i for i in range(24) if state.Retention(5, None, 100).keeps(i, newest=23)] == [0, 5, 10, 15, 20, 22, 23]
    assert [i for i in range(24) if state.Retention(None, None, 100).keeps(i, newest=23)] == [0, 22, 23]


@given(
    save=st.none() | st.integers(1, 7),
    keep=st.none() | st.integers(1, 7),
    last=st.integers(1, 40),
    newest=st.integers(1, 40),
)
def test_dropping_after_each_iteration_leaves_what_is_kept(save, keep, last, newest):
    retention = state.Retention(save, keep, last)
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


# Verification


def test_sound_run_has_no_problems(run):
    found = verify.verify(run)
    assert (found.iterations, found.problems) == (6, [])
    assert found.code_versions == 1


def problems(run: Run, deep: bool = False) -> list[tuple[str, str]]:
    found = verify.verify(run, deep=deep).problems
    return [(Path(item.file).relative_to(run.path).as_posix(), item.problem) for item in found]


def test_iteration_trained_from_another_policy_is_reported(run):
    edit_metrics(run, 3, policy_digest="f" * 64)
    (file, problem), (folder, other) = problems(run)
    assert file == "iterations/000004/train/metrics.json"
    assert "iteration 3 made ffffffffffff" in problem
    assert folder == "iterations/000003/policy"
    assert "is not the policy that" in other


def test_an_accepted_configuration_and_earlier_code_are_notes_once_a_stretch(run):
    for index in (2, 3, 5):
        edit_metrics(run, index, config_digest="0" * 64)
    edit_metrics(run, 1, code_version="0.0.1+000000000000")
    found = verify.verify(run)
    assert found.problems == []
    assert [note.note.split(" by ")[0] for note in found.notes] == [
        "iterations 2 to 3 were made", "iteration 5 was made", "iteration 1 was made"
    ]  # fmt: skip
    now = config_digest(load.read(run.config))[-12:]
    assert found.notes[0].note == (
        f"iterations 2 to 3 were made by configuration 000000000000; the present one, {now}, has been accepted since"
    )
    assert all(f"note: {each.file}: {each.note}" in found.text() for each in found.notes)
    assert found.text().endswith(": no problems, 3 notes")
    assert [each["file"] for each in json.loads(found.json())["notes"]] == [each.file for each in found.notes]
    command = [sys.executable, "-m", "earl", "verify", "--run", str(run.path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_other_rubrics_are_a_problem_unless_configuration_or_code_was_another_too(run):
    edit_metrics(run, 4, rubrics_digest="0" * 64)
    edit_metrics(run, 5, rubrics_digest="0" * 64, config_digest="0" * 64)
    edit_metrics(run, 6, rubrics_digest="0" * 64, code_version="0.0.1+000000000000")
    found = verify.verify(run)
    assert [item.problem.split(" by ")[0] for item in found.problems] == ["iteration 4 was made"]
    assert [note.note for note in found.notes if "rubrics" in note.note] == [
        "iterations 5 to 6 were made by another set of rubrics (000000000000) than the present one (none)"
    ]


def test_rollouts_that_were_kept_over_an_accepted_change_are_a_note(run):
    """A rewind keeps rollouts and scores; then they are of the right policy and of another configuration."""
    digest = config_digest(load.read(run.config))
    for index, policy in ((3, None), (4, "f" * 64)):
        told = tables.read_metadata(run.iteration(index).rollouts(0)) | {"config_digest": "0" * 64}
        told["policy_digest"] = policy or told["policy_digest"]
        table = pa.table({"x": [index]}).replace_schema_metadata(told)
        pq.write_table(table, run.iteration(index).rollouts(0))
        inputs = json.loads(run.iteration(index).metrics.read_text())["inputs"]
        inputs["rollouts"] = [manifest.digest_file(run.iteration(index).rollouts(0))]
        edit_metrics(run, index, inputs=inputs, config_digest=digest)
    found = verify.verify(run, deep=True)
    (note,) = found.notes
    assert note.file == run.iteration(3).rollouts(0).as_posix()
    assert note.note.startswith("was sampled with configuration 000000000000, and training on it was with ")
    assert [(item.file, item.problem.split(" is")[0]) for item in found.problems] == [
        (run.iteration(4).rollouts(0).as_posix(), "its policy_digest"),
        (run.iteration(4).rollouts(0).as_posix(), "its config_digest"),
    ]


def test_missing_metrics_and_stale_evaluations_are_reported(run, tmp_path):
    evaluations = {"held_out": Evaluation(prompts=4).model_dump()}
    run.config.write_text(frozen_text(make_config(tmp_path, evaluations=evaluations)))
    write_evaluation(run, 5, policy_digest="f" * 64)
    run.iteration(2).metrics.write_text("{")
    assert [file for file, _ in problems(run)] == [
        "iterations/000002/train/metrics.json", "evaluations/held_out/000005.json"
    ]  # fmt: skip


def test_deep_verification_hashes_the_files(run):
    run.iteration(2).scores(0).write_text("other scores")
    (run.iteration(6).policy / "weights").write_text("policy 7")
    assert problems(run) == []
    found = dict(problems(run, deep=True))
    assert "changed since; iteration 2 was trained on it" in found["iterations/000002/scores/0000.parquet"]
    assert "content differs" in found["iterations/000006/policy"]


def write_evaluation(run: Run, index: int, policy_digest: str) -> None:
    evaluation = run.evaluation("held_out", index)
    evaluation.folder.mkdir(parents=True)
    summary = {"policy_digest": policy_digest}
    for name in ("rollouts", "scores", "table"):
        path = getattr(evaluation, name)
        path.write_text(name)
        summary[f"{name}_digest"] = manifest.digest_file(path)
    evaluation.summary.write_text(json.dumps(summary))


@pytest.fixture
def evaluated(tmp_path):
    """The same, with prompts that were tokenised, and an evaluation."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "0000.parquet").write_text("prompts")
    manifest.seal(data)
    evaluations = {"held_out": Evaluation(prompts=4).model_dump()}
    run = write_run(tmp_path, evaluations=evaluations, train_paths_file=[str(data)])
    write_evaluation(run, 5, manifest.digest_folder(run.iteration(5).policy))
    return run


FILES = (
    "a/iterations/000002/rollouts/0000.parquet",
    "a/iterations/000002/scores/0000.parquet",
    "a/iterations/000002/train/episodes.parquet",
    "a/iterations/000006/policy/weights",
    "a/iterations/000006/trainer/weights",
    "a/evaluations/held_out/000005.rollouts.parquet",
    "a/evaluations/held_out/000005.scores.parquet",
    "a/evaluations/held_out/000005.parquet",
    "data/0000.parquet",
    "model/config.json",
)


@pytest.mark.parametrize("deep", [False, True])
def test_what_verification_says_it_looked_at_worked_out_by_hand(evaluated, deep):
    found = verify.verify(evaluated, deep=deep)
    # 6 x (rollouts, scores, episodes, a file each of policy and trainer), 3 of the evaluation, a shard, held-out
    # prompts, and the two files of the vision tokenizer; of the prompts no digest was recorded. The model was not
    # sealed: that it is there is known without listing it.
    there = 6 * 5 + 3 + 1 + 1 + 2
    assert found.problems == []
    assert (found.files, found.hashed, found.deep) == ((there + 1, there, True) if deep else (there, 0, False))
    assert f"{found.files} files there, contents " in found.text()
    assert json.loads(found.json())["deep"] is deep


@pytest.mark.parametrize("file", FILES)
def test_every_missing_file_is_a_problem(evaluated, tmp_path, file):
    path = tmp_path / file
    if path.name == "config.json":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    ((where, problem),) = [(item.file, item.problem) for item in verify.verify(evaluated).problems]
    assert where in (str(path), str(path.parent), str(evaluated.iteration(0).policy))
    assert "is missing" in problem or "no folder is" in problem


@pytest.mark.parametrize("file", FILES)
def test_every_replaced_file_is_a_problem_where_contents_are_compared(evaluated, tmp_path, file):
    path = tmp_path / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [item.file for item in verify.verify(evaluated).problems] == []
    ((where, problem),) = [(item.file, item.problem) for item in verify.verify(evaluated, deep=True).problems]
    assert where in (str(path), str(path.parent), str(evaluated.iteration(0).policy))
    assert "content differs" in problem or "changed since" in problem


# The link to the starting policy


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


# Processes


def test_lock_names_its_holder_and_is_given_up_on_close(tmp_path):
    path = tmp_path / "lock"
    with processes.lock(path), pytest.raises(EarlError, match=f"process {os.getpid()} is writing here"):
        processes.lock(path, patience=0)
    processes.lock(path, patience=0).close()


def test_lock_is_given_up_by_a_killed_process(tmp_path):
    path = str(tmp_path / "lock")
    code = f"import time; from earl.execution import processes; held = processes.lock({path!r}); print(1, flush=True); "
    code += "time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(EarlError, match=f"process {holder.pid}"):
        processes.lock(tmp_path / "lock", patience=0)
    holder.kill()
    holder.communicate()
    processes.lock(tmp_path / "lock", patience=5).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_with_a_remedy(tmp_path, monkeypatch, number):
    def flock(stream, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(EarlError, match=rf"{tmp_path / 'lock'}: cannot be locked .* has no locks.*base_exp_dir"):
        processes.lock(tmp_path / "lock", patience=0)


def test_a_lock_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EarlError, match=r"file/lock: the lock cannot be made \((File exists|Not a directory)\); check"):
        processes.lock(tmp_path / "file" / "lock", patience=0)
    (tmp_path / "lock").mkdir()
    with pytest.raises(EarlError, match=r"lock: the lock cannot be made \(Is a directory\); check"):
        processes.try_lock(tmp_path / "lock")


def test_a_lock_on_a_full_disk_is_one_message(tmp_path):
    code = "import sys; from earl.execution import processes; from earl.messages.errors import EarlError\n"
    code += "try: processes.lock(sys.argv[1])\nexcept EarlError as error: print(error)"
    nothing = (resource.RLIMIT_FSIZE, (0, 0))  # what can be written to any file
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lock")], preexec_fn=lambda: resource.setrlimit(*nothing),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path / 'lock'}: cannot be locked (File too large); free space, then start again\n"


def test_a_user_without_a_name_gets_one(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    processes.name_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"


def test_stage_ends_with_the_workflow_that_started_it():
    stage = "import time; from earl.execution import processes; processes.end_with_workflow(); print(1, flush=True); "
    stage += "time.sleep(600)"
    workflow = (
        "import subprocess, sys, time; from earl.execution import processes; processes.end_stages_with_this_process();"
        f"subprocess.Popen([sys.executable, '-c', {stage!r}]); time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", workflow], stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"1\n"
    started.kill()
    started.communicate(timeout=60)  # the pipe closes only when the stage, too, has ended


# Writers that a killed workflow has left on a cluster


def test_stages_write_side_by_side_and_a_segment_alone(tmp_path):
    run = Run(tmp_path / "run")
    with state.writing(run, alone=False), state.writing(run, alone=False):
        assert processes.try_lock(run.path / ".writing.lock") is None
    with state.writing(run, alone=True):
        assert processes.try_lock(run.path / ".writing.lock", shared=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("command", [["rewind", "--iteration", "5"], ["prune"]])
def test_nothing_is_removed_below_a_job_that_writes(run, command):
    environment = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
    earl = [sys.executable, "-m", "earl", *command, "--run", str(run.path)]
    with state.writing(run, alone=False):
        ended = subprocess.run(earl, env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert (state.newest_complete(run), state.has_checkpoint(run.iteration(1))) == (6, True)
    assert f"process {os.getpid()} (stage on " in ended.stderr
    assert subprocess.run(earl, env=environment, capture_output=True, text=True).returncode == 0


def test_what_lies_outside_of_the_run_may_always_be_written(tmp_path):
    run = Run(tmp_path / "run")
    with state.writing(run, alone=True), state.writing_to(tmp_path / "elsewhere.parquet", run):
        pass
    with state.writing_to(run.iteration(1).rollouts(0), run):
        assert processes.try_lock(run.path / ".writing.lock") is None


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
