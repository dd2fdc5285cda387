"""Where jobs run: Slurm or this machine, by submitit. Both know the state of all jobs at once."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from snakemake_executor_plugin_submitit.task import Task

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
"""Slurm's states that a job does not leave, unless it is queued again: then it has another."""
AWAY = ("Unable to contact slurm controller", "Socket timed out", "temporarily unable to accept job")
"""What `sbatch` says when it has not been heard, or does not know whether it has."""


class NoAnswer(Exception):
    """The cluster does not say which jobs there are, or whether it took one."""


@dataclass(frozen=True)
class State:
    """A job's state, with why it waits or where it runs."""

    name: str
    state: str
    detail: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def __str__(self) -> str:
        return f"{self.state} {self.detail}".strip()


class Cluster(Protocol):
    """A place for jobs."""

    def submit(self, task: Task, name: str, parameters: dict[str, Any], timeouts: int) -> str:
        """Submit a job and return its id.

        Raises:
            RuntimeError, OSError: the cluster does not take it.
            NoAnswer: it may have taken it.
        """
        ...

    def states(self, job_ids: Iterable[str]) -> dict[str, State]:
        """Return the states of jobs, of others too; one that is missing is not known any more.

        Raises:
            NoAnswer: nobody knows.
        """
        ...

    def cancel(self, job_ids: Iterable[str]) -> None: ...


class Slurm:
    """Needs `sbatch`, `squeue` and `scancel`; no accounting database."""

    def submit(self, task: Task, name: str, parameters: dict[str, Any], timeouts: int) -> str:
        """See :class:`Cluster`."""
        executor = BatchStep(task.folder, max_num_timeout=timeouts, python=f"exec {shlex.quote(sys.executable)}")
        executor.update_parameters(job_name=name, wckey=None, **parameters)
        try:
            return executor.submit(task).job_id
        except FailedJobError as error:
            if any(text in str(error) for text in AWAY):
                raise NoAnswer(str(error).strip()) from error
            raise

    def states(self, job_ids: Iterable[str]) -> dict[str, State]:
        """See :class:`Cluster`. One call for all jobs of this user, in hidden partitions, too."""
        command = ["squeue", "--all", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%A|%T|%N|%r|%j"]
        # Those of squeue would leave jobs out.
        env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        options = {"env": env, "capture_output": True, "text": True, "errors": "replace", "timeout": 60}
        try:
            answer = subprocess.run(command, check=True, **options)
        except subprocess.CalledProcessError as error:
            raise NoAnswer(f"squeue: {error.stderr.strip()}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoAnswer(f"squeue: {error}") from error
        found = {}
        for line in answer.stdout.splitlines():
            if "|" not in line:  # CLUSTER: <name>, where SLURM_CLUSTERS names one
                continue
            job_id, state, nodes, reason, name = line.split("|", 4)
            detail = f"on {nodes}" if nodes and state != "PENDING" else f"({reason})"
            found[job_id] = State(name, state, detail)
        return found

    def cancel(self, job_ids: Iterable[str]) -> None:
        """See :class:`Cluster`."""
        if job_ids := list(job_ids):
            subprocess.run(["scancel", *job_ids], check=False)


OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Environment variables that say which cluster this is: for sbatch as for squeue and scancel."""


class BatchStep(submitit.SlurmExecutor):
    """Has the batch shell become Python, which then gets all signals of the job, and leaves out what was not given."""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        given = self.parameters | {"time": self.parameters["time"] or None}
        return _make_sbatch_string(command=command, folder=self.folder, **given)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # Variables of a job that the driver itself runs in are not the new one's.
        of_job = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_"))]
        hidden = [word for name in of_job if name not in OF_CLUSTER for word in ("-u", name)]
        return ["env", *hidden, "sbatch", str(submission_file_path)]


class Local:
    """Processes of this machine, which outlive the driver as jobs do; for tests of a workflow without a cluster."""

    def submit(self, task: Task, name: str, parameters: dict[str, Any], timeouts: int) -> str:
        """See :class:`Cluster`. Of the parameters, time limit and set-up lines count."""
        # submitit hides GPUs that it was not asked for.
        name = "CUDA_VISIBLE_DEVICES"
        gpus = f"export {name}={shlex.quote(os.environ[name])}" if name in os.environ else f"unset {name}"
        task.command = "\n".join([gpus, *parameters.get("setup", ()), task.command])
        executor = submitit.LocalExecutor(task.folder, max_num_timeout=timeouts)
        executor.update_parameters(
            timeout_min=parameters["time"] or 60 * 24 * 365,
            signal_delay_s=parameters["signal_delay_s"],
            stderr_to_stdout=True,
        )
        return executor.submit(task).job_id

    def states(self, job_ids: Iterable[str]) -> dict[str, State]:
        """See :class:`Cluster`. A job's id is that of its process."""
        return {job_id: State("", "RUNNING", "") for job_id in job_ids if _is_controller(job_id)}

    def cancel(self, job_ids: Iterable[str]) -> None:
        """See :class:`Cluster`."""
        for job_id in job_ids:
            if _is_controller(job_id):
                os.kill(int(job_id), signal.SIGINT)


def _is_controller(pid: str) -> bool:
    """Whether a process lives and is submitit's."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
