"""The executor on a real Slurm, with a toy workflow: whatever comes in a job's way, one writer and the whole output.

Jobs that are preempted, that reach their time limit or whose node is lost: see test_slurm.py.
"""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest

from tests.support.programs import program
from tests.support.toy_workflow import kill, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(slurm_bench):
    return slurm_bench


def test_two_jobs_run_side_by_side_each_with_gpus_of_its_own(bench):
    driver = bench.start("out/a", "out/b", gpu=2)
    (first, *_), (second, *_) = bench.begun(2)
    assert first != second
    bench.hurry()
    bench.ended(driver)
    assert bench.words() == ["begin", "begin", "end", "end"]
    assert [(bench.path / "out" / name).read_text() for name in "ab"] == ["whole"] * 2
    used = {(bench.path / "logs" / f"{name}.log").read_text() for name in "ab"}
    assert used <= {f"at work with GPUs {gpus}\n" for gpus in ("0,1", "2,3")}
    assert not list((bench.path / ".snakemake" / "submitit").iterdir()), "nothing is kept of a job that succeeded"


def test_a_job_that_cannot_start_says_why(bench, slurm):
    driver = bench.start(runtime=600)
    bench.waits_for("PENDING (PartitionTimeLimit)")
    driver.send_signal(signal.SIGINT)
    driver.wait(timeout=60)
    wait_until(lambda: not slurm.jobs())


def test_a_job_that_slurm_does_not_take_fails(bench):
    bench.ended(bench.start(slurm_partition="none"), status=1)
    assert "invalid partition" in bench.said()


def test_a_controller_that_is_away_is_waited_for(bench, slurm):
    """While a job runs, and when one is to be submitted; at the start it is missed."""
    bench.options = (*bench.options, "--jobs", "1")
    driver = bench.start("out/a", "out/b")
    bench.begun()
    slurm.stop_controller()
    bench.waits_for("the cluster does not answer; waiting: squeue")
    bench.hurry()
    bench.waits_for(": the cluster does not answer; waiting: ")
    slurm.start_controller()
    bench.ended(driver)
    assert bench.words() == ["begin", "end"] * 2
    bench.env = bench.env | {"PATH": f"{bench.path}/bin:{os.environ['PATH']}"}
    program(bench.path / "bin", "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    bench.ended(bench.start("word"), status=1)
    assert "the cluster does not answer: squeue: Unable to contact slurm controller" in bench.said()


def test_other_resources_are_asked_for(bench):
    bench.hurry()
    bench.ended(bench.start(gres="gpu:3", slurm_extra="'--nice=7 --comment=mine'"))
    assert (bench.path / "logs" / "a.log").read_text() == "at work with GPUs 0,1,2\n"
    bench.ended(bench.start("out/b", exclusive="true"))
    assert (bench.path / "logs" / "b.log").read_text() == "at work with GPUs 0,1,2,3\n"


def test_a_type_of_gpus_that_no_node_has_is_refused(bench):
    bench.ended(bench.start(gpu="h100:2"), status=1)
    assert "was not submitted" in bench.said()


def test_a_cancelled_job_fails(bench, slurm):
    driver, [[job, *_]] = bench.start(), bench.begun()
    slurm.call("scancel", job)
    bench.ended(driver, status=1)
    assert "ended without a result (CANCELLED" in bench.said()
    assert bench.words() == ["begin"]


@pytest.mark.parametrize("late", [False, True])
def test_a_driver_killed_while_it_submits_leaves_no_second_writer(bench, slurm, late, monkeypatch):
    """What it submitted is found by its name, or, where it comes later than another driver's look, ends of itself."""
    slow = bench.path / "bin" / "sbatch"
    slow.parent.mkdir()
    wait = "touch submitting; until [ -e go ]; do sleep 0.1; done" if late else ""
    slow.write_text(f"""#!/bin/sh
cp "$1" script.sh
{wait}
{shutil.which("sbatch")} script.sh
touch submitted
sleep 60
""")
    slow.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
        driver = bench.start()
        wait_until((bench.path / ("submitting" if late else "submitted")).exists, bench.said)  # in sbatch
        kill(driver)
    again = bench.start()
    [[job, *_]] = bench.begun()
    if late:
        (bench.path / "go").touch()
        wait_until(lambda: "could not find submitted jobs" in bench.logs(), bench.logs)
        wait_until(lambda: list(slurm.jobs()) == [job])
    bench.hurry()
    bench.ended(again)
    assert bench.words() == ["begin", "end"]


def test_a_job_at_its_last_time_limit_fails(bench):
    bench.ended(bench.start(runtime=1, warn_seconds=20, timeouts=0), status=1)
    assert "timed-out too many times" in bench.said()
    assert bench.words() == ["begin"]


def test_a_command_starts_ranks_on_several_nodes(bench):
    bench.ended(bench.start("ranks", nodes=2, tasks_per_node=2, gpu=2))
    found = sorted((bench.path / "ranks").read_text().splitlines())
    assert found == ["0 0 n1 0,1", "1 1 n1 0,1", "2 0 n2 0,1", "3 1 n2 0,1"]


def test_a_full_disk_fails_and_with_space_it_continues(bench):
    folder = bench.path / ".snakemake" / "submitit"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with open(folder / "full", "wb", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(b"x" * 4096):
                pass
        bench.hurry()
        bench.ended(bench.start(), status=1)
        assert "No space left on device" in bench.said()
        (folder / "full").unlink()
        bench.ended(bench.start())
        assert bench.words() == ["begin", "end"]
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
