"""GPUs of this machine that a stage has to itself: one lock file per GPU, of this user's processes."""

import logging
import os
import subprocess
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.messages.errors import EarlError

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK = 0.5
"""Seconds between two looks for GPUs that have become free."""

_held: list[IO[str]] = []
"""Locks, which last as long as the process."""

log = logging.getLogger(__name__)


def claim(count: int) -> None:
    """Wait until `count` GPUs are free, keep them until this process ends and see no others, nor its children.

    Call it before CUDA is used. Nothing happens on a machine without GPUs. All or none are held: two processes never
    wait for each other.

    Raises:
        EarlError: there are not as many, free or not.
    """
    visible = _visible() if count else []
    if not visible:
        return
    if count > len(visible):
        raise EarlError(f"the stage needs {count} GPUs, but {len(visible)} are visible here; lower the configuration's")
    # Where Slurm shows each job its own GPUs alone, they have the same names in every job of the node.
    owner = "-".join(filter(None, [str(os.geteuid()), os.environ.get("SLURM_JOB_ID")]))
    folder = Path(tempfile.gettempdir()) / f"earl-gpus-{owner}"
    is_told = False
    while len(taken := _take_free(folder, visible, count)) < count:
        for lock in taken.values():
            lock.close()
        if not is_told:
            log.info("waiting for %d free GPUs of %d", count, len(visible))
            is_told = True
        time.sleep(LOOK)
    _held.extend(taken.values())
    os.environ[VISIBLE] = ",".join(taken)


def _take_free(folder: Path, visible: list[str], count: int) -> dict[str, IO[str]]:
    taken: dict[str, IO[str]] = {}
    for name in visible:
        if len(taken) < count and (lock := processes.try_lock(folder / f"{name}.lock")) is not None:
            taken[name] = lock
    return taken


def _visible() -> list[str]:
    """Return the GPUs of this process: those that the environment names, or all of the machine's."""
    if VISIBLE in os.environ:
        # As CUDA reads it: what follows a -1 is hidden.
        return list(takewhile(lambda name: name != "-1", filter(None, os.environ[VISIBLE].split(","))))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    # Below a GPU that is divided its parts are listed, as "  MIG ...".
    return [str(index) for index, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
