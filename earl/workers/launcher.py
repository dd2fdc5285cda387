"""How launchers have a stage's command run by a worker: the launcher `workers`, and what `local` does with GPUs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from earl.launchers import record
from earl.launchers.job import Job
from earl.workers import EVERY_ITERATION, KINDS, client, pool


class WorkersLauncher:
    """Has commands run by workers of the workflow's pool, started with what the commands ask for."""

    def run(self, job: Job) -> int:
        """See :class:`earl.launchers.Launcher`.

        A command that comes once in a run, for which a worker would wait in vain for more, is a job of its own; so is
        one whose worker was lost, and one that already runs as such a job.
        """
        status = self._in_worker(job)
        if status is None:
            from earl.launchers.slurm import SlurmLauncher

            return SlurmLauncher().run(job)
        if status == 0 and (missing := job.missing_outputs()):
            print(f"{job.name}: succeeded, but {missing[0]} is missing", flush=True)
            return 1
        return status

    def _in_worker(self, job: Job) -> int | None:
        """Return the exit status of a command that a worker has run, None where none has."""
        argv, found = stage(job.command), pool.from_environment(pool.SLURM)
        if found is None or not argv or argv[0] not in EVERY_ITERATION or record.Record.read(job.folder):
            return None
        from earl.workers.jobs import Starter

        # Two rules may ask for the same kind of worker and for different resources.
        kind = f"{KINDS[argv[0]]}.{job.resources.digest[:6]}"
        return client.ask(found, kind, argv, Starter(job.resources))


def in_worker_with_gpus(job: Job) -> int | None:
    """Have a worker of this machine that has as many GPUs for itself as the job asks for run its command.

    Return the exit status; None where no GPU is asked for, there are no workers, or they do not take the command.

    Raises:
        EarlError: the machine has fewer GPUs.
    """
    argv, found = stage(job.command), pool.from_environment()
    if found is None or not job.resources.gpu or not argv or argv[0] not in KINDS:
        return None
    count = job.resources.gpu
    return client.ask(found, f"{KINDS[argv[0]]}{pool.GPUS}{count}", argv, client.Twins(count))


def end_an_idle_worker() -> None:
    """Where the workflow has workers on this machine, have one that has no work give up its GPUs."""
    if found := pool.from_environment():
        found.end_an_idle_worker()


def stage(command: Sequence[str]) -> list[str]:
    """Return what a command gives to `earl` of this environment, nothing where it is another command."""
    if list(command[:3]) == [sys.executable, "-m", "earl"]:
        return list(command[3:])
    is_script = command and Path(command[0]) == Path(sys.executable).parent / "earl"
    return list(command[1:]) if is_script else []
