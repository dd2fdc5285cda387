"""Ranks of a stage over the nodes of a Slurm job, started by the stage itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from earl.stages import train
from tests.support.toy_workflow import wait_until
from tests.support.train_files import write_inputs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_two_nodes(slurm, tmp_path):
    """Return a function that submits `earl <arguments>` as a job on two nodes, and one that ends it and returns both
    its output and its exit status."""

    def submit(*arguments: object) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", "--mem=2000", "--gres=gpu:2"]
        command += [f"--output={tmp_path}/%j.txt", "--time=5", ROOT / "tests" / "support" / "batch.sh", sys.executable]
        return subprocess.run(
            [*map(str, command), "-m", "earl", *map(str, arguments)],
            env=inherited | slurm.env | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def end(job: str) -> tuple[str, int]:
        output = tmp_path / f"{job}.txt"
        wait_until(lambda: job not in slurm.jobs(), lambda: output.read_text(), seconds=180)
        *said, status = output.read_text().rstrip().rsplit("\nstatus ", 1)
        return said[0], int(status)

    yield submit, end
    for job in slurm.jobs():
        slurm.call("scancel", job)
    wait_until(lambda: not slurm.jobs())


def test_four_ranks_on_two_nodes_reach_each_other(on_two_nodes, tmp_path):
    submit, end = on_two_nodes
    job = submit("doctor", "--path", tmp_path / "runs", "--minimum-free", "0", "--gpus", 0, "--processes", 4)
    said, status = end(job)
    assert status == 0, said
    assert said.count("4 ranks at 127.0.0.1:") == 4
    assert "FAILED" not in said


def test_ranks_on_two_nodes_train_as_one_process_does(on_two_nodes, new_run, vocabulary):
    submit, end = on_two_nodes
    config, alone = new_run("alone")
    _, run = new_run(train_processes=2)
    for each in (alone, run):
        write_inputs(each, 1, vocabulary)
    train.run(config, alone.path, 1)
    said, status = end(submit("train", "--config", run.config, "--iteration", 1, "--run", run.path))
    assert status == 0, said
    found, expected = (json.loads(each.iteration(1).metrics.read_text()) for each in (run, alone))
    assert found["ranks"] == 2
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
    assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


def test_what_all_ranks_meet_is_said_once_and_ends_all(on_two_nodes, new_run, vocabulary):
    submit, end = on_two_nodes
    _, run = new_run(train_processes=2, parity_tolerance=0.1)
    write_inputs(run, 1, vocabulary)
    said, status = end(submit("train", "--config", run.config, "--iteration", 1, "--run", run.path))
    assert status != 0
    assert said.count("more than parity_tolerance = 0.1; no step was done") == 1
    assert "Traceback" not in said


def test_ranks_that_do_not_fit_the_nodes_are_refused(on_two_nodes, new_run):
    submit, end = on_two_nodes
    _, run = new_run(train_processes=3)
    said, status = end(submit("train", "--config", run.config, "--iteration", 1, "--run", run.path))
    assert status == 2
    assert said.count("3 processes cannot be spread evenly over the 2 nodes") == 1
