"""Workers that are Slurm jobs, on a real cluster: the bytes of a cold stage, whatever is killed, and nothing left."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from earl.execution import processes
from earl.files import manifest
from earl.run.layout import Run
from earl.workers import launcher
from earl.workers.pool import VARIABLE, Pool
from tests.integration.test_workers import expected, score, wait_until  # noqa: F401
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_workflow import ROOT, demo, sized

pytestmark = pytest.mark.slow

OWNER = """
import sys
from earl.workers.opening import open_pool
print(open_pool(float(sys.argv[1]), beside=sys.argv[2]).path, flush=True)
input()
"""


class Workplace:
    """A pool with its owner, a process that does nothing else, and launchers of commands for it."""

    def __init__(self, path: Path, cluster: Cluster, idle_seconds: float = 60) -> None:
        self.path, self.cluster, self.idle_seconds = path, cluster, idle_seconds
        unwanted = (VARIABLE, processes.WATCHED)
        self.env = {key: value for key, value in os.environ.items() if key not in unwanted} | cluster.env
        self.env["PYTHONPATH"] = str(ROOT)
        self.open()

    def open(self) -> None:
        """Open a pool, as a workflow does that begins."""
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(self.idle_seconds), str(self.path / ".workers")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, text=True,
        )  # fmt: skip
        self.pool = Pool(self.owner.stdout.readline().strip())

    def start(self, arguments: list[object], **resources: object) -> subprocess.Popen:
        words = [sys.executable, "-m", "earl", "launch", "--launcher", "workers", "--name", "stage"]
        words += ["--folder", self.path / "job", "--output", arguments[-1]]
        for name, value in ({"runtime": 5, "mem_mb": 1000} | resources).items():
            words += ["--resource", f"{name}={value}"]
        return subprocess.Popen(
            list(map(str, [*words, "--", sys.executable, "-m", "earl", *arguments])),
            cwd=self.path, env=self.env | {VARIABLE: self.pool.path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def good(self, arguments: list[object], **resources: object) -> str:
        return ended(self.start(arguments, **resources))

    def workers(self) -> dict[str, str]:
        """Return the number of each worker's job that Slurm has not seen the end of, by the worker's kind."""
        lines = self.cluster.call("squeue", "--noheader", "--format=%A %j").splitlines()
        return {line.split("-worker-")[1].split(".")[0]: line.split()[0] for line in lines if "-worker-" in line}

    @contextlib.contextmanager
    def asked(self, arguments: list[object], **resources: object):
        """Start a stage whose worker has its command, and cannot go on before the block ends: its output is taken."""
        with self.pool.writing([str(word) for word in arguments]):
            client = self.start(arguments, **resources)
            wait_until(lambda: self.pids() and any("-> POSIX" in line for line in waiting_for_locks(self.pids())))
            yield client

    def pids(self) -> list[int]:
        """Return the process ids of workers that are alive: the nodes are this machine."""
        locks = [path for path in Path(self.pool.path).glob("*.worker") if processes.try_lock(path) is None]
        return [int(path.read_text()) for path in locks]

    def close(self) -> None:
        """Let the owner end as a workflow does."""
        self.owner.communicate("\n", timeout=60)
        assert not Path(self.pool.path).exists()


def waiting_for_locks(pids: list[int]) -> list[str]:
    names = set(map(str, pids))
    return [line for line in Path("/proc/locks").read_text().splitlines() if names & set(line.split())]


def ended(child: subprocess.Popen, status: int = 0) -> str:
    output, _ = child.communicate(timeout=180)
    assert child.returncode == status, output
    return output


@contextlib.contextmanager
def workplace(path: Path, cluster: Cluster, idle_seconds: float = 60):
    place = Workplace(path, cluster, idle_seconds)
    yield place
    if place.owner.poll() is None:
        place.close()
    wait_until(lambda: not cluster.jobs())


@pytest.fixture
def place(tmp_path, slurm):
    with workplace(tmp_path, slurm) as place:
        yield place


@pytest.fixture
def wanted(expected) -> bytes:  # noqa: F811
    return expected.iteration(1).scores(0).read_bytes()


def test_a_worker_serves_one_command_after_another_and_ends_with_the_pool(place, expected, wanted, tmp_path):  # noqa: F811
    out = tmp_path / "scores.parquet"
    assert "worker judge." in place.good(score(expected, out))
    (job,) = place.workers().values()
    out.unlink()
    assert "worker judge." not in place.good(score(expected, out))
    assert out.read_bytes() == wanted
    assert list(place.workers().values()) == [job]
    assert not (tmp_path / "job").exists(), "no job of the stage's own"
    # Other resources are another worker's; what comes once in a run is a job of its own.
    place.good(score(expected, out), mem_mb=900)
    assert len(place.cluster.jobs()) == 2
    failed = place.start(["score", "--config", "no.json", "--rollouts", "r.parquet", "--out", out])
    assert "no.json" in ended(failed, status=2)
    assert job in place.cluster.jobs(), "a stage that fails leaves its worker"
    place.close()
    assert place.cluster.jobs() == {}


@pytest.mark.parametrize("way", ["killed", "cancelled", "node lost"])
def test_a_stage_whose_worker_is_lost_is_a_job_of_its_own(place, expected, wanted, tmp_path, way):  # noqa: F811
    out = tmp_path / "scores.parquet"
    with place.asked(score(expected, out)) as client:
        (pid,), (job,) = place.pids(), place.workers().values()
        node = place.cluster.call("squeue", "--noheader", f"--jobs={job}", "--format=%N")
        if way == "cancelled":
            place.cluster.call("scancel", job)
        else:
            if way == "node lost":
                place.cluster.kill_node(node)
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes.is_alive(pid))
    try:
        said = ended(client)
        assert "going on without it" in said
        assert "(stage): submitted" in said
        assert out.read_bytes() == wanted
    finally:
        if way == "node lost":
            place.cluster.start_node(node)
            wait_until(lambda: place.cluster.nodes().get(node) == "idle")
    out.unlink()
    assert "worker judge." in place.good(score(expected, out)), "the next stage starts a worker again"
    assert out.read_bytes() == wanted


def test_a_worker_does_not_outlive_its_time_limit_and_the_next_stage_starts_another(
    place, expected, wanted, tmp_path  # noqa: F811
):  # fmt: skip
    out = tmp_path / "scores.parquet"
    limits = {"runtime": 1, "warn_seconds": 40}
    with place.asked(score(expected, out), **limits) as client:
        (job,) = place.workers().values()
        wait_until(lambda: not place.pids())
    assert "going on without it" in ended(client)
    wait_until(lambda: job not in place.cluster.jobs())
    assert out.read_bytes() == wanted


def test_a_worker_ends_with_a_client_that_is_killed(place, expected, wanted, tmp_path):  # noqa: F811
    out = tmp_path / "scores.parquet"
    with place.asked(score(expected, out)) as client:
        client.kill()
        client.communicate()
        wait_until(lambda: not place.pids() and not place.cluster.jobs())
    assert not out.exists()
    place.good(score(expected, out))
    assert out.read_bytes() == wanted


def test_idle_workers_end_and_come_back(tmp_path, slurm, expected, wanted):  # noqa: F811
    out = tmp_path / "scores.parquet"
    with workplace(tmp_path, slurm, idle_seconds=1) as place:
        for _ in range(2):
            assert "worker judge." in place.good(score(expected, out))
            wait_until(lambda: not place.cluster.jobs())
            assert out.read_bytes() == wanted
            out.unlink()


def test_workers_of_a_killed_workflow_end_and_the_next_one_clears_up(place, expected, wanted, tmp_path):  # noqa: F811
    out = tmp_path / "scores.parquet"
    place.good(score(expected, out))
    first, (pid,) = place.pool.path, place.pids()
    # This one does not see that its pool is over, as on a node that was cut off.
    os.kill(pid, signal.SIGSTOP)
    place.owner.kill()
    place.owner.communicate()
    assert place.cluster.jobs()
    place.open()
    assert place.cluster.jobs() == {}
    assert not processes.is_alive(pid)
    assert not Path(first).exists()
    place.good(score(expected, out))
    place.owner.kill()
    place.owner.communicate()
    wait_until(lambda: not place.cluster.jobs())
    # Without a pool that lives, a stage is a job of its own.
    assert "(stage): submitted" in place.good(score(expected, out))
    assert out.read_bytes() == wanted


def test_the_demo_by_stage_in_workers_killed_and_started_again(slurm, tmp_path, one_process_demo):
    """The driver is killed while the learner's worker has a command; the next one ends in the same bytes."""
    command, env = demo(tmp_path, slurm, sized("stage"), run_name="workers", workers="submitit")
    run = Run(tmp_path / "workers")
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until((run.path / "logs" / "train" / "000001.log").exists, seconds=120)
    first.kill()
    first.communicate()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for index in (0, 1, 2):
        found, right = (manifest.digest_folder(r.iteration(index).policy) for r in (run, one_process_demo))
        assert found == right
    said = (run.path / "logs" / "train" / "000002.log").read_text()
    assert "is in memory" in said
    assert "submitted" not in said
    assert slurm.jobs() == {}
    assert not list((tmp_path / ".workers").iterdir())


def test_which_commands_are_stages_of_this_environment():
    argv = ["score", "--out", "a"]
    assert launcher.stage([sys.executable, "-m", "earl", *argv]) == argv
    assert launcher.stage([str(Path(sys.executable).parent / "earl"), *argv]) == argv
    for other in ([], ["true"], ["/usr/bin/python3", "-m", "earl", *argv], [sys.executable, "-m", "pytest"]):
        assert launcher.stage(other) == []
