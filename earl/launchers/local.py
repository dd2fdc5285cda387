"""Jobs on this machine: ranks as processes, and GPUs that a job has to itself while it runs."""

import shlex
import socket
import subprocess
import sys
import time

from earl.launchers import child, gpus
from earl.launchers.job import Job
from earl.messages.errors import EarlError


class LocalLauncher:
    """Starts every rank as a process here; a job waits until as many GPUs as it asks for are free.

    Where the workflow has workers on this machine, these have the GPUs: a stage's command goes to one that has as many
    as it asks for, and other jobs get those of workers without work.
    """

    def run(self, job: Job) -> int:
        """See :class:`earl.launchers.Launcher`. The processes end with this one."""
        from earl.workers import launcher, pool

        if job.resources.nodes > 1:
            raise EarlError(f"{job.name}: asks for {job.resources.nodes} nodes; the launcher 'local' has one")
        if job.resources.ranks == 1 and (status := launcher.in_worker_with_gpus(job)) is not None:
            return status
        with gpus.held(job.resources.gpu, launcher.end_an_idle_worker) as visible:
            # Workers have not taken the command; it is not to ask them again.
            alone = {pool.VARIABLE: ""} if job.resources.gpu else {}
            ranks = rank_variables(job.resources.tasks_per_node)
            return _wait([child.start(job.command, visible | alone | variables) for variables in ranks])


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
