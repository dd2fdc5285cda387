"""The pool of a workflow: a folder, for its user alone, that clients and workers meet in.

    pool.json              the process that the pool ends with, what starts workers, how long these wait for work
    secret                 what clients and workers prove to each other
    owner                  held locked by the process that the pool ends with
    <worker>.json          address and identity of a worker, once it listens
    <worker>.worker        held locked by the worker for as long as it lives
    <worker>.client        held locked by the client that is using it
    <worker>.log, .sock    what it prints when nobody listens, and its socket
    <worker>.<rank>.log    what its other ranks print then
    <worker>.wanted        the identity that the worker is to have which is being started
    jobs/<worker>          of a worker that is a Slurm job: what is known of the job
    outputs                held locked, one byte for each output that is being written

All locks go with the process that holds them. Workers are numbered within their kind: ``engine-0``, ``judge-1``; where
they have GPUs of their own or are Slurm jobs, within those of a kind that ask for the same, too: ``engine.gpus1-0``,
``engine.5f3a90-0``.

A pool whose workers are processes of this machine lies in its folder for temporary files. One whose workers are Slurm
jobs lies beside the runs, on the file system that all nodes share and lock files on.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import IO, Any

from earl.execution import processes
from earl.messages.errors import EarlError

VARIABLE = "EARL_WORKERS"
"""Environment variable with the folder of the pool that stages are to use."""
LOCAL, SLURM = "local", "slurm"
"""What starts a pool's workers: clients, as processes beside them, or `earl.workers.jobs`, as Slurm jobs."""
JOBS = "jobs"
GPUS = ".gpus"
"""In the name of a worker that has GPUs of its own: ``engine.gpus1-0``."""
GRACE = 10.0
"""Seconds that a worker may take to end."""


class Pool:
    """A pool that is open."""

    def __init__(self, path: str) -> None:
        self.path = path

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    @property
    def settings(self) -> dict[str, Any]:
        with open(self.file("pool.json"), encoding="utf-8") as stream:
            return json.load(stream)

    @property
    def secret(self) -> bytes:
        with open(self.file("secret"), "rb") as stream:
            return stream.read()

    def is_over(self) -> bool:
        """Return whether the process that the pool ends with is gone, or the folder in part.

        On the machine of that process this is asked of the system. Elsewhere its lock tells, on the shared file system.
        """
        try:
            settings = self.settings
            host, _, pid = settings["owner"].rpartition(":")
            if settings["starts"] == LOCAL:
                return host == socket.gethostname() and not processes.is_alive(int(pid))
            free = processes.try_lock(self.file("owner"))
        except (FileNotFoundError, ValueError, KeyError):
            return True
        except OSError:  # A shared file system may be away for a while; a pool that is over stays so.
            return False
        if free is not None:
            free.close()
        return free is not None

    def slot(self, kind: str) -> "Slot":
        """Take the first worker of a kind that no other client is using, whether it runs yet or not."""
        for index in itertools.count():
            lock = processes.try_lock(self.file(f"{kind}-{index}.client"))
            if lock is not None:
                return Slot(self, f"{kind}-{index}", lock)
        raise AssertionError("there is always another number")

    def end_an_idle_worker(self) -> None:
        """End that worker with GPUs of its own which has been without work for longest, if there is one."""
        idle = []
        for name in (entry.removesuffix(".worker") for entry in os.listdir(self.path) if entry.endswith(".worker")):
            if GPUS in name and Slot(self, name).is_alive():
                last_used = os.stat(self.file(f"{name}.client")).st_mtime
                if (lock := processes.try_lock(self.file(f"{name}.client"))) is not None:
                    idle.append((last_used, Slot(self, name, lock)))
        for _, slot in sorted(idle, key=lambda item: item[0])[:1]:
            slot.end()
        for last_used, slot in idle:
            slot.release()
            os.utime(slot.file("client"), (last_used, last_used))  # To look at it was no use of it.

    @contextlib.contextmanager
    def writing(self, argv: Sequence[str]) -> Iterator[None]:
        """Wait until no other process of the pool is writing what a command writes, and keep others from it."""
        place = int.from_bytes(hashlib.sha256(output_of(argv).encode()).digest()[:7], "big")
        # A byte of a file that is never written to: nothing to clean up, however many outputs there are.
        with open(self.file("outputs"), "a+b") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX, 1, place)
            yield

    def remove_if_over(self) -> None:
        """Remove the folder if the process that the pool ends with is gone, or the folder in part.

        One whose workers are Slurm jobs stays: the next workflow looks there for jobs that may still run.
        """
        if self.is_over() and not os.path.isdir(self.file(JOBS)):
            self.remove()

    def remove(self) -> None:
        """Remove the folder, as far as it is there."""
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)


