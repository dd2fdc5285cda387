"""Starts the ranks of a program as torchrun does, but imports torch and transformers once: ranks are forked from there.

    python -m tests.support.forked_ranks <number of ranks> <program, or -m module> <arguments>

A program of several ranks spends most of its time on imports, and torchrun imports torch as well. That `earl` starts
its ranks by torchrun is seen where a stage is called with `train_processes` or `segment_processes`.
"""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from earl.execution import processes

ROOT = Path(__file__).parents[2]
PRELOADED = ("earl.emu3.models", "earl.stages.iterate", "earl.stages.sft")


def launch(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a program as `count` ranks to its end; fail with what they said if one fails."""
    ranks = [sys.executable, "-m", "tests.support.forked_ranks", str(count), *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(ranks, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def main(count: int, command: list[str]) -> int:
    for name in PRELOADED:
        importlib.import_module(name)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = {_fork(command, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)}
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            return 1
    return 0


def _fork(command: list[str], variables: dict[str, object]) -> int:
    parent = os.getpid()
    if process := os.fork():
        return process
    processes.end_with_parent(signal.SIGKILL, parent)
    os.environ |= {name: str(value) for name, value in variables.items()}
    run = runpy.run_module if command[0] == "-m" else runpy.run_path
    sys.argv = command[1:] if command[0] == "-m" else command
    try:
        run(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
