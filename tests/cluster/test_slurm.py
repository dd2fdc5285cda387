"""EARL's workflow on a real Slurm, by segment and by stage: whatever comes in its way, the same files."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from earl.config import load
from earl.execution import processes
from earl.files import manifest
from earl.files.layout import Run
from earl.run import state
from tests.support import bare_loop
from tests.support.demo import DEMO, SHORT
from tests.support.forked import Forked
from tests.support.slurm_cluster import Cluster
from tests.support.workplace import ROOT, Workplace, wait_until

pytestmark = pytest.mark.slow

RULES = ["iterate", "restore", "generate", "score", "train", "evaluate_generate", "evaluate_score", "sft", "tokenise"]
GENERATE_1, TRAIN_1, TRAIN_2 = (
    f"{stage} --config runs/a/config.json --iteration {step}"
    for stage, step in (("generate", "000001"), ("train", "000001"), ("train", "000002"))
)
SCORE_1 = "score --config runs/a/config.json"
ONE, TWO = {"num_iterations": 1}, {"num_iterations": 2}
# One data set for all, and the starting policy as it is: fewer stages that show the same.
UNTUNED = SHORT | {"model_path": "package:shapes/base_policy"}
UNTUNED |= {f"{name}_paths_file": ["stage:tokenise/shapes_rl"] for name in ("train", "val")}


def sized(*resources: str) -> list[str]:
    """Return options that make what the profile asks for small; ``resources`` are set besides, as <rule>:<name>=<n>."""
    options = ["--default-resources", "slurm_partition=gpu", "runtime=5", "mem_mb=500", "disk_mb=0"]
    options += ["--set-resources", *(f"{rule}:mem_mb=500" for rule in RULES), *resources]
    return [*options, "--latency-wait", "2", "--submitit-seconds", "1", "--retries", "1"]


class SlurmPlace(Workplace):
    """A workplace whose stages are jobs of a cluster."""

    profile = "slurm"

    def __init__(self, path: Path, cluster: Cluster) -> None:
        super().__init__(path)
        self.cluster = cluster

    def begin(self, experiment: str, granularity: str, *resources: str) -> Forked:
        env = {"STUB_HOLD": str(self.path / "hold")} | self.cluster.env
        return self.start(experiment, *sized(*resources), env=env, granularity=granularity)

    def hold_at(self, command: str) -> None:
        """Have a stage wait, and return once it does."""
        (self.path / "next").write_text(command)
        (self.path / "next").rename(self.path / "hold")
        wait_until(lambda: any(command in line for line in self.commands()), seconds=120)

    def release(self) -> None:
        (self.path / "hold").unlink()

    def begun_twice(self, command: str) -> None:
        """Wait until a stage that waits has been started a second time."""
        wait_until(lambda: sum(command in line for line in self.commands()) == 2, seconds=120)

    def finish(self, started: Forked, fails: bool = False) -> str:
        output, _ = started.communicate(timeout=240)
        assert (started.returncode != 0) == fails, output
        return output

    def job(self) -> tuple[str, str]:
        """Return the only job that runs, and its node."""
        (line,) = self.cluster.call("squeue", "--noheader", "--states=RUNNING", "--format=%A %N").splitlines()
        job, node = line.split()
        return job, node

    def check(self, expected: Run, again: tuple[str, ...] = ()) -> None:
        """See that the run ended as it should, that nothing ran twice but ``again``, and that no job is left."""
        assert contents(self.folder("a")) == contents(expected)
        assert self.folder("a").report.is_file()
        stages = [line for line in self.stages() if line.split()[0] not in ("start", "iterate")]
        assert not [line for line in stages if line.startswith("clash")]
        repeated = [line.split()[0] for line, count in Counter(stages).items() if count > 1]
        assert sorted(repeated) == sorted(again), stages
        wait_until(lambda: not self.cluster.jobs())
        with state.exclusive(self.folder("a")):
            pass


def contents(run: Run) -> dict[str, bytes]:
    """Return the files that a run has whatever it was made by: all but checkpoints, logs, and what says where it is."""
    kept = ("iterations/*/rollouts/*", "iterations/*/scores/*", "iterations/*/train/*", "evaluations/*/*")
    files = [path for pattern in kept for path in sorted(run.path.glob(pattern))]
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, Run]:
    """Runs of one and of two iterations on this machine, without evaluations."""
    place = Workplace(tmp_path_factory.mktemp("undisturbed"))
    place.run(",".join([place.experiment("one", **ONE), place.experiment("two", **TWO)]))
    return {1: place.folder("one"), 2: place.folder("two")}


@pytest.fixture
def place(tmp_path: Path, slurm: Cluster):
    yield SlurmPlace(tmp_path, slurm)
    for job in slurm.jobs():
        slurm.call("scancel", job)
    wait_until(lambda: not slurm.jobs())


def kill(started: Forked) -> None:
    """Kill the driver alone. Jobs that outlive it do not hold its output open."""
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=60)


def says(started: Forked, text: str) -> None:
    """Wait until a driver says something."""
    said = []
    for line in started.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said))


def test_the_driver_of_a_segment_is_killed_and_its_job_goes_on(place, undisturbed):
    experiment = place.experiment("a", **TWO)
    for moment in (GENERATE_1, TRAIN_2):
        started = place.begin(experiment, "segment")
        place.hold_at(moment)
        kill(started)
    started = place.begin(experiment, "segment")
    says(started, "found running")
    place.release()
    place.finish(started)
    place.check(undisturbed[2])


def test_a_segment_that_is_preempted_keeps_the_iterations_before(place, undisturbed):
    started = place.begin(place.experiment("a", **TWO), "segment")
    place.hold_at(TRAIN_2)
    _, node = place.job()
    place.cluster.call("srun", "--partition=urgent", "--exclusive", f"--nodelist={node}", "true")
    place.release()
    assert "queued again" in place.finish(started)
    place.check(undisturbed[2], again=("train",))


def test_a_segment_at_its_time_limit_continues_as_the_same_job(place, undisturbed):
    # Slurm warns up to 30 s early: 26 s after the start at the soonest, when the program listens.
    started = place.begin(place.experiment("a", **TWO), "segment", "iterate:runtime=1", "iterate:warn_seconds=4")
    place.hold_at(TRAIN_2)
    job, _ = place.job()
    place.begun_twice(TRAIN_2)
    assert place.job()[0] == job
    place.release()
    place.finish(started)
    place.check(undisturbed[2], again=("train",))


def test_by_stage_a_driver_that_is_killed_a_job_that_is_cancelled_and_a_node_that_is_lost(place, undisturbed):
    experiment = place.experiment("a", **ONE)
    started = place.begin(experiment, "stage")
    place.hold_at(GENERATE_1)
    kill(started)
    started = place.begin(experiment, "stage")
    says(started, "found running")

    place.hold_at(SCORE_1)
    place.cluster.call("scancel", place.job()[0])
    place.begun_twice(SCORE_1)

    place.hold_at(TRAIN_1)
    _, node = place.job()
    place.cluster.kill_node(node)
    try:
        place.begun_twice(TRAIN_1)
        place.release()
        place.finish(started)
    finally:
        place.cluster.start_node(node)
        wait_until(lambda: place.cluster.nodes().get(node) == "idle")
    place.check(undisturbed[1], again=("score", "train"))


@pytest.fixture(scope="module")
def one_process_demo(tmp_path_factory):
    """The short demo without its fine-tuning, made in one process."""
    base = tmp_path_factory.mktemp("one-process")
    return bare_loop.run_all(load.load(DEMO, UNTUNED | {"base_exp_dir": str(base), "run_name": "demo"}).config)


@pytest.mark.parametrize(
    ("granularity", "resources", "fields"),
    [
        ("stage", [], {"num_iterations": 1}),
        # A rank on each node samples, one trains.
        ("segment", ["iterate:nodes=2", "iterate:gpu=1"], {"segment_processes": 2, "rollout_shards": 1}),
    ],
    ids=["stage", "segment on two nodes"],
)
def test_the_demo_ends_in_the_bytes_of_one_process(slurm, tmp_path, one_process_demo, granularity, resources, fields):
    settings = UNTUNED | {"base_exp_dir": str(tmp_path), "run_name": one_process_demo.path.name} | fields
    overrides = json.dumps([f"{name}={json.dumps(value)}" for name, value in settings.items()])
    memory = [f"{rule}:mem_mb=3000" for rule in ("iterate", "train", "sft", "generate", "tokenise")]
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", *sized(*memory, *resources)]
    command += ["--config", "experiment=config/demo.jsonnet", f"granularity={granularity}", f"set={overrides}"]
    inherited = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
    env = inherited | slurm.env | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = Run(tmp_path / one_process_demo.path.name)
    last = settings["num_iterations"]
    policies = {manifest.digest_folder(each.iteration(last).policy) for each in (run, one_process_demo)}
    assert len(policies) == 1
    found, expected = contents(run), contents(one_process_demo)
    made = [name for name in found if "/rollouts/" in name or "/scores/" in name]
    assert made
    assert [name for name in made if found[name] != expected[name]] == []
    wait_until(lambda: not slurm.jobs())
