"""Snakemake forked from a process that has imported it: most of what a plan takes are imports.

The first call starts that process, which ends with the tests. It imports nothing of theirs. What it forks has its own
environment, folder, session and process id, as what `python -m snakemake` starts, which other tests call.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PRELOADED = ("snakemake.cli", "snakemake_executor_plugin_submitit", "earl.workflow.inputs", "earl.workflow.opening")


class Snakemake:
    """What `subprocess.Popen` would be, in text mode, with a session of its own and all output in one pipe or file."""

    def __init__(self, arguments: list[str], cwd: Path, env: dict[str, str], output: IO | None = None) -> None:
        self.args, self.returncode = arguments, None
        reads, writes = os.pipe()
        tells, status = os.pipe()
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env})
        socket.send_fds(_server(), [request.encode()], [output.fileno() if output else writes, status])
        os.close(writes)
        os.close(status)
        self.stdout, self._status = open(reads), open(tells)  # noqa: SIM115
        self.pid = int(self._status.readline())

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Return what has not been read yet, once the last process that writes to the pipe has ended."""
        late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        late.start()
        output = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return output, None


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.support.forked_snakemake", str(theirs.fileno())]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    return ours


def serve(requests: socket.socket) -> None:
    """Fork whatever is asked for until nobody can ask any more."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    while True:
        request, handed, *_ = socket.recv_fds(requests, 1 << 20, 2)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            _attend(json.loads(request), *handed)
        for each in handed:
            os.close(each)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _attend(request: dict, output: int, status: int) -> None:
    """Fork Snakemake, and tell its process id and later its exit status."""
    if (pid := os.fork()) == 0:
        os.close(status)
        _become_snakemake(request, output)
    os.close(output)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _become_snakemake(request: dict, output: int) -> None:
    os.setsid()
    # A shell's background job ignores SIGINT, and so would every process below the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    # With which a workflow that has waited starts anew.
    sys.orig_argv[1:] = ["-m", "snakemake", *request["arguments"]]
    runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
