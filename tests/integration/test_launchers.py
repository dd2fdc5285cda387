"""Launchers: local ones, and the Slurm launcher on a real cluster with what goes wrong there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl.execution import processes
from earl.launchers import record
from earl.launchers.job import Job, Resources
from earl.messages.errors import EarlError
from earl.run import state
from earl.run.layout import Run

ROOT = Path(__file__).parents[2]

WRITER = """
import fcntl, os, sys, time
log, out, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
def say(text):
    with open(log, "a") as stream:
        stream.write(text + "\\n")
held = open(out + ".held", "w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    say("clash")
say("begin " + os.environ.get("SLURM_JOB_ID", "-") + " " + os.environ.get("SLURMD_NODENAME", "-"))
print("at work", flush=True)
end = time.time() + seconds
while time.time() < end and not os.path.exists(log + ".hurry"):
    time.sleep(0.1)
with open(out, "w") as stream:
    stream.write("whole")
say("end")
"""


class Bench:
    """A folder, a command that notes when it begins and ends, and `earl launch` to run it with."""

    def __init__(self, path: Path, env: dict[str, str]) -> None:
        self.path, self.log, self.out = path, path / "log", path / "out"
        self.env = {key: value for key, value in os.environ.items() if key != processes.WATCHED} | env
        self.env["PYTHONPATH"] = str(ROOT)

    def writer(self, seconds: float) -> list[str]:
        return [sys.executable, "-c", WRITER, str(self.log), str(self.out), str(seconds)]

    def start(self, command: list[str], launcher: str = "slurm", **resources: object) -> subprocess.Popen:
        words = [sys.executable, "-m", "earl", "launch", "--launcher", launcher, "--name", "stage"]
        words += ["--folder", str(self.path / "job"), "--output", str(self.out)]
        for name, value in ({"runtime": 5, "mem_mb": 200} | resources).items():
            words += ["--resource", f"{name}={value}"]
        return subprocess.Popen(
            [*words, "--", *command], cwd=self.path, env=self.env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def begun(self, times: int = 1) -> list[list[str]]:
        """Wait until the command has begun that often, and return job number and node of each time."""
        wait_until(lambda: sum(line.startswith("begin") for line in self.lines()) >= times)
        return [line.split()[1:] for line in self.lines() if line.startswith("begin")]

    def hurry(self) -> None:
        """Let commands that are at work end."""
        Path(f"{self.log}.hurry").touch()


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def ended(child: subprocess.Popen, status: int = 0) -> str:
    output, _ = child.communicate(timeout=120)
    assert child.returncode == status, output
    return output


@pytest.fixture
def here(tmp_path):
    return Bench(tmp_path, {})


@pytest.fixture
def bench(tmp_path, slurm):
    yield Bench(tmp_path, slurm.env)
    wait_until(lambda: not slurm.jobs())


def test_resources_are_parsed_and_mistakes_named():
    found = Resources.parse(["nodes=2", "gpu=4", "slurm_partition=fast"])
    assert (found.nodes, found.gpu, found.slurm_partition, found.ranks) == (2, 4, "fast", 2)
    with pytest.raises(EarlError, match=r"resource 'gpus=4': is not .*; did you mean gpu\?"):
        Resources.parse(["gpus=4"])
    with pytest.raises(EarlError, match="resource 'gpu=four': should be a whole number"):
        Resources.parse(["gpu=four"])
    with pytest.raises(EarlError, match="should be 1 at least"):
        Resources.parse(["nodes=0"])


def test_what_a_batch_script_says(tmp_path):
    from submitit.slurm.slurm import _make_sbatch_string

    from earl.launchers import slurm

    resources = Resources(
        nodes=2, tasks_per_node=4, gpu=4, cpus_per_task=8, mem_mb=64000, runtime=90, slurm_partition="fast",
        slurm_account="mine", constraint="a100&ib", warn_seconds=120,
    )  # fmt: skip
    job = Job("train-000012", ["true"], tmp_path / "job", resources=resources)
    parameters = slurm.parameters(resources, "earl-train-000012")
    lines = _make_sbatch_string("python stage", tmp_path, **parameters).splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --account=mine",
        "#SBATCH --constraint='a100&ib'",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --job-name=earl-train-000012",
        "#SBATCH --mem=64000M",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={tmp_path}/%j_0_log.out",
        "#SBATCH --partition=fast",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=90",
        "#SBATCH --wckey=submitit",
    ]
    assert f"srun --unbuffered --output {tmp_path}/%j_%t_log.out --cpus-per-task=8 --kill-on-bad-exit=1" in lines[-1]
    assert job.slurm_name != Job(job.name, job.command, tmp_path / "other").slurm_name


def test_local_ranks_find_their_rank_and_gpus_of_their_own(here):
    here.env["CUDA_VISIBLE_DEVICES"] = "3,5"
    here.env["TMPDIR"] = str(here.path)
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')"
    show = f"import os; os.write(1, (' '.join(str(os.environ.get(n)) for n in {names}) + '\\n').encode())"
    output = ended(here.start([sys.executable, "-c", show], "local", tasks_per_node=2, gpu=1))
    assert sorted(output.splitlines()) == ["0 0 2 3", "1 1 2 3"]
    first, _ = here.start(here.writer(60), "local", gpu=1), here.begun()
    output = ended(here.start([sys.executable, "-c", show], "local", gpu=1))
    assert output.split() == ["None", "None", "None", "5"], "the first GPU is taken"
    assert "3 GPUs are asked for where 2 are visible" in ended(here.start(["true"], "local", gpu=3), status=2)
    first.kill()
    first.communicate()
    wait_until(lambda: ended(here.start([sys.executable, "-c", show], "local", gpu=1)).split()[3] == "3")


def test_a_local_rank_that_fails_ends_the_others(here):
    fail = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '1' else sys.exit(7)"
    start = time.monotonic()
    ended(here.start([sys.executable, "-c", fail], "local", tasks_per_node=2), status=7)
    assert time.monotonic() - start < 50
    assert "the launcher 'local' has one" in ended(here.start(["true"], "local", nodes=2), status=2)


def test_debug_says_what_was_asked_for_and_runs_it(here):
    output = ended(here.start(["sh", "-c", "echo here; exit 4"], "debug", gpu=2), status=4)
    assert "gpu=2" in output
    assert output.splitlines()[-1] == "here"


def test_only_the_recorded_job_writes_and_a_later_start_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD_PATIENCE", 0.3)
    monkeypatch.setattr(record, "LOOK", 0.05)
    with pytest.raises(EarlError, match="names job None, so job 7 must not write"):
        record.become_writer(tmp_path, "7", "0", lambda: None)
    record.Record("stage", "digest", "7").write(tmp_path)
    with pytest.raises(EarlError, match="names job 7, so job 8 must not write"):
        record.become_writer(tmp_path, "8", "0", lambda: None)
    first = record.become_writer(tmp_path, "7", "0", lambda: first.close())
    # Gets the lock, since the first start gives it up when it sees that there is a second.
    second = record.become_writer(tmp_path, "7", "1", lambda: None)
    assert first.closed
    assert not second.closed
    assert record.Record.read(tmp_path) == record.Record("stage", "digest", "7")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A `squeue` that knows of one job, 7, and answers nothing where ``down`` is there."""
    script = tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh
test -e {tmp_path}/down && echo 'squeue: error: Unable to contact slurm controller' >&2 && exit 1
case "$*" in *--jobs=7*) echo RUNNING; exit 0;; esac
echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return script


