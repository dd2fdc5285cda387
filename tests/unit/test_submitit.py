"""The executor without a cluster: what it asks Slurm for, and which job may write."""

import errno
import os
import time
from pathlib import Path

import pytest
from snakemake_interface_common.exceptions import WorkflowError
from submitit.core import submission
from submitit.core.utils import DelayedSubmission

import snakemake_executor_plugin_submitit
from earl.execution import processes
from snakemake_executor_plugin_submitit import clusters, record, resources
from snakemake_executor_plugin_submitit.record import NotTheWriter, Record
from snakemake_executor_plugin_submitit.task import CommandFailed, Task
from tests.support.programs import program


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of Slurm's commands, which come first; of `sbatch` the arguments and environment are kept."""
    program(tmp_path / "bin", "srun", "")
    program(tmp_path / "bin", "sbatch", f'echo "$*" > {tmp_path}/sbatch; env > {tmp_path}/env; echo "batch job 12"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin"


def script(folder: Path, threads: int = 1, **asked: object) -> str:
    """Submit a job; return its batch script."""
    folder.mkdir()
    task = Task("true", str(folder), 30)
    job_id = clusters.Slurm().submit(task, "train-a", resources.parameters("train", threads, asked), timeouts=3)
    assert job_id == "12"
    assert (folder / "12_submitted.pkl").is_file()
    return (folder / "12_submission.sh").read_text()


def test_the_batch_script(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters.sys, "executable", "/opt/a python/bin/python")
    folder = tmp_path / "job"
    asked = {"nodes": 2, "tasks_per_node": 4, "gpu": "h100:8", "mem_mb": 64000, "runtime": 90, "warn_seconds": 120}
    asked |= {"slurm_partition": "fast", "slurm_account": "mine", "constraint": "a100&ib", "qos": "high"}
    asked |= {"reservation": "maintenance", "exclusive": True, "slurm_extra": "'--nice=7 --mail-type END --no-kill'"}
    asked |= {"setup": "module load cuda\nexport A='b c'", "tmpdir": "/tmp", "disk_mb": 50000, "granularity": "stage"}
    assert (
        script(folder, 8, **asked)
        == f"""\
#!/bin/bash

# Parameters
#SBATCH --account=mine
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --gpus-per-node=h100:8
#SBATCH --job-name=train-a
#SBATCH --mail-type=END
#SBATCH --mem=64000M
#SBATCH --nice=7
#SBATCH --no-kill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output={folder}/%j_0_log.out
#SBATCH --partition=fast
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=maintenance
#SBATCH --signal=B:USR2@120
#SBATCH --time=90

# setup
module load cuda
export A='b c'

# command
export SUBMITIT_EXECUTOR=slurm
exec '/opt/a python/bin/python' -u -m submitit.core._submit {folder}
"""
    )


def test_what_is_not_asked_for_is_left_to_slurm(slurm, tmp_path):
    lines = [line for line in script(tmp_path / "job").splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --job-name=train-a",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={tmp_path}/job/%j_0_log.out",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@60",
    ]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"gpu": 4}, "--gpus-per-node=4"),
        ({"gpu": "h100:8"}, "--gpus-per-node=h100:8"),
        ({"gres": "gpu:h100:2,nvme:1"}, "--gres=gpu:h100:2,nvme:1"),
        ({"exclusive": "user"}, "--exclusive=user"),
        ({"exclusive": 1}, "--exclusive"),
        ({"cpus_per_task": 6}, "--cpus-per-task=6"),
        ({"mem_mb_per_cpu": 2000, "mem_mb": 1000}, "--mem-per-cpu=2000M"),
        ({"runtime": 120}, "--time=120"),
        ({"slurm_extra": "--comment='two words'"}, "--comment='two words'"),
        ({"slurm_extra": "--signal=USR1@10"}, "--signal=USR1@10"),
    ],
)
def test_a_resource_becomes_an_option(slurm, tmp_path, asked, line):
    assert f"#SBATCH {line}" in script(tmp_path / "job", **asked).splitlines()


