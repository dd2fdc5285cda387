"""Killed at twenty random moments, a run through the real workflow ends in the bytes of one that nothing disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from earl.config import load
from earl.execution import processes
from earl.files import manifest
from earl.run import state
from earl.run.layout import Run
from tests.support import bare_loop
from tests.support.demo import SMALL

ROOT = Path(__file__).parents[2]
SEED, KILLS, ITERATIONS = 20261123, 20, 6
SETTINGS = SMALL | {
    "run_name": "killed",
    "base_exp_dir": "runs",
    "num_iterations": ITERATIONS,
    "model_path": "package:shapes/base_policy",
    "evaluations": {},
    "episodes_per_iteration": 8,
}
MARK = "EARL_TEST_OF_KILLS"
"""Environment variable by which every process of an attempt is found, whatever session it is in."""


class Job(NamedTuple):
    """A job of the workflow, by its files below the base folder: a log from its start on, an output at its end."""

    stage: str
    log: str
    output: str


def jobs() -> list[Job]:
    """The jobs in the order in which a chain without parallel branches takes them."""
    found = [
        Job("raw", "shared/logs/raw/*.log", "shared/raw/*.parquet"),
        Job("tokenise", "shared/logs/tokenise/*.log", "shared/tokenised/*/manifest.json"),
        Job("start", "killed/logs/start.log", "killed/iterations/000000/start.json"),
    ]
    for step in (f"{index:06d}" for index in range(1, ITERATIONS + 1)):
        files = f"killed/iterations/{step}"
        found += [
            Job("generate", f"killed/logs/generate/{step}-0000.log", f"{files}/rollouts/0000.parquet"),
            Job("score", f"killed/logs/score/{step}-0000.log", f"{files}/scores/0000.parquet"),
            Job("train", f"killed/logs/train/{step}.log", f"{files}/train/metrics.json"),
        ]
    return found


def moments() -> list[tuple[int, float]]:
    """(job, share of its time), in order. Job -1 stands for the planning at the start of an attempt."""
    rng = random.Random(SEED)
    drawn = sorted((rng.randrange(len(jobs())), rng.random()) for _ in range(KILLS))
    for place in rng.sample(range(KILLS), 2):
        drawn[place] = (-1, drawn[place][1])
    return drawn


class Attempt:
    """The workflow, started once."""

    def __init__(self, place: Path) -> None:
        self.base = place / "runs"
        self.began = time.time_ns()
        overrides = json.dumps([f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()])
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
        command += ["--profile", ROOT / "profiles" / "local"]
        command += ["--config", f"experiment={ROOT / 'config' / 'demo.jsonnet'}", f"set={overrides}"]
        inherited = {key: value for key, value in os.environ.items() if key != processes.WATCHED}
        self.output = place / "output.txt"
        with self.output.open("w") as stream:
            self.leader = subprocess.Popen(
                list(map(str, command)),
                cwd=place,
                env=inherited | {"PYTHONPATH": str(ROOT), MARK: str(place)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, job: int, share: float) -> None:
        """Wait until a share of a job's time has passed since it, or a later one, began; or until it has ended."""
        rest = jobs()[max(job, 0) :]
        while job >= 0 and not any(self._new(each.log) for each in rest):
            self._look()
        deadline = time.monotonic() + share * self._usual_seconds(rest[0].stage if job >= 0 else "planning")
        while time.monotonic() < deadline and not self._new(rest[0].output):
            self._look()

    def _new(self, pattern: str) -> bool:
        """Return whether a file is there that this attempt wrote; one may go while it is looked at."""
        try:
            return any(path.stat().st_mtime_ns > self.began for path in self.base.glob(pattern))
        except FileNotFoundError:
            return False

    def _look(self) -> None:
        assert self.leader.poll() is None, self.output.read_text()
        time.sleep(0.02)

    def _usual_seconds(self, stage: str) -> float:
        """How long a job of this stage took last, by the workflow's own record."""
        records = sorted(self.base.glob(f"*/benchmarks/{stage}/*.tsv"))
        return float(records[-1].read_text().splitlines()[1].split()[0]) if records else 3.0

    def kill(self) -> None:
        """End every process of the attempt at once, without a warning."""
        os.killpg(self.leader.pid, signal.SIGKILL)
        self.leader.wait()
        while left := self.processes():
            for process in left:
                process.kill()

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _mark_of(process) == str(self.base.parent)]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def contents(run: Run) -> dict[str, str]:
    """Digest of every file of the iterations: weights, optimizer states, rollouts, scores, episodes and metrics."""
    unlike = {"start.json", "performance.json"}  # where the starting policy lies, and how long things took
    files = [path for path in (run.path / "iterations").rglob("*") if path.is_file() and path.name not in unlike]
    return {path.relative_to(run.path).as_posix(): manifest.digest_file(path) for path in files}


@pytest.mark.slow
def test_killed_twenty_times_it_ends_in_the_bytes_of_an_undisturbed_run(tmp_path):
    config = load.load(ROOT / "config" / "demo.jsonnet", SETTINGS | {"base_exp_dir": str(tmp_path / "plain")}).config
    undisturbed = bare_loop.run_all(config)
    state.prune(undisturbed, state.Retention.of(config))

    place = tmp_path / "workflow"
    place.mkdir()
    struck = set()
    for job, share in moments():
        attempt = Attempt(place)
        attempt.wait_for(job, share)
        attempt.kill()
        assert attempt.leader.returncode == -signal.SIGKILL
        struck.add(job)
    last = Attempt(place)
    assert last.leader.wait(timeout=600) == 0, last.output.read_text()

    run = Run(place / "runs" / "killed")
    assert contents(run) == contents(undisturbed)
    assert run.iteration(ITERATIONS).metrics.is_file()
    assert len(struck) > 10, "kills are spread over the run"
    assert "no problems" in (run.path / "logs" / "verify.log").read_text()
    assert_nothing_is_left_behind(place, last)


def assert_nothing_is_left_behind(place: Path, attempt: Attempt) -> None:
    leftovers = [p for p in place.rglob("*") if ".tmp-" in p.name or ".old-" in p.name or p.name.endswith(".partial")]
    assert leftovers == []
    assert attempt.processes() == []
    for path in place.rglob("*.lock"):
        processes.lock(path, patience=0).close()  # nobody holds it
    # Marks of incomplete files may stay: an iteration that had just become complete is not planned again.
    assert list((place / ".snakemake" / "locks").glob("*")) == []