class Slot:
    """A worker's place in a pool; a client holds its lock for as long as it is using the worker."""

    def __init__(self, pool: Pool, name: str, lock: IO[str] | None = None) -> None:
        self.pool, self.name, self._lock = pool, name, lock

    def file(self, kind: str) -> str:
        return self.pool.file(f"{self.name}.{kind}")

    def record(self) -> dict[str, Any] | None:
        """Return what the worker says of itself, None where none has come up."""
        return self._read("json")

    def _read(self, kind: str) -> dict[str, Any] | None:
        try:
            with open(self.file(kind), encoding="utf-8") as stream:
                return json.load(stream)
        except FileNotFoundError:
            return None

    def announce(self, address: str, identity: dict[str, Any]) -> None:
        """Say that the worker listens."""
        self._write("json", {"address": address, "identity": identity})

    def want(self, identity: dict[str, Any]) -> None:
        """Say what identity the worker that is about to be started is to have: its own environment may be another."""
        self._write("wanted", identity)

    def wanted(self) -> dict[str, Any] | None:
        """Return what :meth:`want` said; None where the worker is started by hand."""
        return self._read("wanted")

    def _write(self, kind: str, content: dict[str, Any]) -> None:
        temporary = self.file("new")
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        os.replace(temporary, self.file(kind))

    def is_alive(self) -> bool:
        """Return whether a worker holds this place."""
        free = processes.try_lock(self.file("worker"))
        if free is not None:
            free.close()
        return free is None

    def tell(self, number: int) -> None:
        """Send a signal to the worker, if it is alive."""
        if not self.is_alive():
            return
        with open(self.file("worker"), encoding="utf-8") as stream, contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(stream.read()), number)

    def end(self) -> None:
        """Make sure that no worker of this machine is alive here: ask it to end, then kill it.

        Raises:
            EarlError: it does not even end then.
        """
        self.tell(signal.SIGTERM)
        with contextlib.suppress(EarlError):
            return self.clear()
        self.tell(signal.SIGKILL)
        return self.clear()

    def clear(self) -> None:
        """Wait until the worker has ended, and forget what it said of itself.

        Raises:
            EarlError: it does not end.
        """
        try:
            processes.lock(self.file("worker"), GRACE).close()
        except EarlError:
            message = f"{self.file('worker')}: the worker does not end; end it by hand, then start again"
            raise EarlError(message) from None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.file("json"))

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()


def from_environment(starts: str | None = LOCAL) -> Pool | None:
    """Return the pool that stages are to use, if there is one whose workers are started in this way (None: any way).

    None, too, where it is over, or where its workers are processes of another machine.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    pool = Pool(path)
    try:
        settings = pool.settings
        elsewhere = settings["starts"] == LOCAL and settings["owner"].rpartition(":")[0] != socket.gethostname()
    except (OSError, ValueError, KeyError):
        return None
    return None if elsewhere or starts not in (None, settings["starts"]) or pool.is_over() else pool


def output_of(argv: Sequence[str]) -> str:
    """Return what a command writes, as far as its options say: its ``--out``, or what it does to which run."""
    options = dict(itertools.pairwise(argv))
    options |= dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if "--out" in options:
        return os.path.abspath(options["--out"])
    run = os.path.abspath(options.get("--run", ""))
    return f"{run} {argv[0]} {options.get('--iteration', options.get('--after'))}"
