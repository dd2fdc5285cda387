"""Jobs on this machine: ranks as processes, and GPUs that a job has to itself while it runs."""

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from earl import processes
from earl.errors import EarlError
from earl.launchers import child
from earl.launchers.job import Job


class LocalLauncher:
    """Starts every rank as a process here; a job waits until as many GPUs as it asks for are free."""

    def run(self, job: Job) -> int:
        """See :class:`earl.launchers.Launcher`. The processes end with this one."""
        if job.resources.nodes > 1:
            raise EarlError(f"{job.name}: asks for {job.resources.nodes} nodes; the launcher 'local' has one")
        with _gpus(job.resources.gpu) as gpus:
            visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            ranks = rank_variables(job.resources.tasks_per_node)
            return _wait([child.start(job.command, visible | variables) for variables in ranks])


class DebugLauncher:
    """Says what was asked for and runs the command in the foreground, so that a debugger works."""

    def run(self, job: Job) -> int:
        """See :class:`earl.launchers.Launcher`. One rank, whatever was asked for."""
        print(f"{job.name}: {job.resources}\n{shlex.join(job.command)}", file=sys.stderr, flush=True)
        return subprocess.run(job.command, check=False).returncode


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait until all ranks have ended; one that fails ends the others. Return the first status that is not 0."""
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.05)
        return next((status for rank in ranks if (status := rank.poll())), 0)
    finally:
        for rank in ranks:
            child.end(rank)


def rank_variables(count: int) -> list[dict[str, str]]:
    """Return what torch.distributed reads in each of ``count`` processes of this machine; nothing for one alone."""
    if count == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(count)
    ]


@contextmanager
def _gpus(count: int) -> Iterator[list[str] | None]:
    """Yield the names of ``count`` GPUs that no other job of this user has, once they are free.

    None where no choice is to be made: a job that wants no GPU, or a machine without any.
    """
    visible = _visible_gpus() if count else []
    if not visible:
        yield None
        return
    if count > len(visible):
        raise EarlError(
            f"{count} GPUs are asked for where {len(visible)} are visible; ask for fewer, or set the launcher"
        )
    held = _take(count, visible)
    try:
        yield list(held)
    finally:
        for lock in held.values():
            lock.close()


def _take(count: int, visible: list[str]) -> dict[str, IO[str]]:
    """Return ``count`` GPUs with their locks, all or none: two jobs never wait for each other."""
    folder = Path(tempfile.gettempdir()) / f"earl-gpus-{os.geteuid()}"
    while True:
        held: dict[str, IO[str]] = {}
        for name in visible:
            if len(held) < count:
                try:
                    held[name] = processes.lock(folder / f"{name}.lock", patience=-1)
                except EarlError:
                    continue
        if len(held) == count:
            return held
        for lock in held.values():
            lock.close()
        time.sleep(0.5)


def _visible_gpus() -> list[str]:
    """Return the GPUs of this process: those that the environment names, or all of the machine's."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(index) for index, _ in enumerate(listed.stdout.splitlines())]
