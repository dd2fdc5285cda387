"""How ranks are started: the step of a Slurm job with several nodes, without Slurm."""

import os

import pytest

from earl.execution import launch
from earl.messages.errors import EarlError
from tests.support.programs import program


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The environment of a Slurm job on two nodes; returns the folder where `srun` leaves what it was told."""
    nodes = 'case "$*" in *hostnames*) printf "n1\\nn2\\n";; *) echo "NodeName=n1 NodeAddr=10.0.0.1 CPUs=8";; esac'
    program(tmp_path / "bin", "scontrol", nodes)
    program(tmp_path / "bin", "srun", f'printf "%s\\n" "$@" > {tmp_path}/words; env > {tmp_path}/env; exit 3')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "9")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def test_several_nodes_take_as_many_ranks_each(job):
    assert launch.launch(None, ["train", "--run", "a b"], 8) == 3, "the status is that of srun"
    options, command = (words := (job / "words").read_text().splitlines())[:8], words[8:]
    assert options == [
        "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=2", "--overlap", "--mpi=none",
        "--export=ALL", "--kill-on-bad-exit=1",
    ]  # fmt: skip
    assert command[1:] == ["-m", "earl.execution.launch", "train", "--run", "a b"]
    env = dict(line.split("=", 1) for line in (job / "env").read_text().splitlines() if "=" in line)
    assert env["MASTER_ADDR"] == "10.0.0.1"
    assert 1024 <= int(env["MASTER_PORT"]) < 65536
    assert "WORLD_SIZE" not in env


def test_more_ranks_than_processors_share_them(job, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    launch.launch(None, ["train"], 4)
    assert "--overcommit" in (job / "words").read_text().splitlines()


def test_ranks_that_do_not_fit_the_nodes_are_refused(job):
    with pytest.raises(EarlError, match="3 processes cannot be spread evenly over the 2 nodes"):
        launch.launch(None, ["train"], 3)


def test_where_slurm_does_not_answer_nothing_starts(job):
    program(job / "bin", "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(EarlError, match="Unable to contact slurm controller; try again"):
        launch.launch(None, ["train"], 4)
    assert not (job / "words").exists()


def test_a_task_of_srun_knows_its_rank(monkeypatch):
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    launch.become_rank()
    found = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    assert found == ["5", "1", "8", "4"]
