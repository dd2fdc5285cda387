"""What runs in a job: the command that Snakemake gave, claimed first and stopped in time.

submitit pickles an object of this class into the job's folder and calls it in the batch step. Slurm's warning before
the time limit (USR2) is submitit's: it calls :meth:`Task.checkpoint` and queues the job again. A TERM announces the
end: the job was cancelled or preempted, or its node goes. Slurm decides which, so no result is written after it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from submitit.helpers import DelayedSubmission

from snakemake_executor_plugin_submitit import record

UNTIL_KILLED = 900.0
"""Seconds to wait for the end that Slurm announced: partitions and QOS may grant preempted jobs some minutes."""
ANNOUNCEMENT = 2.0
"""Seconds for a TERM to arrive here when the command, which gets it too, has already ended of it."""
SUPERSEDED_GRACE = 5.0
"""Seconds that a superseded command has to end in good order: `srun` ends its ranks on other nodes."""


class CommandFailed(Exception):
    """The command ended with another status than 0."""


class Task:
    """A job's command.

    Args:
        command: for bash.
        folder: the job's folder.
        grace: seconds that the command has to end by itself at the time limit.
    """

    def __init__(self, command: str, folder: str, grace: float) -> None:
        self.command, self.folder, self.grace = command, folder, grace
        self._child: subprocess.Popen | None = None
        self._is_ending = False

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_child": None, "_is_ending": False}

    def __call__(self) -> None:
        """Run the command to its end.

        Raises:
            CommandFailed: it failed.
            NotTheWriter: another job is to write the outputs.
            SystemExit: a later start of this job does.
        """
        signal.signal(signal.SIGTERM, self._announced)
        # submitit's local cluster passes on the variables of a Slurm job that the driver runs in.
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or os.environ["SLURM_JOB_ID"]
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        try:
            lock = record.become_writer(Path(self.folder), job_id, start, self._superseded)
        except record.Superseded as error:
            sys.exit(str(error))  # submitit would write an exception as what became of the job
        status = 0
        if not self._is_ending:
            # The command keeps the lock, too: should this process be killed, the next still waits for the command.
            self._child = subprocess.Popen(
                ["/bin/bash", "-c", self.command], start_new_session=True, pass_fds=[lock.fileno()]
            )
            try:
                status = self._child.wait()
            finally:
                self._end(0.5)
        if status:
            time.sleep(ANNOUNCEMENT)
        if self._is_ending:
            time.sleep(UNTIL_KILLED)
            sys.exit(1)
        if status:
            raise CommandFailed(f"exit status {status}")

    def checkpoint(self) -> DelayedSubmission:
        """End the command; it starts again and continues from what it has left on disk."""
        self._end(self.grace)
        return DelayedSubmission(self)

    def _announced(self, *_: object) -> None:
        # All processes of the job have got the signal. Let them end.
        self._is_ending = True

    def _superseded(self) -> None:
        print("another start of this job, or another job, has taken over; this one ends", flush=True)
        # The main thread, which waits for the command, must not take its end for a failure of the job.
        self._is_ending = True
        self._end(SUPERSEDED_GRACE)
        os._exit(1)

    def _end(self, grace: float) -> None:
        """Ask the command and what it has started to end, and kill what is left after `grace` seconds.

        May run in a signal handler that interrupted `wait()`, whose lock `poll()` would need.
        """
        if self._child is None:
            return
        deadline = time.monotonic() + grace
        self._signal(signal.SIGTERM)
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True
