"""A stage as a Slurm job: submitted through submitit, or found again where it already runs, and waited for.

What submitit cannot tell here is asked of squeue, which needs no accounting database: whether a job that has left no
result has ended. A job that was queued again (time limit, preemption, lost node) keeps its number and is waited for.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmJob

from earl.execution import processes
from earl.launchers import child, record, squeue
from earl.launchers.job import Job, Resources
from earl.launchers.slurm_task import StageTask, WorkerTask
from earl.messages.errors import EarlError

LOOK_FOR_RESULT = 0.5
"""Seconds between two looks for a job's result, a file."""
ASK_SLURM = 5.0, 30.0
"""Seconds between two questions to Slurm: at first, and at most; each takes a little longer than the one before."""
RESULT_PATIENCE = 5.0
"""Seconds that the result of an ended job may take to appear through a shared file system."""
FIND_PATIENCE = 3.0
"""Seconds after which a submission whose author was killed has reached Slurm, or never will."""


class SlurmLauncher:
    """Runs each job as one Slurm job of the same name."""

    def run(self, job: Job) -> int:
        """See :class:`earl.launchers.Launcher`. Interrupted, it cancels the job; killed, it leaves it running."""
        record.make_folder(job.folder)
        with processes.lock(job.folder / record.LAUNCHER), _interruptible():
            job_id = find(job)
            if job_id is None:
                job_id = submit(job)
                print(f"job {job_id} ({job.name}): submitted", flush=True)
            else:
                print(f"job {job_id} ({job.name}): found running, waiting for it", flush=True)
            try:
                is_done = wait(job, job_id)
            except KeyboardInterrupt:
                cancel([job_id])
                raise
        if is_done and (missing := job.missing_outputs()):
            # Half of its outputs can be gone when a workflow that started anew cleared them away while it ran.
            print(f"job {job_id} ({job.name}): succeeded, but {missing[0]} is missing", flush=True)
            return 1
        if is_done:
            # What it printed has been passed on.
            shutil.rmtree(job.folder, ignore_errors=True)
        return 0 if is_done else 1


def find(job: Job) -> str | None:
    """Return the number of a job that runs this command now, and make sure that no other job writes its outputs.

    The record says which job it is. One without a number comes from a launcher that was killed while it submitted.
    """
    recorded = record.Record.read(job.folder)
    if recorded is None:
        return None
    running = squeue.active(job.slurm_name)
    if recorded.job_id is None and not running:
        time.sleep(FIND_PATIENCE)
        running = squeue.active(job.slurm_name)
    mine = recorded.job_id or (running[0] if running else None)
    is_wanted = mine in running and recorded.digest == job.digest
    cancel([number for number in running if not (is_wanted and number == mine)])
    if not is_wanted:
        return None
    record.Record(job.name, job.digest, mine).write(job.folder)
    return mine


def submit(job: Job, stays: bool = False) -> str:
    """Submit a job and return its number.

    Args:
        stays: it is a resident worker, which nothing brings back once it has ended.

    Raises:
        EarlError: when Slurm refuses it.
    """
    _clear(job.folder)
    record.Record(job.name, job.digest).write(job.folder)
    if stays:
        task = WorkerTask(job.command)
    else:
        # Half of the time until the limit is the command's, the rest is for queueing the job again.
        task = StageTask(job.command, str(job.folder.absolute()), job.resources.warn_seconds / 2)
    try:
        executor = submitit.SlurmExecutor(job.folder, max_num_timeout=job.resources.timeouts)
        executor.update_parameters(**parameters(job.resources, job.slurm_name, requeue=not stays))
        with _outside_of_jobs():
            submitted = executor.submit(task)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        (job.folder / record.RECORD).unlink(missing_ok=True)
        raise EarlError(
            f"{job.name}: Slurm did not take the job ({error}); check its resources in the profile"
        ) from error
    record.Record(job.name, job.digest, submitted.job_id).write(job.folder)
    return submitted.job_id


def parameters(resources: Resources, name: str, requeue: bool = True) -> dict[str, object]:
    """Return what submitit writes into the batch script."""
    wanted = {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpu or None,
        "mem": f"{resources.mem_mb}M" if resources.mem_mb else None,
        "time": resources.runtime,
        "partition": resources.slurm_partition,
        "account": resources.slurm_account,
        "constraint": resources.constraint,
        "qos": resources.qos,
        "signal_delay_s": resources.warn_seconds,
        "stderr_to_stdout": True,
        # srun no longer takes over the processors that sbatch was asked for; one dead rank ends the others.
        "srun_args": [f"--cpus-per-task={resources.cpus_per_task}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue" if requeue else "no_requeue": True},
    }
    return {name: value for name, value in wanted.items() if value is not None}


def wait(job: Job, job_id: str) -> bool:
    """Print what the job prints until it has ended; return whether all of its ranks succeeded."""
    submitted: SlurmJob = SlurmJob(job.folder, job_id, tasks=range(job.resources.ranks))
    results = [submitted.task(rank).paths.result_pickle for rank in range(job.resources.ranks)]
    log = submitted.task(0).paths.stdout
    log.touch()
    pause, asked, had_ended = ASK_SLURM[0], time.monotonic(), False
    with log.open("rb") as stream:
        while not all(path.exists() for path in results):
            child.follow(stream, sys.stdout.buffer)
            time.sleep(LOOK_FOR_RESULT)
            if time.monotonic() > asked + (RESULT_PATIENCE if had_ended else pause):
                asked, pause = time.monotonic(), min(pause * 1.2, ASK_SLURM[1])
                has_ended = squeue.has_ended(job_id)
                if had_ended and has_ended:
                    break
                had_ended = has_ended
        child.follow(stream, sys.stdout.buffer)
    if not all(path.exists() for path in results):
        state = squeue.state(job_id) or "Slurm has forgotten it"
        print(f"job {job_id} ({job.name}): ended without a result ({state}); its log: {log}", flush=True)
        return False
    failed = [error for task in range(len(results)) if (error := submitted.task(task).exception())]
    if failed:
        print(f"job {job_id} ({job.name}): failed; its log: {log}", flush=True)
    _clear(job.folder)
    return not failed


def cancel(numbers: list[str]) -> None:
    """Cancel jobs and wait until nothing of them runs any more."""
    if not numbers:
        return
    subprocess.run(["scancel", *numbers], check=False, stdout=sys.stderr)
    while not all(squeue.has_ended(number) for number in numbers):
        time.sleep(1)


def _clear(folder: Path) -> None:
    """Remove record, pickles and batch script of a job that has ended; its logs stay."""
    for pattern in (record.RECORD, record.CLAIM, "*.pkl", "*.pkl.save_tmp", "*.sh"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job that this process itself runs in, but not where Slurm's configuration is."""
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env():
        os.environ.update(configuration)
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within this block a TERM is an interrupt, as from the keyboard."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
