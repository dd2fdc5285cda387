"""What a workflow does with its pool of workers: open it, close it, and clear up what killed workflows have left."""

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import tempfile
import time
from typing import IO

from earl.execution import processes
from earl.workers.pool import JOBS, LOCAL, SLURM, VARIABLE, Pool, Slot

_PREFIX = "earl-workers-"
_OPENING = 60.0
"""Seconds after which a pool that is being opened has its settings for sure."""


def open_pool(idle_seconds: float, beside: str | None = None) -> Pool:
    """Open a pool for the stages that are started from here on; it ends with this process.

    Args:
        idle_seconds: how long workers wait for work before they end; the next stage starts them again.
        beside: folder on a file system that all nodes share, for workers that are Slurm jobs; without one, workers are
            processes of this machine.

    Raises:
        EarlError: Slurm does not answer about jobs that a workflow has left there which was killed.
    """
    folder = beside or tempfile.gettempdir()
    os.makedirs(folder, exist_ok=True)
    clear_up(folder)
    path = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
    if beside is None and len(path) > 85:
        # A socket's path has about 100 characters.
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    pool = Pool(os.path.abspath(path))
    with open(pool.file("secret"), "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(secrets.token_bytes(32))
    owner, starts = f"{socket.gethostname()}:{os.getpid()}", LOCAL
    if beside is not None:
        os.mkdir(pool.file(JOBS))
        starts = SLURM
    lock = processes.lock(pool.file("owner"))
    with open(pool.file("pool.json"), "w", encoding="utf-8") as stream:
        json.dump({"owner": owner, "starts": starts, "idle_seconds": idle_seconds}, stream)
    os.environ[VARIABLE] = pool.path
    atexit.register(_close, pool, os.getpid(), lock)
    return pool


def _close(pool: Pool, opener: int, lock: IO[str]) -> None:
    # A fork of the process that opened the pool has no say in it.
    if os.getpid() == opener:
        close(pool)
        lock.close()


def clear_up(folder: str) -> None:
    """End workers of workflows that are gone, as far as they have not seen it, and remove the pools in a folder.

    Raises:
        EarlError: Slurm does not answer about workers that are jobs.
    """
    if not os.path.isdir(folder):
        return
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
    if not os.path.exists(found.file("pool.json")) and time.time() - status.st_mtime < _OPENING:
        return
    if not found.is_over():
        return
    if os.path.isdir(found.file(JOBS)):
        _end_jobs(found)
    found.remove()


def close(pool: Pool) -> None:
    """End all workers of a pool and remove its folder."""
    if os.path.isdir(pool.file(JOBS)):
        _end_jobs(pool)
    else:
        names = [name.removesuffix(".worker") for name in os.listdir(pool.path) if name.endswith(".worker")]
        slots = [Slot(pool, name) for name in names]
        for slot in slots:
            slot.tell(signal.SIGTERM)
        for slot in slots:
            slot.end()
    pool.remove()


def _end_jobs(pool: Pool) -> None:
    from earl.workers import jobs  # Needs submitit, which is wanted on clusters alone.

    jobs.end_all(pool)
