"""Modules run as programs, forked from a process that has imported them: most of what a short one takes are imports.

The first call for a module starts that process, which ends with the tests. It imports nothing of theirs. What it forks
has its own environment, folder, session and process id, as what `python -m <module>` starts, which other tests call.
It is killed when nobody waits for it any more. What libraries read from the environment when they are imported, as
those of the hub do, is what these tests were started with.

Python itself starts stages in tests/integration/test_kills.py, and ranks of a stage, of a fine-tuning and of a
segment in test_ranks.py, test_sft_ranks.py and test_iterate.py.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
PYTHON = "FORKED_PYTHON"
"""Environment variable with what a forked program takes for Python; see :func:`python`."""


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
        request = {"args": self.args, "cwd": str(cwd), "env": environment() if env is None else env}
        written = output.fileno() if output else writes
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(_server(module if module in PRELOADED else "earl")))
        socket.send_fds(self._connection, [json.dumps(request).encode()], [written, written])
        os.close(writes)
        self.stdout = open(reads)  # noqa: SIM115
        self.pid = int(self._connection.recv(99))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            self.returncode = int(self._connection.recv(99))
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        select.select([self], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def fileno(self) -> int:
        """Something to read there means: it has ended."""
        return self._connection.fileno()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Return what has not been read yet, once the last process that writes to the pipe has ended."""
        late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        late.start()
        output = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return output, None


def run(module: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; what it writes, to stdout and to stderr, is the `stdout` of what is returned."""
    started = Forked(module, arguments, env=environment(**variables))
    output, _ = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, output)


def python(*modules: str) -> Path:
    """Return a program to take for Python that forks these modules, of `PRELOADED`, where `-m` names them.

    With its path in the environment variable :data:`PYTHON`, a forked program starts others by it.
    """
    for module in modules:
        _server(module)
    program = _folder() / "python"
    if not program.exists():
        client = Path(__file__).with_name("forked_client.py").read_text()
        program.write_text(f"#!{sys.executable} -IS\n{client}")
        program.chmod(0o755)
    return program


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="forked-"))


@functools.cache
def _server(name: str) -> Path:
    address = _folder() / name
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(address))
        listening.listen()
        lives, _held = os.pipe()  # which this process holds open until it ends
        command = [sys.executable, "-m", "tests.support.forked", name, str(listening.fileno()), str(lives)]
        # A process that has several threads cannot be forked.
        env = environment(OMP_NUM_THREADS=1)
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
        subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[listening.fileno(), lives], **quiet)
        os.close(lives)
    return address


def serve(name: str, listening: socket.socket, lives: int) -> None:
    """Fork whatever is asked for until the tests have ended."""
    for each in PRELOADED[name]:
        importlib.import_module(each)
    gc.freeze()
    while lives not in select.select([listening, lives], [], [])[0]:
        connection, _ = listening.accept()
        request, handed, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if request and os.fork() == 0:
            listening.close()
            os.close(lives)
            _attend(connection, json.loads(request), *handed)
        connection.close()
        for each in handed:
            os.close(each)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    shutil.rmtree(Path(listening.getsockname()).parent, ignore_errors=True)
    os._exit(0)


def _attend(connection: socket.socket, request: dict, stdout: int, stderr: int) -> None:
    """Fork the program, and tell its process id and later its exit status."""
    if (pid := os.fork()) == 0:
        connection.close()
        _become(request, stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    connection.send(str(pid).encode())
    if connection in select.select([connection, os.pidfd_open(pid)], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, ended = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)


def _become(request: dict, stdout: int, stderr: int) -> None:
    os.setsid()
    # A shell's background job ignores SIGINT, and so would every process below the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    # Those of the server were opened for another kind of file.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if PYTHON in os.environ:
        sys.executable = os.environ[PYTHON]
        if settings := sys.modules.get("earl.workflow.settings"):
            importlib.reload(settings)  # One of them holds the path of Python.
    sys.path[0] = request["cwd"]
    module, *sys.argv[1:] = request["args"]
    # With which a workflow that has waited starts anew.
    sys.orig_argv[1:] = ["-m", *request["args"]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
