"""Modules run as programs, forked from a process that has imported them: most of what a short one takes are imports.

The first call for a module starts that process, which ends with the tests. It imports nothing of theirs. What it forks
has its own environment, folder, session and process id, as what `python -m <module>` starts, which other tests call.
"""

import contextlib
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
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from earl.execution import processes

ROOT = Path(__file__).parents[2]
PRELOADED = {
    "snakemake": (
        "snakemake.cli", "snakemake_executor_plugin_submitit", "earl.workflow.inputs", "earl.workflow.opening",
    ),
    "earl": (
        "earl.cli", "earl.emu3.models", "earl.stages.iterate", "earl.stages.restore", "earl.stages.sft",
        "earl.engines.torch_engine", "earl.judges.program", "earl.learner.parts", "pandas", "torch.distributed.run",
        "earl.tracking.files", "earl.tracking.wandb_run", "wandb", "wandb.data_types",
    ),
    "tests.support.sampling_program": ("tests.support.vllm_on_cpu",),
}  # fmt: skip
"""What is imported before a module is forked; other modules are forked where `earl` is."""


def environment(**variables: object) -> dict[str, str]:
    """The environment of this process, and variables beside it, without a workflow that stages would end with."""
    inherited = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
    return inherited | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in variables.items()}


class Forked:
    """What `subprocess.Popen` would be, in text mode, with a session of its own and all output in one pipe or file."""

    def __init__(
        self,
        module: str,
        arguments: Iterable[object],
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        output: IO | None = None,
    ) -> None:
        self.args, self.returncode = [module, *map(str, arguments)], None
        reads, writes = os.pipe()
        tells, status = os.pipe()
        request = json.dumps({"args": self.args, "cwd": str(cwd), "env": environment() if env is None else env})
        server = _server(module if module in PRELOADED else "earl")
        socket.send_fds(server, [request.encode()], [output.fileno() if output else writes, status])
        os.close(writes)
        os.close(status)
        self.stdout, self._status = open(reads), open(tells)  # noqa: SIM115
        self.pid = int(self._status.readline())

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        select.select([self], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def fileno(self) -> int:
        """Something to read there means: it has ended."""
        return self._status.fileno()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Return what has not been read yet, once the last process that writes to the pipe has ended."""
        late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        late.start()
        output = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return output, None


def run(module: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; what it writes, to stdout and to stderr, is the `stdout` of what is returned."""
    started = Forked(module, arguments, env=environment(**variables))
    output, _ = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, output)


@functools.cache
def _server(name: str) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.support.forked", name, str(theirs.fileno())]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    # A process that has several threads cannot be forked.
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    return ours


def serve(server: str, requests: socket.socket) -> None:
    """Fork whatever is asked for until nobody can ask any more."""
    for name in PRELOADED[server]:
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
    """Fork the program, and tell its process id and later its exit status."""
    if (pid := os.fork()) == 0:
        os.close(status)
        _become(request, output)
    os.close(output)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _become(request: dict, output: int) -> None:
    os.setsid()
    # A shell's background job ignores SIGINT, and so would every process below the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # Those of the server were opened for another kind of file.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    module, *sys.argv[1:] = request["args"]
    # With which a workflow that has waited starts anew.
    sys.orig_argv[1:] = ["-m", *request["args"]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
