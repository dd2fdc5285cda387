"""What Slurm's queue knows of this user's jobs. Needs no accounting database."""

import getpass
import subprocess

from earl.errors import EarlError

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""States that a job does not leave, but for being queued again; then it has another."""


def _squeue(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", "--states=all", "--user", getpass.getuser(), *options]
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
