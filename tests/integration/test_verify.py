"""Verification: the chain of digests from the starting policy to the last evaluation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import load
from earl.config.freeze import config_digest, frozen_text
from earl.config.sections import Evaluation
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.run import verify
from tests.support import run_of_six
from tests.support.run_of_six import edit_metrics, make_config, problems


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of_six.write(tmp_path)


def test_sound_run_has_no_problems(run):
    found = verify.verify(run)
    assert (found.iterations, found.problems) == (6, [])
    assert found.code_versions == 1


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
    run = run_of_six.write(tmp_path, evaluations=evaluations, train_paths_file=[str(data)])
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
