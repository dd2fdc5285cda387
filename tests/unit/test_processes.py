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


HERE = f"{socket.gethostname()}:"
JOBS = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID")


def status_of_stage(watched: str, **environment: str) -> int:
    """Run a stage that says what it watches by its end: 0 nothing, 1 a process that is gone."""
    inherited = {name: value for name, value in os.environ.items() if name not in JOBS}
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
        (HERE, None, True),
        (HERE + "7", "7", True),
        (HERE, "7", False),
        (HERE + "7", "8", False),
        (HERE + "7", None, False),
        ("another:7", "7", False),
    ],
)
@pytest.mark.parametrize("kind", JOBS)
def test_a_stage_ends_with_a_workflow_of_its_own_machine_and_job(gone, machine, job, ends, kind):
    environment = {kind: job} if job else {}
    assert status_of_stage(f"{machine}:{gone}", **environment) == int(ends)


def test_a_workflow_names_its_machine_and_job(monkeypatch):
    monkeypatch.setenv(processes.WATCHED, "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    processes.end_stages_with_this_process()
    assert os.environ[processes.WATCHED] == f"{socket.gethostname()}:7:{os.getpid()}"
    # A job of submitit's local cluster, whose driver is a job of Slurm.
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "8")
    processes.end_stages_with_this_process()
    assert os.environ[processes.WATCHED] == f"{socket.gethostname()}:8:{os.getpid()}"
