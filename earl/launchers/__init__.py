"""Where a stage's command runs: one small interface, and what stands behind it.

| launcher | where | GPUs | ranks |
|---|---|---|---|
| ``local`` | here | that many of the visible ones for itself | processes of this machine |
| ``debug`` | here, in the foreground of this terminal, after saying what was asked for | all | one |
| ``slurm`` | a Slurm job, through submitit | what Slurm gives | tasks on one or more nodes |
| ``workers`` | a Slurm job that stays, if the workflow has a pool of them | what Slurm gives | tasks, as above |

A stage knows nothing of this: it is a command that reads files and writes files. One that was asked to run as several
ranks finds ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` in its
environment, as under torchrun.
"""

import importlib.util
from typing import Protocol

from earl.launchers.job import Job
from earl.messages.errors import EarlError

NAMES = ("local", "debug", "slurm", "workers")


class Launcher(Protocol):
    """Runs commands somewhere."""

    def run(self, job: Job) -> int:
        """Run a job to its end and return the exit status: 0 only when every rank succeeded.

        What the job prints appears on this process's standard output. A job that already runs for the same folder and
        command is waited for instead of started a second time, where the launcher's jobs can outlive it.

        Raises:
            EarlError: when the job cannot be started as asked.
        """
        ...


def create(name: str) -> Launcher:
    """Return the launcher ``name``, one of :data:`NAMES`."""
    match name:
        case "local":
            from earl.launchers.local import LocalLauncher

            return LocalLauncher()
        case "debug":
            from earl.launchers.local import DebugLauncher

            return DebugLauncher()
        case "slurm" | "workers":
            if importlib.util.find_spec("submitit") is None:
                raise EarlError(f"launcher '{name}': needs submitit; in EARL's folder, pip install -e '.[slurm]'")
            if name == "workers":
                from earl.workers.launcher import WorkersLauncher

                return WorkersLauncher()
            from earl.launchers.slurm import SlurmLauncher

            return SlurmLauncher()
    raise EarlError(f"launcher '{name}': is not known; choose one of {', '.join(NAMES)}")
