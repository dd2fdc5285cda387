"""A stage's command as a child process: it ends with the process that started it, and with all it started itself."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from earl.execution import processes

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed reads, as torchrun sets it."""


def start(
    command: Sequence[str], changes: Mapping[str, str], keep_open: Sequence[int] = (), **streams: IO[bytes] | int
) -> subprocess.Popen:
    """Start ``command`` as the leader of a process group of its own.

    Args:
        command: the command and its arguments.
        changes: environment variables to set; rank variables of this process itself are not handed on.
        keep_open: file descriptors that the child holds, too, such as that of a lock.
        streams: ``stdin``, ``stdout``, ``stderr`` of the child, as ``Popen`` takes them; this process's by default.
    """
    processes.end_stages_with_this_process()
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return subprocess.Popen(
        list(command),
        env=inherited | dict(changes),
        pass_fds=keep_open,
        start_new_session=True,
        preexec_fn=_prepare,
        **streams,
    )


def _prepare() -> None:
    processes.end_with_parent(signal.SIGKILL)
    # The warning before a time limit reaches all processes of a job, and would end those that do not expect it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def end(child: subprocess.Popen, patience: float = 0.0) -> None:
    """End a child and what it started: asked first if there are ``patience`` seconds for that, then killed.

    May be called in a signal handler that interrupted ``child.wait()``, which holds a lock: so this looks whether the
    process is there, and leaves it to others to ask for its exit status.
    """
    if patience:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while processes.is_alive(child.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    while processes.is_alive(child.pid):
        time.sleep(0.05)


def follow(stream: IO[bytes], out: IO[bytes]) -> None:
    """Copy what has been added to a growing file since the last call."""
    while block := stream.read(1 << 16):
        out.write(block)
    out.flush()