@pytest.mark.parametrize("asked", [{"gpu": 0}, {"gpu": "h100:0"}, {"exclusive": False}, {"exclusive": "0"}])
def test_what_is_switched_off_is_no_option(slurm, tmp_path, asked):
    text = script(tmp_path / "job", **asked)
    assert "gpu" not in text
    assert "exclusive" not in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpu": "four"}, "rule train: resource gpu='four' should be a number of GPUs, or type:number"),
        ({"gpu": "h100"}, "gpu='h100' should be"),
        ({"gpu": -1}, "gpu=-1 should be"),
        ({"nodes": 0}, "nodes=0 should be a whole number, 1 or more"),
        ({"tasks_per_node": "two"}, "tasks_per_node='two' should be"),
        ({"mem_mb": "64G"}, "mem_mb='64G' should be a whole number"),
        ({"slurm_partition": "a b"}, "slurm_partition='a b' should be text without spaces"),
        ({"exclusive": "maybe"}, "exclusive='maybe' should be"),
        ({"runtime": 1, "warn_seconds": 60}, "warn_seconds=60 is not below runtime=1 minutes"),
        ({"slurm_extra": "-p fast"}, "should be long options of sbatch.*not '-p'"),
        ({"slurm_extra": "--nice=1 stray"}, "not 'stray'"),
        ({"slurm_extra": "--nice=1 --array=0-3"}, "slurm_extra='--nice=1 --array=0-3': --array is the executor's own"),
        ({"slurm_extra": "--clusters=b"}, "--clusters is"),
        ({"slurm_extra": "--no-requeue"}, "--no-requeue is"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(asked, message):
    with pytest.raises(WorkflowError, match=message):
        resources.parameters("train", 1, asked)


def test_a_driver_that_is_itself_a_job_keeps_its_variables_to_itself(slurm, tmp_path, monkeypatch):
    of_cluster = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SRUN_CPUS_PER_TASK", *of_cluster, "OTHER"):
        monkeypatch.setenv(name, "1")
    script(tmp_path / "job")
    found = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {*of_cluster, "OTHER"} <= found
    assert not found & {"SLURM_JOB_ID", "SLURM_NTASKS", "SRUN_CPUS_PER_TASK"}
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_one_question_tells_the_states_of_all_jobs(slurm, tmp_path):
    lines = "7|RUNNING|n[1-2]|None|a\n8|PENDING||Resources|b"
    program(slurm, "squeue", f"echo call >> {tmp_path}/calls; echo '{lines}'")
    states = clusters.Slurm().states(["7", "8", "9"])
    assert {job: str(state) for job, state in states.items()} == {"7": "RUNNING on n[1-2]", "8": "PENDING (Resources)"}
    assert (tmp_path / "calls").read_text().count("call") == 1


def test_no_job_is_left_out_for_what_is_set_or_named_elsewhere(slurm, monkeypatch):
    """`squeue` reads variables as options, hides partitions, and may name a cluster first; names are any bytes."""
    lines = r"CLUSTER: b\n7|RUNNING|n1|None|a\n8|PENDING||Priority|caf\351|x\n"
    filtered = '[ -n "$SQUEUE_PARTITION$SQUEUE_FORMAT" ]'
    program(slurm, "squeue", f"case \" $* \" in *' --all '*) {filtered} || printf '{lines}';; esac")
    monkeypatch.setenv("SQUEUE_PARTITION", "fast")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    states = clusters.Slurm().states(["7", "8"])
    assert {job: state.name for job, state in states.items()} == {"7": "a", "8": "caf\ufffd|x"}


def test_a_submission_that_is_not_heard_is_no_refusal(slurm, tmp_path):
    away = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    program(slurm, "sbatch", f"echo '{away}' >&2; exit 1")
    with pytest.raises(clusters.NoAnswer, match="Unable to contact"):
        script(tmp_path / "a")
    program(slurm, "sbatch", "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1")
    with pytest.raises(RuntimeError, match="invalid partition"):
        script(tmp_path / "b")


def test_where_squeue_does_not_answer_nobody_knows(slurm):
    program(slurm, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(clusters.NoAnswer, match="Unable to contact"):
        clusters.Slurm().states(["7"])
    (slurm / "squeue").unlink()
    with pytest.raises(clusters.NoAnswer, match="squeue"):
        clusters.Slurm().states(["7"])


# Which job writes


def recorded(folder: Path, job_id: str) -> Record:
    known = Record("train-a", [str(folder / "out")], "digest", job_id)
    known.write(folder)
    return known


def test_only_the_recorded_job_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD_PATIENCE", 0.3)
    with pytest.raises(NotTheWriter, match="names job None, so job 7 must not write"):
        record.become_writer(tmp_path, "7", 0, lambda: None)
    assert Record.read(tmp_path) is None
    known = recorded(tmp_path, "7")
    assert Record.read(tmp_path) == known
    with pytest.raises(NotTheWriter, match="names job 7, so job 8 must not write"):
        record.become_writer(tmp_path, "8", 0, lambda: None)
    record.become_writer(tmp_path, "7", 0, lambda: None).close()


@pytest.mark.parametrize(("job_id", "start"), [("7", 1), ("8", 0)])
def test_a_later_start_or_job_takes_over(tmp_path, monkeypatch, job_id, start):
    monkeypatch.setattr(record, "LOOK", 0.05)
    recorded(tmp_path, "7")
    first = record.become_writer(tmp_path, "7", 0, lambda: first.close())
    recorded(tmp_path, job_id)
    # Gets the lock, since the first gives it up when it reads the claim.
    second = record.become_writer(tmp_path, job_id, start, lambda: None)
    assert first.closed
    second.close()


def test_an_earlier_start_does_not_begin_after_a_later_one(tmp_path):
    recorded(tmp_path, "7")
    record.become_writer(tmp_path, "7", 2, lambda: None).close()
    with pytest.raises(NotTheWriter, match="a later start of job 7 has begun"):
        record.become_writer(tmp_path, "7", 1, lambda: None)


def test_a_start_that_comes_too_late_says_nothing_of_what_became_of_the_job(tmp_path, monkeypatch):
    """As submitit runs it, which writes an exception as the job's result."""
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_LOCAL_LOCALID", "0")
    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", "0")
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "1")
    monkeypatch.setenv("SUBMITIT_LOCAL_NNODES", "1")
    monkeypatch.setenv("SUBMITIT_LOCAL_NODEID", "0")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    recorded(tmp_path, "7")
    record.become_writer(tmp_path, "7", 2, lambda: None).close()
    DelayedSubmission(Task("true", str(tmp_path), 0)).dump(tmp_path / "7_submitted.pkl")
    with pytest.raises(SystemExit, match="a later start of job 7"):
        submission.process_job(tmp_path)
    assert not list(tmp_path.glob("*result*"))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_system_that_is_away_is_no_result(tmp_path, monkeypatch, code):
    def away(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(snakemake_executor_plugin_submitit, "pickle_load", away)
    assert snakemake_executor_plugin_submitit.Watched("train-a", tmp_path, "7").result() is None


def test_a_job_does_not_begin_while_an_earlier_one_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LOCK_PATIENCE", 0.3)
    monkeypatch.setattr(record, "LOOK", 3600)
    recorded(tmp_path, "7")
    first = record.become_writer(tmp_path, "7", 0, lambda: None)
    with pytest.raises(NotTheWriter, match="an earlier job still writes"):
        record.become_writer(tmp_path, "7", 1, lambda: None)
    first.close()


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / record.RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"record\.json: is damaged"):
        Record.read(tmp_path)


def test_a_command_leaves_nothing_behind_and_tells_its_status(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("snakemake_executor_plugin_submitit.task.ANNOUNCEMENT", 0)
    recorded(tmp_path, "7")
    with pytest.raises(CommandFailed, match="exit status 3"):
        Task(f"sleep 600 & echo $! > {tmp_path}/pid; exit 3", str(tmp_path), 0)()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while processes.is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