def test_folders_of_jobs_that_ended_unseen_are_cleared_away(tmp_path, squeue):
    for number in ("7", "8"):
        folder = tmp_path / "jobs" / f"stage-{number}"
        folder.mkdir(parents=True)
        record.Record(folder.name, "digest", number).write(folder)
    (tmp_path / "down").touch()
    assert len(record.running(tmp_path / "jobs")) == 2, "where Slurm does not answer, nothing is taken for ended"
    (tmp_path / "down").unlink()
    assert [job.job_id for job in record.running(tmp_path / "jobs")] == ["7"]
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["stage-7"]


def test_nobody_changes_a_run_while_a_job_of_it_runs(tmp_path, squeue):
    folder = tmp_path / "logs" / "jobs" / "train-000003"
    folder.mkdir(parents=True)
    record.Record(folder.name, "digest", "7").write(folder)
    with pytest.raises(EarlError, match=r"Slurm job 7 \(train-000003\) still runs"), state.exclusive(Run(tmp_path)):
        pass


@pytest.mark.slow
def test_slurm_runs_a_command_and_passes_on_what_it_prints(bench, slurm):
    output = ended(
        bench.start([sys.executable, "-c", "import os; print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'])"], gpu=2), 1
    )
    assert "GPUs 0,1" in output
    assert f"succeeded, but {bench.out} is missing" in output
    assert "at work" in ended(bench.start(bench.writer(0)))
    assert bench.out.read_text() == "whole"
    assert not (bench.path / "job").exists(), "nothing is kept of a job that succeeded"
    output = ended(bench.start(["sh", "-c", "echo wrong; exit 3"]), status=1)
    assert "wrong" in output
    assert [path.suffix for path in sorted((bench.path / "job").iterdir())] == [".out", ".lock", ".lock"]
    assert (bench.path / "job").stat().st_mode & 0o777 == 0o700
    output = ended(bench.start(["true"], slurm_partition="none"), status=2)
    assert "invalid partition" in output
    assert "check its resources in the profile" in output


