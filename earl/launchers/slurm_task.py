"""What runs in a Slurm job: a stage's command with its rank, under the folder's lock, stopped in time.

submitit pickles an object of this class into the job's folder and calls it in every task. Of signals, Slurm's early
warning (USR2) is submitit's: it calls :meth:`StageTask.checkpoint` and queues the job again. A TERM announces the end:
of a job that was cancelled, preempted, or whose node goes; Slurm decides which, so no result is written after it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from submitit.helpers import Checkpointable, DelayedSubmission, TorchDistributedEnvironment

from earl.launchers import child as children
from earl.launchers import record, squeue

UNTIL_KILLED = 900.0
"""Seconds to wait for the end that Slurm announced; preempted jobs may be given some minutes."""


class StageTask(Checkpointable):
    """A stage's command, one rank of it.

    Args:
        command: the command and its arguments.
        folder: the job's folder.
        grace: seconds that the command has to end by itself when its time is over.
    """

    def __init__(self, command: list[str], folder: str, grace: float) -> None:
        self.command = command
        self.folder = folder
        self.grace = grace
        self._child: subprocess.Popen | None = None
        self._is_ending = False

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_child": None, "_is_ending": False}

    def __call__(self) -> None:
        """Run the command.

        Raises:
            CalledProcessError: when it fails. The other ranks are ended by Slurm then.
        """
        signal.signal(signal.SIGTERM, self._ending)
        keep_open = []
        if os.environ["SLURM_PROCID"] == "0":
            start = os.environ.get("SLURM_RESTART_COUNT", "0")
            lock = record.become_writer(Path(self.folder), os.environ["SLURM_JOB_ID"], start, self._superseded)
            keep_open.append(lock.fileno())
        status = None
        if not self._is_ending:
            self._child = children.start(self.command, rank_variables(), keep_open)
            status = self._child.wait()
        if self._is_ending:
            time.sleep(UNTIL_KILLED)
            sys.exit(1)
        if status:
            raise subprocess.CalledProcessError(status, self.command)

    def checkpoint(self) -> DelayedSubmission:
        """End the command; it is started again, and goes on from what it has left on disk."""
        if self._child is not None:
            children.end(self._child, self.grace)
        return DelayedSubmission(self)

    def _ending(self, signum: int, frame: FrameType | None) -> None:
        self._is_ending = True
        if self._child is not None:
            children.end(self._child)

    def _superseded(self) -> None:
        print("a later start of this job has taken over; this one ends", flush=True)
        # The main thread, which waits for the child, must not take its end for a failure of the job.
        self._is_ending = True
        if self._child is not None:
            children.end(self._child)
        os._exit(1)


class WorkerTask:
    """A resident worker, one rank of it: it ends when its job is to end, for whatever reason, and does not come back.

    Whoever wants a worker then starts another one.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> None:
        """Run the worker.

        Raises:
            CalledProcessError: when it is ended or fails, which takes the other ranks along.
        """
        child = children.start(self.command, rank_variables())

        def end(signum: int, frame: FrameType | None) -> None:
            children.end(child)

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, end)
        if status := child.wait():
            raise subprocess.CalledProcessError(status, self.command)


def rank_variables() -> dict[str, str]:
    """Return what torch.distributed reads, for this task of a job with several; nothing for a job with one."""
    found = TorchDistributedEnvironment()
    if found.world_size == 1:
        return {}
    return {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
        "LOCAL_WORLD_SIZE": str(found.local_world_size),
        "MASTER_ADDR": squeue.address(found.master_addr),
        "MASTER_PORT": str(found.master_port),
    }
