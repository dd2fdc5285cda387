"""A Snakemake executor over submitit: jobs on Slurm that outlive the driver, and one watcher for all of them."""

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase
from snakemake_interface_executor_plugins.utils import format_cli_arg
from submitit.core.utils import JobPaths, pickle_load

from snakemake_executor_plugin_submitit import resources
from snakemake_executor_plugin_submitit.clusters import Cluster, Local, NoAnswer, Slurm, State
from snakemake_executor_plugin_submitit.record import Record
from snakemake_executor_plugin_submitit.task import Task

UNDER_WAY = 3.0
"""Seconds after which a submission whose driver was killed has reached Slurm, as a rule; its job claims in vain."""
UNNOTICED = 3600.0
"""Seconds after which no driver is about to read a result any more."""
TAIL = 30
"""Lines of a failed job's log that are shown."""


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """Settings of the command line and of profiles, there as `submitit-<name>`."""

    cluster: str = field(
        default="slurm",
        metadata={
            "help": "Where jobs run: slurm; local, processes of this machine; or debug, one after the other in the "
            "driver's foreground.",
            "choices": ["slurm", "local", "debug"],
        },
    )
    folder: Path = field(
        default=Path(".snakemake/submitit"),
        metadata={
            "help": "Folder for the jobs' records and logs, on a file system that all nodes share and that has locks.",
            "type": Path,
        },
    )
    seconds: float = field(
        default=5.0,
        metadata={"help": "Seconds between two calls of squeue, each for all jobs together.", "type": float},
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
    pass_group_args=True,
)


@dataclass
class Watched:
    """A job that the driver waits for."""

    name: str
    folder: Path
    job_id: str
    said: str = ""
    missing_since: float | None = None
    """When the job was first found to have ended without a result."""
    submitted: float = field(default_factory=time.time)

    @property
    def paths(self) -> JobPaths:
        return JobPaths(self.folder, self.job_id, 0)

    def result(self) -> tuple[str, Any] | None:
        """Return what submitit wrote at the job's end, if it is there: success or error, and a traceback."""
        try:
            self.folder.chmod(0o700)  # has a network file system look again
            return pickle_load(self.paths.result_pickle)
        except (OSError, EOFError):  # not there, or the file system is away
            return None

    def __str__(self) -> str:
        return f"job {self.job_id} ({self.name})"


