"""Processes of a run: one writer at a time, and none that outlives the workflow that started it.

Snakemake's own lock is a file that a killed process leaves behind, to be removed by hand. The lock here is held by an
open file: the system gives it up with the process, however that ends. A killed workflow also leaves the stages that
it had started; :func:`end_with` ends those, so that a workflow started again meets no second writer.
"""

import contextlib
import ctypes
import errno
import fcntl
import getpass
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from earl.messages.errors import EarlError

WATCHED = "EARL_END_WITH"
"""Environment variable with ``<host>:<job>:<process id>`` of the workflow; a stage of the same host and job ends when
that process is gone. A workflow that only submitted the stage's job may end before it."""


_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def lock(path: Path | str, patience: float = 10.0, shared: bool = False, what: str = "") -> IO[str]:
    """Hold the lock file ``path`` for as long as the returned file stays open.

    Args:
        path: the lock file; it is made when missing and stays (removing it would let a second process in).
        patience: seconds to wait for another process to give it up: one that ends because its parent was killed
            takes a moment.
        shared: others may hold it, too, if they share it.
        what: what this process does, for those who find the lock taken.

    Raises:
        EarlError: when another process still holds it; the message names that process. When it cannot be made, or its
            file system has no locks.
    """
    path = Path(path)
    deadline = time.monotonic() + patience
    while (stream := try_lock(path, shared, what)) is None:
        if time.monotonic() > deadline:
            raise EarlError(
                f"{path}: process {holder_of(path)} is writing here; wait until it ends, or stop it, then start again"
            )
        time.sleep(0.1)
    return stream


def lock_unless(made: Callable[[], bool], path: Path | str, what: str) -> IO[str] | None:
    """Hold a lock file as :func:`lock` does, or wait for what its holder makes.

    Args:
        made: Whether that is there; then no lock is needed.
        path: The lock file.
        what: What is waited for, for the one line that says so.

    Raises:
        EarlError: as :func:`lock`, but for another process that holds it.
    """
    is_told = False
    while not made():
        stream = try_lock(path)
        if stream is not None:
            return stream
        if not is_told:
            print(f"waiting for process {holder_of(path)}, which makes {what}", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(0.5)
    return None


def holder_of(path: Path | str) -> str:
    """Return the process that last took a lock file, and in brackets what it does, if it said so."""
    return Path(path).read_text(encoding="utf-8").strip() or "unknown"


def try_lock(path: Path | str, shared: bool = False, what: str = "") -> IO[str] | None:
    """Hold a lock file as :func:`lock` does, or return None at once where another process holds it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the lock lasts as long as the file is open
    except OSError as error:
        raise EarlError(
            f"{path}: the lock cannot be made ({error.strerror or error}); check the folder's permissions, or choose "
            "another base_exp_dir"
        ) from error
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(f"{os.getpid()} ({what})\n" if what else f"{os.getpid()}\n")
        stream.flush()
    except BlockingIOError:
        stream.close()
        return None
    except OSError as error:
        with contextlib.suppress(OSError):  # which closing meets again, with what was not written
            stream.close()
        remedy = "free space, then start again"
        if error.errno in _NO_LOCKS:
            remedy = (
                "its file system has no locks, without which two processes could write the same files; choose a "
                "base_exp_dir elsewhere, or have it mounted with them (Lustre: -o flock)"
            )
        raise EarlError(f"{path}: cannot be locked ({error.strerror or error}); {remedy}") from error
    return stream


def name_user() -> None:
    """Give a user id without a name, as containers have, one that libraries find when they ask for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine exists and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # a system without /proc
    # Ended, though whoever started it has not asked for its exit status yet.
    return state not in ("Z", "X")


def end_with(pid: int) -> None:
    """End this process, without further ado, when process ``pid`` of the same machine is gone.

    Outputs appear only complete, so ending at any moment leaves nothing half-written.
    """

    def watch() -> None:
        while is_alive(pid):
            time.sleep(0.25)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-workflow", daemon=True).start()


def end_with_parent(parent: int | None = None) -> None:
    """Between fork and exec: have Linux end this process (SIGTERM) when the one that started it is gone, however.

    Args:
        parent: Process id of the one that started it; should it be gone already, this process ends here.
    """
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def end_stages_with_this_process() -> None:
    """Let the stages that are started from here on end with this process; see :func:`end_with_workflow`."""
    os.environ[WATCHED] = f"{_machine()}:{os.getpid()}"


def end_with_workflow() -> None:
    """Call :func:`end_with` for the workflow that started this process, if one of this machine and Slurm job did."""
    machine, _, pid = os.environ.get(WATCHED, "").rpartition(":")
    if machine == _machine():
        end_with(int(pid))


def _machine() -> str:
    # A process that submitit's local cluster started outlives the workflow as a job of Slurm does. It has the variables
    # of a Slurm job that the workflow runs in; a job of Slurm has none of submitit's.
    job = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
    return f"{socket.gethostname()}:{job}"


def in_workflow() -> bool:
    """Return whether a workflow started this process; it holds the run's lock then."""
    return WATCHED in os.environ


def end_at_once(status: int) -> NoReturn:
    """End a rank's process without Python's shutdown, which a thread of gloo's that still lives may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