@pytest.mark.slow
def test_a_launcher_that_was_killed_finds_its_job_again(bench, slurm):
    first, [[job, _]] = bench.start(bench.writer(60)), bench.begun()
    first.kill()
    first.communicate()
    again = bench.start(bench.writer(60))
    assert f"job {job} (stage): found running" in again.stdout.readline()
    bench.hurry()
    ended(again)
    assert bench.lines() == [f"begin {job} {bench.begun()[0][1]}", "end"]


@pytest.mark.slow
def test_a_submission_whose_author_was_killed_is_found_by_its_name(bench, slurm):
    first, [[job, _]] = bench.start(bench.writer(60)), bench.begun()
    first.kill()
    first.communicate()
    # As if it had been killed before it could write down the number.
    folder = bench.path / "job"
    known = record.Record.read(folder)
    record.Record(known.name, known.digest).write(folder)
    again = bench.start(bench.writer(60))
    assert f"job {job} (stage): found running" in again.stdout.readline()
    bench.hurry()
    ended(again)
    assert sum(line.startswith("begin") for line in bench.lines()) == 1


@pytest.mark.slow
def test_a_job_with_another_command_for_the_same_outputs_is_ended_first(bench, slurm):
    first, [[job, _]] = bench.start(bench.writer(60)), bench.begun()
    first.kill()
    first.communicate()
    ended(bench.start(bench.writer(0.5)))
    assert [line.split()[0] for line in bench.lines()] == ["begin", "begin", "end"]
    assert bench.begun(2)[1][0] != job


@pytest.mark.slow
def test_interrupted_it_cancels_and_cancelled_it_fails(bench, slurm):
    child, _ = bench.start(bench.writer(60)), bench.begun()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert slurm.jobs() == {}
    child, [_, [job, _]] = bench.start(bench.writer(60)), bench.begun(2)
    slurm.call("scancel", job)
    assert f"job {job} (stage): ended without a result (CANCELLED)" in ended(child, status=1)
    assert "end" not in bench.lines()


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_waited_for(bench, slurm):
    child, [[job, node]] = bench.start(bench.writer(60), slurm_partition="gpu", gpu=4), bench.begun()
    slurm.call("srun", "--partition=urgent", "--gres=gpu:4", f"--nodelist={node}", "sleep", "1")
    assert bench.begun(2)[1][0] == job
    bench.hurry()
    ended(child)
    assert [line.split()[0] for line in bench.lines()] == ["begin", "begin", "end"]


@pytest.mark.slow
def test_a_job_is_warned_of_its_time_limit_and_goes_on_as_the_same_job(bench, slurm):
    child, [[job, _]] = bench.start(bench.writer(300), runtime=1, warn_seconds=50), bench.begun()
    assert bench.begun(2)[1][0] == job
    bench.hurry()
    assert "this job is timed-out" in ended(child)
    assert [line.split()[0] for line in bench.lines()] == ["begin", "begin", "end"]


@pytest.mark.slow
def test_a_node_that_is_given_up_does_not_make_a_second_writer(bench, slurm):
    child, [[job, node]] = bench.start(bench.writer(60)), bench.begun()
    slurm.kill_node(node)
    try:
        # Its processes go on; Slurm takes the node for dead and starts the job on the other one.
        (_, _), (again, other) = bench.begun(2)
        assert (again, other) == (job, next(name for name in ("n1", "n2") if name != node))
        bench.hurry()
        ended(child)
        assert [line.split()[0] for line in bench.lines()] == ["begin", "begin", "end"], "no clash, one end"
    finally:
        slurm.start_node(node)
        wait_until(lambda: slurm.nodes().get(node) == "idle")


@pytest.mark.slow
def test_four_ranks_on_two_nodes(bench, slurm):
    command = [sys.executable, "-m", "earl", "doctor", "--path", str(bench.path / "runs"), "--minimum-free", "0"]
    output = ended(bench.start(command, nodes=2, tasks_per_node=2, gpu=2, mem_mb=4000), status=1)
    assert output.count("gloo, 4 ranks at 127.0.0.1:") == 4
    assert "FAILED" not in output
    assert f"succeeded, but {bench.out} is missing" in output
