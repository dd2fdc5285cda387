"""`earl` forked from a process that has imported it and wandb: most of what a short command takes are imports.

The first call starts that process, which ends with the tests. What it forks has its own environment and process id, and
ends as `python -m earl` does.
"""

import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["earl.cli", "earl.tracking.files", "earl.tracking.wandb_run", "wandb", "wandb.data_types"]
)


class Earl:
    """What `subprocess.Popen` would be, in text mode, without input and with all output in one pipe."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        reads, writes = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(list(arguments), dict(environment), writes))
        self._process.start()
        writes.close()
        self._output = open(os.dup(reads.fileno()))  # noqa: SIM115
        reads.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> str:
        """Return what it said, once the last process that writes to the pipe has ended."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with self._output as output:
            said = output.read()
        late.cancel()
        self._process.join(timeout)
        return said


def _run(arguments: list[str], environment: dict[str, str], output: Connection) -> None:
    for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output.fileno()), (2, output.fileno())):
        os.dup2(opened, number)
    output.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["earl", *arguments]
    from earl import cli

    with suppress(SystemExit):
        cli.main()
    atexit._run_exitfuncs()  # the last of which ends this process with the command's status
