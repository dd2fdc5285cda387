"""Stages end with the workflow that started them, and with no other."""

import os
import socket
import subprocess
import sys

import pytest

from earl.execution import processes

STAGE = """
import threading, time
from earl.execution import processes
processes.end_with_workflow()
time.sleep(60 if threading.active_count() > 1 else 0)
"""


def status_of_stage(watched: str, **environment: str) -> int:
    """Run a stage that says what it watches by its end: 0 nothing, 1 a process that is gone."""
    inherited = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    env = inherited | environment | {processes.WATCHED: watched}
    return subprocess.run([sys.executable, "-c", STAGE], env=env, timeout=50).returncode


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize(
    ("machine", "job", "ends"),
    [
        (socket.gethostname() + ":", None, True),
        (socket.gethostname() + ":7", "7", True),
        (socket.gethostname() + ":", "7", False),
        (socket.gethostname() + ":7", "8", False),
        (socket.gethostname() + ":7", None, False),
        ("another:7", "7", False),
    ],
)
def test_a_stage_ends_with_a_workflow_of_its_own_machine_and_slurm_job(gone, machine, job, ends):
    environment = {"SLURM_JOB_ID": job} if job else {}
    assert status_of_stage(f"{machine}:{gone}", **environment) == int(ends)


def test_a_workflow_names_its_machine_and_slurm_job(monkeypatch):
    monkeypatch.setenv(processes.WATCHED, "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    processes.end_stages_with_this_process()
    assert os.environ[processes.WATCHED] == f"{socket.gethostname()}:7:{os.getpid()}"
