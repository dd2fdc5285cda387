"""The workflow on a real Slurm, by stage and by segment: whatever comes in its way, the same policy, nothing twice."""

import contextlib
import json
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from earl.files import manifest
from earl.run import state
from earl.run.layout import Run
from tests.integration.test_workflow import undisturbed, wait_until  # noqa: F401
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_workflow import demo, sized
from tests.support.workplace import ROOT, Workplace

pytestmark = pytest.mark.slow

TRAIN_2 = "train --config runs/a/config.json --iteration 000002"


class SlurmPlace(Workplace):
    """A workplace whose stages are jobs of a cluster."""

    profile = "slurm"

    def __init__(self, path: Path, cluster: Cluster) -> None:
        super().__init__(path)
        self.cluster = cluster

    def begin(self, experiment: str, granularity: str, *resources: str) -> subprocess.Popen:
        env = {"STUB_HOLD": str(self.path / "hold")} | self.cluster.env
        return self.start(experiment, *sized(granularity, *resources), env=env)

    def hold(self, command: str) -> None:
        """Have stages whose command holds this text wait until :meth:`release`."""
        (self.path / "next").write_text(command)
        (self.path / "next").rename(self.path / "hold")

    def release(self) -> None:
        (self.path / "hold").unlink()

    def hold_at(self, command: str) -> None:
        """Have a stage wait, and return once it does."""
        self.hold(command)
        wait_until(lambda: any(command in line for line in self.commands()))

    def begun_twice(self, command: str) -> None:
        """Wait until a stage that waits has been started a second time."""
        wait_until(lambda: sum(command in line for line in self.commands()) == 2, seconds=120)

    def finish(self, started: subprocess.Popen, fails: bool = False) -> str:
        output, _ = started.communicate(timeout=180)
        assert (started.returncode != 0) == fails, output
        return output

    def job_of(self, stage: str) -> str:
        """Wait until a job of this stage runs, and return its number."""
        found: list[str] = []

        def is_running() -> bool:
            lines = self.cluster.call("squeue", "--noheader", "--states=RUNNING", "--format=%A %j").splitlines()
            found[:] = [line.split()[0] for line in lines if line.split()[1].startswith(f"earl-{stage}")]
            return bool(found)

        wait_until(is_running)
        return found[0]

    def node_of(self, job: str) -> str:
        return self.cluster.call("squeue", "--noheader", f"--jobs={job}", "--format=%N")

    def log_says(self, name: str, text: str) -> None:
        """Wait until a rule's log holds a text."""
        log = self.path / "runs" / "a" / "logs" / f"{name}.log"
        wait_until(lambda: log.is_file() and text in log.read_text())

    def check(self, expected: str, again: tuple[str, ...] = ()) -> None:
        """See that the run ended as it should, that nothing ran twice but ``again``, and that nothing is left."""
        assert self.policy("a", 3) == expected
        assert self.folder("a").report.is_file()
        stages = [line for line in self.stages() if line.split()[0] not in ("start",)]
        assert not [line for line in stages if line.startswith("clash")]
        repeated = [line.split()[0] for line, count in Counter(stages).items() if count > 1]
        assert sorted(repeated) == sorted(again), stages
        wait_until(lambda: not self.cluster.jobs())
        assert not [*self.path.glob("runs/a/logs/jobs/*/job.json"), *self.path.glob("runs/a/logs/jobs/*/*.pkl")]
        state.exclusive(self.folder("a"))


@pytest.fixture
def place(tmp_path: Path, slurm: Cluster) -> SlurmPlace:
    return SlurmPlace(tmp_path, slurm)


def kill(started: subprocess.Popen) -> None:
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=60)


