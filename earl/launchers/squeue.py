"""What Slurm says of this user's jobs and of its nodes. Needs no accounting database."""

import os
import re
import subprocess

from earl.messages.errors import EarlError

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""States that a job does not leave, but for being queued again; then it has another."""


def _squeue(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", "--states=all", "--user", str(os.getuid()), *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise EarlError("squeue: is not found; start this where Slurm's commands are on PATH") from error


def active(name: str) -> list[str]:
    """Return the numbers of all jobs of this name that have not ended, the oldest first.

    Raises:
        EarlError: when Slurm does not answer: then nobody knows, and submitting might make a second writer.
    """
    answer = _squeue(f"--name={name}", "--format=%A %T")
    if answer.returncode:
        raise EarlError(f"squeue does not answer ({answer.stderr.strip()}); try again when Slurm is up")
    found = [line.split() for line in answer.stdout.splitlines()]
    return sorted((number for number, state in found if state not in ENDED), key=int)


def state(job_id: str) -> str | None:
    """Return a job's state; '' when Slurm has forgotten the job, None when it does not answer."""
    answer = _squeue(f"--jobs={job_id}", "--format=%T")
    if answer.returncode:
        return "" if "Invalid job id" in answer.stderr else None
    return answer.stdout.strip()


def has_ended(job_id: str) -> bool:
    """Return whether Slurm says that a job has ended; False when it does not answer."""
    found = state(job_id)
    return found is not None and (not found or found in ENDED)


def address(node: str) -> str:
    """Return where Slurm itself reaches a node: its name need not mean anything to the resolver."""
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, check=False).stdout
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node


def this_node() -> str:
    """Return where other nodes reach the one that this job runs on.

    Raises:
        EarlError: this is no job.
    """
    try:
        return address(os.environ["SLURMD_NODENAME"])
    except KeyError as error:
        raise EarlError("SLURMD_NODENAME is not set: this is no process of a Slurm job") from error