class Executor(RemoteExecutor):
    """Submits each Snakemake job as one job of submitit and waits for all of them together."""

    def __post_init__(self) -> None:
        settings = self.workflow.executor_settings
        self.folder = Path(settings.folder).absolute()
        self.cluster: Cluster | None = {"slurm": Slurm, "local": Local, "debug": lambda: None}[settings.cluster]()
        self.watched: dict[str, Watched] = {}
        self._states: dict[str, State] = {}
        self._asked = -settings.seconds
        self._silence = ""
        # What cannot be right is refused before the first job is submitted.
        jobs = {job.name: job for job in self.dag.needrun_jobs() if not job.is_local}
        for job in jobs.values():
            # Some depend on inputs that are not there yet.
            known = {name: value for name, value in job.resources.items() if str(value) != "<TBD>"}
            resources.parameters(job.name, job.threads, known)
        if jobs and self.cluster is not None:
            # Later on it is waited for; at the start somebody looks on, and it may never have been there.
            try:
                self.cluster.states([])
            except NoAnswer as error:
                raise WorkflowError(f"the cluster does not answer: {error}") from error
        self._clear_up()

    def _clear_up(self) -> None:
        """Remove the folders of jobs that succeeded when no driver waited for them any more."""
        for path in self.folder.glob("*/*_0_result.pkl"):
            with contextlib.suppress(OSError):
                left = Watched("", path.parent, path.name.split("_")[0])
                is_old = time.time() - path.stat().st_mtime > UNNOTICED
                if is_old and (result := left.result()) is not None and result[0] == "success":
                    shutil.rmtree(path.parent)

    @property
    def cores(self) -> str:
        """What the Snakemake on the node may use: what it has, not what the driver's machine has."""
        return "all"

    # Submission

    def format_job_exec(self, job: JobExecutorInterface) -> str:
        """Return the command for a node, with the values of --config as they were given.

        Snakemake quotes them as Python does, so that the shell would double backslashes and expand a `$` beside a `'`.
        """
        command = super().format_job_exec(job)
        given = self.workflow.config_settings.config_args
        if not given:
            return command
        return command.replace(format_cli_arg("--config", given), shlex.join(["--config", *given]))

    def run_job(self, job: JobExecutorInterface) -> None:
        """Submit a job, or find it where an earlier driver submitted it."""
        info = SubmittedJobInfo(job)
        if self.cluster is None:
            self._run_here(info)
            return
        name = job_name(job)
        folder = self.folder / name
        try:
            parameters = resources.parameters(job.name, job.threads, job.resources)
            recorded = Record(name, outputs(job), digest(job, parameters))
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            job_id, verb = self._place(job, folder, recorded, parameters)
        except (OSError, RuntimeError, ValueError, WorkflowError) as error:
            self.report_job_error(info, msg=f"{name} was not submitted: {error}\n")
            return
        watched = Watched(name, folder, job_id)
        self.watched[job_id] = watched
        self.logger.info(f"{watched}: {verb}, log: {watched.paths.stdout}")
        info.external_jobid, info.aux = job_id, {"watched": watched}
        self.report_job_submission(info)

    def _run_here(self, info: SubmittedJobInfo) -> None:
        command = self.format_job_exec(info.job)
        print(command, flush=True)
        info.aux = {"status": subprocess.run(command, shell=True, check=False).returncode}
        self.report_job_submission(info)

    def _place(
        self, job: JobExecutorInterface, folder: Path, recorded: Record, parameters: dict[str, Any]
    ) -> tuple[str, str]:
        """Find or submit a job, once the cluster answers; return its id and which of the two was done."""
        is_told = False
        while True:
            try:
                if job_id := self._find(folder, recorded):
                    return job_id, "found running"
                return self._submit(job, folder, recorded, parameters), "submitted"
            except NoAnswer as error:
                if not is_told:
                    self.logger.warning(f"{recorded.name}: the cluster does not answer; waiting: {error}")
                is_told = True
                time.sleep(self.workflow.executor_settings.seconds)

    def _find(self, folder: Path, wanted: Record) -> str | None:
        """Return the id of a job that runs this command now, and cancel others that would write its outputs."""
        recorded = Record.read(folder)
        if recorded is None:
            return None
        if recorded.job_id is None:
            # A driver was killed while it submitted. What it submitted can be told by the name.
            time.sleep(UNDER_WAY)
        known = [recorded.job_id] if recorded.job_id else []
        alive = {
            job_id
            for job_id, state in self.cluster.states(known).items()
            if not state.has_ended and (job_id in known or state.name == wanted.name)
        }
        mine = recorded.job_id if recorded.digest == wanted.digest else None
        if mine and Watched(wanted.name, folder, mine).result() is not None:
            mine = None
        self.cluster.cancel(alive - {mine})
        return mine if mine in alive else None

    def _submit(self, job: JobExecutorInterface, folder: Path, recorded: Record, parameters: dict[str, Any]) -> str:
        for pattern in ("*.pkl", "*.sh", "*.save_tmp"):
            for path in folder.glob(pattern):
                path.unlink()
        recorded.write(folder)
        # Half of the time until the limit is the command's, the rest is for queueing the job again.
        task = Task(self.format_job_exec(job), str(folder), parameters["signal_delay_s"] / 2)
        timeouts = int(job.resources.get("timeouts", resources.TIMEOUTS))
        job_id = self.cluster.submit(task, recorded.name, parameters, timeouts)
        Record(recorded.name, recorded.outputs, recorded.digest, job_id).write(folder)
        return job_id

    # Watching

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Report the jobs that have ended, by their result files and by one call of squeue; yield the others."""
        if active_jobs and self.cluster is not None:
            self._ask()
        for info in active_jobs:
            if "status" in info.aux:
                if info.aux["status"]:
                    self.report_job_error(info, msg=f"exit status {info.aux['status']}. ")
                else:
                    self.report_job_success(info)
                continue
            watched = info.aux["watched"]
            result = watched.result()
            if result is None and not self._is_lost(watched):
                yield info
                continue
            self.watched.pop(watched.job_id)
            if result is not None and result[0] == "success":
                shutil.rmtree(watched.folder, ignore_errors=True)
                self.report_job_success(info)
            else:
                self.report_job_error(info, msg=self._failure(info.job, watched, result))

    def _ask(self) -> None:
        """Ask for the states of all jobs if it is time, and log those that have changed."""
        if time.monotonic() < self._asked + self.workflow.executor_settings.seconds:
            return
        try:
            self._states, silence = self.cluster.states(list(self.watched)), ""
        except NoAnswer as error:
            silence = str(error)
        self._asked = time.monotonic()
        if silence != self._silence:
            self.logger.warning(f"the cluster {'does not answer; waiting: ' + silence if silence else 'answers again'}")
            self._silence = silence
        for watched in list(self.watched.values()):
            state = self._states.get(watched.job_id)
            if not silence and state is not None and str(state) != watched.said:
                again = "queued again, " if state.state == "PENDING" and watched.said[:7] not in ("", "PENDING") else ""
                self.logger.info(f"{watched}: {again}{state}")
                watched.said = str(state)

    def _is_lost(self, watched: Watched) -> bool:
        """Whether a job without a result has ended, so long ago that a shared file system would show the result."""
        if self._silence:
            return False
        state = self._states.get(watched.job_id)
        if state is not None and not state.has_ended:
            watched.missing_since = None
            return False
        if watched.missing_since is None or self._asked < watched.missing_since:
            watched.missing_since = watched.missing_since or time.monotonic()
            return False
        return time.monotonic() > watched.missing_since + self.workflow.execution_settings.latency_wait

    def _failure(self, job: JobExecutorInterface, watched: Watched, result: tuple[str, Any] | None) -> str:
        if result is None:
            state = self._states.get(watched.job_id)
            cause = f"ended without a result ({state or 'the cluster does not know it any more'})"
        else:
            cause = result[1].strip().splitlines()[-1].rpartition("CommandFailed: ")[2]
        log = watched.paths.stdout
        said = f"{watched}: {cause}; its log: {log}\n"
        if not any(has_said(Path(path), watched.submitted) for path in job.log):
            with contextlib.suppress(OSError):
                said += "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]) + "\n"
        return said

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Cancel all jobs, those that are being looked at just now too."""
        if self.cluster is not None:
            self.cluster.cancel(list(self.watched))