def test_by_stage_the_driver_is_killed_and_jobs_go_on(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a", evaluations={"held_out": {"prompts": 4, "every_n_iterations": 3}})
    for stage in ("generate --config runs/a/config.json --iteration 000001", TRAIN_2):
        started = place.begin(experiment, "stage")
        place.hold_at(stage)
        kill(started)
    started = place.begin(experiment, "stage")
    place.log_says("train/000002", "found running")
    place.release()
    place.finish(started)
    place.check(undisturbed)


def test_by_segment_the_driver_is_killed_and_the_window_goes_on(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a", window_length=2)
    started = place.begin(experiment, "segment")
    place.hold_at(TRAIN_2)
    job = place.job_of("window-000000")
    kill(started)
    started = place.begin(experiment, "segment")
    place.log_says("window/000002", f"job {job} (window-000000): found running")
    place.release()
    place.finish(started)
    place.check(undisturbed)


def test_another_granularity_does_not_write_beside_running_jobs(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a")
    started = place.begin(experiment, "stage")
    place.hold_at("generate --config runs/a/config.json --iteration 000001")
    job = place.job_of("generate-000001")
    kill(started)
    output = place.finish(place.begin(experiment, "segment"), fails=True)
    assert f"Slurm job {job} (generate-000001-0000) of an earlier workflow still runs" in output
    place.release()
    place.finish(place.begin(experiment, "stage"))
    place.check(undisturbed)


def test_a_window_whose_job_is_preempted_keeps_the_iterations_before(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a")
    started = place.begin(experiment, "segment")
    place.hold_at(TRAIN_2)
    node = place.cluster.call("squeue", "--noheader", "--format=%N")
    place.cluster.call("srun", "--partition=urgent", "--gres=gpu:4", f"--nodelist={node}", "true")
    place.release()
    place.finish(started)
    place.check(undisturbed, again=("train",))


def test_a_window_at_its_time_limit_goes_on_as_the_same_job(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a")
    started = place.begin(experiment, "segment", "window:runtime=1", "window:warn_seconds=30")
    place.hold_at(TRAIN_2)
    job = place.job_of("window-000000")
    place.begun_twice(TRAIN_2)
    place.release()
    place.finish(started)
    place.log_says("window/000003", f"job {job} (window-000000): submitted")
    place.log_says("window/000003", "this job is timed-out")
    place.check(undisturbed, again=("train",))


def test_a_stage_whose_node_is_lost_starts_on_another(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a")
    started = place.begin(experiment, "stage")
    place.hold_at(TRAIN_2)
    node = place.node_of(place.job_of("train-000002"))
    place.cluster.kill_node(node)
    try:
        place.begun_twice(TRAIN_2)
        place.release()
        place.finish(started)
    finally:
        place.cluster.start_node(node)
        wait_until(lambda: place.cluster.nodes().get(node) == "idle")
    place.check(undisturbed, again=("train",))


def test_a_cancelled_stage_is_tried_again_and_a_drained_node_left_out(place, undisturbed):  # noqa: F811
    experiment = place.experiment("a")
    started = place.begin(experiment, "stage")
    place.hold_at("generate --config runs/a/config.json --iteration 000001")
    node = place.cluster.call("squeue", "--noheader", "--format=%N")
    place.cluster.call("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        place.hold_at(TRAIN_2)
        job = place.job_of("train-000002")
        assert place.cluster.call("squeue", "--noheader", "--format=%N") != node
        place.cluster.call("scancel", job)
        place.release()
        place.finish(started)
    finally:
        place.cluster.call("scontrol", "update", f"nodename={node}", "state=resume")
    place.check(undisturbed, again=("train",))


def test_a_full_disk_fails_and_with_space_it_goes_on(place, undisturbed):  # noqa: F811
    (place.path / "runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place.path / "runs")]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        experiment = place.experiment("a")
        started = place.begin(experiment, "stage")
        place.hold_at(TRAIN_2)
        fill(place.path / "runs" / "full")
        place.release()
        output = place.finish(started, fails=True)
        assert "No space left on device" in output
        assert state.newest_complete(place.folder("a")) == 1
        assert not list((place.path / "runs" / "a" / "iterations").rglob(".*.tmp-*"))
        (place.path / "runs" / "full").unlink()
        place.finish(place.begin(experiment, "stage"))
        place.check(undisturbed, again=("train",))
    finally:
        subprocess.run(["umount", "--lazy", str(place.path / "runs")], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"x" * 4096):
            pass


def test_the_demo_by_stage_and_by_segment_ends_in_the_bytes_of_one_process(slurm, tmp_path, one_process_demo):
    # Cold and in workers. Data and SFT model are made by stages once, and found by the others.
    for granularity, workers in (("stage", "none"), ("segment", "none"), ("segment", "local")):
        name = f"{granularity}-{workers}"
        command, env = demo(tmp_path, slurm, sized(granularity), run_name=name, workers=workers)
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        run = Run(tmp_path / name)
        for index in (0, 1, 2):
            found, wanted = (manifest.digest_folder(r.iteration(index).policy) for r in (run, one_process_demo))
            assert found == wanted
    wait_until(lambda: not slurm.jobs())


def test_four_ranks_on_two_nodes_train_as_one_process_does(slurm, tmp_path, one_process_demo):
    """Cold and in workers the same bytes; the step of one process up to rounding."""
    alone = json.loads(one_process_demo.iteration(1).metrics.read_text())
    digests = set()
    for workers in ("none", "submitit"):
        options = sized("stage", "train:nodes=2", "train:tasks_per_node=2")
        fields = {"run_name": f"in-{workers}", "workers": workers, "num_iterations": 1}
        command, env = demo(tmp_path, slurm, options, **fields)
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        iteration = Run(tmp_path / f"in-{workers}").iteration(1)
        found = json.loads(iteration.metrics.read_text())
        assert found["ranks"] == 4
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4, abs=1e-6)
        assert found["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
        digests.add((manifest.digest_folder(iteration.policy), manifest.digest_folder(iteration.trainer)))
    assert len(digests) == 1
    wait_until(lambda: not slurm.jobs())
