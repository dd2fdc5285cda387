"""The pool of a workflow: a folder, for its user alone, that clients and workers meet in.

    pool.json              the process that the pool ends with, and how long workers wait for work
    secret                 what clients and workers prove to each other
    <worker>.json          address and identity of a worker, once it listens
    <worker>.worker        held locked by the worker for as long as it lives
    <worker>.client        held locked by the client that is using it
    <worker>.log, .sock    what it prints when nobody listens, and its socket
    outputs                held locked, one byte for each output that is being written

All locks go with the process that holds them. Workers are numbered within their kind: ``engine-0``, ``judge-1``.
"""

import atexit
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from earl import processes
from earl.errors import EarlError

VARIABLE = "EARL_WORKERS"
"""Environment variable with the folder of the pool that stages are to use."""
_PREFIX = "earl-workers-"
_OPENING = 60.0
"""Seconds after which a pool that is being opened has its settings for sure."""
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

    def owner(self) -> int | None:
        """Return the process that the pool ends with, None where it runs on another machine."""
        host, _, pid = self.settings["owner"].rpartition(":")
        return int(pid) if host == socket.gethostname() else None

    def slot(self, kind: str) -> "Slot":
        """Take the first worker of a kind that no other client is using, whether it runs yet or not."""
        for index in itertools.count():
            lock = processes.try_lock(self.file(f"{kind}-{index}.client"))
            if lock is not None:
                return Slot(self, f"{kind}-{index}", lock)
        raise AssertionError("there is always another number")

    @contextlib.contextmanager
    def writing(self, argv: Sequence[str]) -> Iterator[None]:
        """Wait until no other process of the pool is writing what a command writes, and keep others from it."""
        place = int.from_bytes(hashlib.sha256(output_of(argv).encode()).digest()[:7], "big")
        # A byte of a file that is never written to: nothing to clean up, however many outputs there are.
        with open(self.file("outputs"), "a+b") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX, 1, place)
            yield

    def remove_if_over(self) -> None:
        """Remove the folder if the process that the pool ends with is gone, or the folder in part."""
        try:
            owner = self.owner()
        except (OSError, ValueError, KeyError):
            owner = 0
        if owner is not None and not (owner and processes.is_alive(owner)):
            _remove(self.path)

    def close(self) -> None:
        """End all workers and remove the folder."""
        names = [name.removesuffix(".worker") for name in os.listdir(self.path) if name.endswith(".worker")]
        slots = [Slot(self, name) for name in names]
        for slot in slots:
            slot.tell(signal.SIGTERM)
        for slot in slots:
            slot.end()
        _remove(self.path)


class Slot:
    """A worker's place in a pool; a client holds its lock for as long as it is using the worker."""

    def __init__(self, pool: Pool, name: str, lock: IO[str] | None = None) -> None:
        self.pool, self.name, self._lock = pool, name, lock

    def file(self, kind: str) -> str:
        return self.pool.file(f"{self.name}.{kind}")

    def record(self) -> dict[str, Any] | None:
        """Return what the worker says of itself, None where none has come up."""
        try:
            with open(self.file("json"), encoding="utf-8") as stream:
                return json.load(stream)
        except FileNotFoundError:
            return None

    def announce(self, address: str, identity: dict[str, Any]) -> None:
        """Say that the worker listens."""
        temporary = self.file("new")
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"address": address, "identity": identity}, stream)
        os.replace(temporary, self.file("json"))

    def tell(self, number: int) -> None:
        """Send a signal to the worker, if it is alive."""
        free = processes.try_lock(self.file("worker"))
        if free is not None:
            free.close()
            return
        with open(self.file("worker"), encoding="utf-8") as stream, contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(stream.read()), number)

    def end(self) -> None:
        """Make sure that no worker is alive here: ask it to end, then kill it.

        Raises:
            EarlError: it does not even end then.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.tell(number)
            with contextlib.suppress(EarlError):
                processes.lock(self.file("worker"), GRACE).close()
                break
        else:
            raise EarlError(f"{self.file('worker')}: the worker does not end; end it by hand, then start again")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.file("json"))

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()


def open_pool(idle_seconds: float) -> Pool:
    """Open a pool for the stages that are started from here on; it ends with this process.

    Args:
        idle_seconds: how long workers wait for work before they end; the next stage starts them again.
    """
    import secrets
    import tempfile

    _remove_pools_of_the_dead(tempfile.gettempdir())
    path = tempfile.mkdtemp(prefix=_PREFIX)
    if len(path) > 85:
        # A socket's path has about 100 characters.
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    pool = Pool(path)
    with open(pool.file("secret"), "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(secrets.token_bytes(32))
    with open(pool.file("pool.json"), "w", encoding="utf-8") as stream:
        json.dump({"owner": f"{socket.gethostname()}:{os.getpid()}", "idle_seconds": idle_seconds}, stream)
    os.environ[VARIABLE] = path
    atexit.register(_close, pool, os.getpid())
    return pool


def _close(pool: Pool, opener: int) -> None:
    # A fork of the process that opened the pool has no say in it.
    if os.getpid() == opener:
        pool.close()


def _remove(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _remove_pools_of_the_dead(folder: str) -> None:
    """Remove what workflows left that were killed before they had a worker, or together with their workers."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _remove_if_dead(entry)


def _remove_if_dead(entry: os.DirEntry[str]) -> None:
    status, found = entry.stat(follow_symlinks=False), Pool(entry.path)
    if status.st_uid != os.getuid():
        return
    # One without its settings is being opened right now, or was left half removed.
    if os.path.exists(found.file("pool.json")) or time.time() - status.st_mtime > _OPENING:
        found.remove_if_over()


def from_environment() -> Pool | None:
    """Return the pool that stages are to use; None where there is none, or it belongs to another machine or is over."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    pool = Pool(path)
    try:
        owner = pool.owner()
    except (OSError, ValueError, KeyError):
        return None
    return pool if owner is not None and processes.is_alive(owner) else None


def output_of(argv: Sequence[str]) -> str:
    """Return what a command writes, as far as its options say: its ``--out``, or what it does to which run."""
    options = dict(itertools.pairwise(argv))
    options |= dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if "--out" in options:
        return os.path.abspath(options["--out"])
    run = os.path.abspath(options.get("--run", ""))
    return f"{run} {argv[0]} {options.get('--iteration', options.get('--after'))}"