def job_name(job: JobExecutorInterface) -> str:
    """Return a job's name: for people, and unlike that of jobs with other outputs."""
    if job.is_group():
        words = sorted(set(job.rules))
    else:
        words = [job.name, *(Path(str(word)).name for word in job.wildcards_dict.values())]
    text = re.sub(r"[^\w.-]+", "_", "-".join(words))
    return f"{text[:60]}-{_sha256(outputs(job) or job.properties())[:12]}"


def outputs(job: JobExecutorInterface) -> list[str]:
    """Return the absolute paths of what a job makes."""
    return sorted(str(Path(path).absolute()) for path in job.output)


def digest(job: JobExecutorInterface, parameters: dict[str, Any]) -> str:
    """Return the SHA-256 of what a job does and asks for: the same job of another driver has the same."""
    singles = job.jobs if job.is_group() else [job]
    done = []
    for single in sorted(singles, key=outputs):
        # A shell command says all; what its inputs are may change with what is there already.
        known = json.loads(single.properties())
        said = ("rule", "output", "wildcards") + (() if single.shellcmd else ("input", "params"))
        done.append([single.shellcmd, *(known.get(key) for key in said)])
    return _sha256([done, parameters])


def has_said(log: Path, since: float) -> bool:
    """Whether something was written into a rule's log after a time."""
    try:
        status = log.stat()
    except OSError:
        return False
    return status.st_size > 0 and status.st_mtime >= since


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
