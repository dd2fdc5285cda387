"""Which job writes a stage's outputs: the record beside its logs, and the lock that the writing job holds.

A driver may be killed while its jobs run, Slurm may give up a node whose processes go on, and a submission may reach
Slurm though whoever made it is gone. So

* the launcher records the job it means, and a job starts its command only when the record names it;
* the job's newest start *claims* the folder: an earlier start, that may go on unseen, ends when it reads the claim;
* whoever runs the command holds the folder's lock meanwhile, so the next start begins when the one before it is gone.

All of it is files in the job's folder, on the file system that the outputs are on.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.files import atomic
from earl.launchers import squeue
from earl.messages.errors import EarlError

RECORD, CLAIM, WRITER, LAUNCHER = "job.json", "claim", "writer.lock", "launcher.lock"
RECORD_PATIENCE = 60.0
"""Seconds that a started job waits to be recorded: its launcher does so as soon as it knows the job's number."""
WRITER_PATIENCE = 300.0
"""Seconds that a job waits for an earlier start of itself to end."""
LOOK = 1.0
"""Seconds between two looks at the claim."""


@dataclass(frozen=True)
class Record:
    """The job that writes: its number, none before it is known, and the digest of its command."""

    name: str
    digest: str
    job_id: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """Return the record in ``folder``, if there is one.

        Raises:
            EarlError: when the file is there but damaged.
        """
        try:
            return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise EarlError(
                f"{folder / RECORD}: is damaged ({error}); remove it once squeue shows no job of this run any more"
            ) from error

    def write(self, folder: Path) -> None:
        atomic.write_text(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


def running(jobs: Path) -> list[Record]:
    """Return the records in the folders below ``jobs`` whose Slurm jobs have not ended, and clear away the others.

    A job without a number counts: whether its submission reached Slurm is for its launcher to find out.

    Raises:
        EarlError: when there are records, but Slurm does not answer.
    """
    found = []
    for path in sorted(jobs.glob(f"*/{RECORD}")):
        record = Record.read(path.parent)
        if record is None:
            continue
        if record.job_id is not None and squeue.has_ended(record.job_id):
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            found.append(record)
    return found


def become_writer(folder: Path, job_id: str, start: str, when_superseded: Callable[[], None]) -> IO[str]:
    """Wait until this start of job ``job_id`` may run the command, and return the lock to hold while it does.

    Args:
        folder: the job's folder.
        job_id: the number of the job that this process belongs to.
        start: which start of the job this is; a job that was queued again starts anew.
        when_superseded: called, on a thread of its own, when a later start claims the folder.

    Raises:
        EarlError: when the record names another job, or an earlier start does not end.
    """
    _wait_for_record(folder, job_id)
    mine = f"{job_id}.{start}"
    atomic.write_text(folder / CLAIM, mine)
    lock = processes.lock(folder / WRITER, WRITER_PATIENCE)

    def watch() -> None:
        while _read(folder / CLAIM) in (mine, None):
            time.sleep(LOOK)
        when_superseded()

    threading.Thread(target=watch, name="superseded", daemon=True).start()
    return lock


def _wait_for_record(folder: Path, job_id: str) -> None:
    deadline = time.monotonic() + RECORD_PATIENCE
    while True:
        record = Record.read(folder)
        recorded = record.job_id if record else None
        if recorded == job_id:
            return
        if recorded is not None or time.monotonic() > deadline:
            raise EarlError(
                f"{folder / RECORD}: names job {recorded}, so job {job_id} must not write; "
                "a driver that was stopped while it submitted leaves such a job"
            )
        time.sleep(0.2)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def make_folder(folder: Path) -> None:
    """Make a job's folder, which nobody but its owner may read or write: what is submitted lies there pickled.

    Raises:
        EarlError: when it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise EarlError(f"{folder}: cannot be made this user's own ({error.strerror or error})") from error
    if folder.stat().st_uid != os.geteuid():
        raise EarlError(f"{folder}: belongs to another user; choose another base_exp_dir or run_name")
