"""Which job writes a rule's outputs: a record in the job's folder, which the job itself claims before it begins.

A driver may be killed while its jobs run, or while it submits one; Slurm may give up a node whose processes go on. So

* the driver records the job it means, and a job begins only when the record names it;
* a job that begins *claims* the folder: an earlier start, or an earlier job, that may run on unseen ends itself when it
  reads the claim;
* a job holds the folder's lock while its command runs, so the next begins only when the one before it is gone.

All of it is files in the job's folder, on the file system that the outputs are on.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

RECORD, CLAIM, LOCK = "record.json", "claim", "lock"
RECORD_PATIENCE = 60.0
"""Seconds that a started job waits to be recorded: its driver does so as soon as it knows the job's id."""
LOCK_PATIENCE = 300.0
"""Seconds that a job waits for an earlier one to end."""
LOOK = 1.0
"""Seconds between two looks at the claim."""


class NotTheWriter(Exception):
    """This job must not write."""


class Superseded(NotTheWriter):
    """A later start of the job has begun; what becomes of the job is its to say."""


@dataclass(frozen=True)
class Record:
    """The job that writes the outputs.

    Attributes:
        name: the job's name in Slurm.
        outputs: absolute paths of the files it makes.
        digest: of the command and of what the job asks for.
        job_id: None while it is being submitted.
    """

    name: str
    outputs: list[str]
    digest: str
    job_id: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """Return the record in a folder, if there is one.

        Raises:
            ValueError: it is damaged.
        """
        try:
            return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / RECORD}: is damaged ({error}); remove the folder once none of its jobs runs any more"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record and make sure that it outlasts this machine."""
        write(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file that others see only whole."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def become_writer(folder: Path, job_id: str, start: int, when_superseded: Callable[[], None]) -> IO[str]:
    """Wait until this start of a job may run its command, and return the lock to hold while it does.

    Args:
        folder: the job's folder.
        job_id: of the job that this process belongs to.
        start: 0 for the job's first start, one more whenever Slurm started it again.
        when_superseded: called on a thread of its own when another job or a later start claims the folder.

    Raises:
        NotTheWriter: the record names another job, or an earlier job does not end.
        Superseded: a later start, or a later job, has claimed the folder.
    """
    _wait_for_record(folder, job_id)
    mine = [job_id, start]

    def is_mine() -> bool:
        claim = _claim(folder)
        return claim is None or claim == mine

    if (claim := _claim(folder)) is not None and claim[0] == job_id and claim[1] > start:
        raise Superseded(f"a later start of job {job_id} has begun")
    write(folder / CLAIM, json.dumps(mine))
    lock = _lock(folder, is_mine)

    def watch() -> None:
        while is_mine():
            time.sleep(LOOK)
        when_superseded()

    threading.Thread(target=watch, name="superseded", daemon=True).start()
    return lock


def _wait_for_record(folder: Path, job_id: str) -> None:
    deadline = time.monotonic() + RECORD_PATIENCE
    while (recorded := (record := Record.read(folder)) and record.job_id) != job_id:
        if recorded is not None or time.monotonic() > deadline:
            raise NotTheWriter(
                f"{folder / RECORD}: names job {recorded}, so job {job_id} must not write; a driver that was killed "
                "while it submitted leaves such a job"
            )
        time.sleep(0.2)


def _lock(folder: Path, is_mine: Callable[[], bool]) -> IO[str]:
    deadline = time.monotonic() + LOCK_PATIENCE
    stream = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - the lock lasts as long as the file is open
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            refused = NotTheWriter if is_mine() else Superseded
            if refused is Superseded or time.monotonic() > deadline:
                stream.close()
                raise refused(f"{folder / LOCK}: an earlier job still writes the same outputs") from None
            time.sleep(0.2)
        except OSError as error:
            stream.close()
            raise NotTheWriter(
                f"{folder / LOCK}: cannot be locked ({error.strerror}), without which two jobs could write the same "
                "outputs; set the executor's folder to a file system with locks (Lustre: mounted with -o flock)"
            ) from error


def _claim(folder: Path) -> list | None:
    try:
        return json.loads((folder / CLAIM).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # A network file system can be away for a moment.
        return None
