"""Workers that are Slurm jobs: started through submitit with what a stage's rule asks for, ended by scancel.

Such a job ends with the pool, when it is idle for long, with its client while it works, and with its allocation; Slurm
does not queue it again. What is known of it lies in the pool's folder, so the next workflow ends what a killed one has
left that has not seen it yet.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from earl.launchers import record, slurm, squeue
from earl.launchers.job import Job, Resources
from earl.workers import client, pool

LOOK = 0.2
"""Seconds between two looks whether a worker has come up."""
ASK_SLURM = 5.0
"""Seconds between two questions to Slurm whether a job that has not come up yet still may."""


class Starter:
    """Starts and ends the workers of a pool whose workers are Slurm jobs; see :class:`earl.workers.client.Starter`."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def start(self, slot: pool.Slot) -> None:
        """Submit the job and wait until its worker listens, however long the job is queued, or it has ended."""
        job = _job(slot.pool, slot.name, self.resources)
        record.make_folder(job.folder)
        slot.want(client.identity())
        job_id = slurm.submit(job, stays=True)
        print(f"worker {slot.name}: job {job_id} submitted", file=sys.stderr, flush=True)
        asked = time.monotonic()
        while slot.record() is None:
            time.sleep(LOOK)
            if time.monotonic() > asked + ASK_SLURM:
                if squeue.has_ended(job_id):
                    return
                asked = time.monotonic()

    def end(self, slot: pool.Slot) -> None:
        """Make sure that no worker is alive here.

        Raises:
            EarlError: Slurm does not answer, or the worker goes on though its job has ended.
        """
        _end(slot.pool, [slot.name])


def end_all(of: pool.Pool) -> None:
    """End all workers of a pool.

    Raises:
        EarlError: see :meth:`Starter.end`.
    """
    _end(of, os.listdir(of.file(pool.JOBS)))


def _end(of: pool.Pool, names: list[str]) -> None:
    jobs = {name: job for name in names if (job := _job(of, name, Resources())).folder.is_dir()}
    if not jobs:
        return
    slurm.cancel(squeue.active(",".join(job.slurm_name for job in jobs.values())))
    for name, job in jobs.items():
        pool.Slot(of, name).clear()
        shutil.rmtree(job.folder, ignore_errors=True)


def _job(of: pool.Pool, name: str, resources: Resources) -> Job:
    command = [sys.executable, "-m", "earl", "worker", "--pool", of.path, "--name", name]
    return Job(f"worker-{name}", command, Path(of.file(pool.JOBS)) / name, resources=resources)
