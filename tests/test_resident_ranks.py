"""Learners that are split and stay in memory: in workers, with real processes, on the CPU."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from earl import processes, residents
from earl.learner import ranks
from earl.stages import train
from tests.test_ranks import earl
from tests.test_train_stage import made_of, new_run, write_inputs  # noqa: F401  (new_run is a fixture)
from tests.test_workers import place, wait_until  # noqa: F401  (place is a fixture)


def command(run, iteration: int) -> list[object]:
    return ["train", "--config", run.config, "--iteration", iteration, "--run", run.path]


def take_inputs(run, other) -> None:
    """Give a run the rollouts and scores of all iterations of another one, which it is going to repeat."""
    for source in sorted(other.path.glob("iterations/*/rollouts")):
        for name in ("rollouts", "scores"):
            shutil.copytree(source.parent / name, run.path / source.parent.relative_to(other.path) / name)


def about_trainer(said: str) -> list[str]:
    """What the learner says of where its state comes from."""
    return [line.split(" from ")[0] for line in said.splitlines() if line.startswith("trainer: ")]


FRESH = "trainer: iteration 1 starts with a fresh optimizer"


def kept(iteration: int) -> str:
    return f"trainer: iteration {iteration} ({iteration} optimizer steps) is in memory"


def loaded(iteration: int) -> str:
    return f"trainer: loaded iteration {iteration} ({iteration} optimizer steps)"


def processes_of(pool_path: str) -> dict[int, str]:
    """Processes that were started with a pool in their environment, but this one, and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"={pool_path}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found[int(entry.name)] = " ".join(words)
    return found


def rank(pool_path: str, number: int) -> int:
    """Process id of a rank of `ranks-0`."""
    return next(
        pid
        for pid, words in processes_of(pool_path).items()
        if "--name ranks-0" in words and f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text()
    )


@pytest.fixture(scope="module")
def cold(tmp_path_factory, policy_folder, vocabulary):
    """Three iterations that two cold ranks trained."""
    config, run = new_run.__wrapped__(tmp_path_factory.mktemp("cold"), policy_folder)("run", train_processes=2)
    for iteration in (1, 2, 3):
        write_inputs(run, iteration, vocabulary)
        done = earl(*command(run, iteration))
        assert done.returncode == 0, done.stderr
        assert about_trainer(done.stderr) == [FRESH if iteration == 1 else loaded(iteration - 1)]
    return run


@pytest.mark.slow
def test_ranks_that_stay_write_what_cold_ranks_write(place, cold, new_run):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    said = [about_trainer(place.good(*command(run, iteration))) for iteration in (1, 2, 3)]
    assert said == [[FRESH], [kept(1)], [kept(2)]]
    assert [made_of(run, i) for i in (1, 2, 3)] == [made_of(cold, i) for i in (1, 2, 3)]
