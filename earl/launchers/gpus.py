"""GPUs of this machine that a process has to itself: one lock file a GPU, of this user's processes."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.messages.errors import EarlError

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK = 0.5
"""Seconds between two looks for GPUs that have become free."""


@contextmanager
def held(count: int, make_room: Callable[[], None] | None = None) -> Iterator[dict[str, str]]:
    """Yield the environment variable that shows ``count`` GPUs alone, which no other process has meanwhile.

    Nothing where no choice is to be made: no GPU is wanted, or the machine has none. See :func:`take`.
    """
    taken = take(count, make_room)
    try:
        yield shown(taken)
    finally:
        for lock in taken.values():
            lock.close()


def shown(taken: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variable that shows these GPUs alone, nothing where there are none."""
    return {VISIBLE: ",".join(taken)} if taken else {}


def take(count: int, make_room: Callable[[], None] | None = None) -> dict[str, IO[str]]:
    """Wait until ``count`` GPUs are free, and return them with their locks, which last as long as the files are open.

    All or none are held: two jobs never wait for each other. Nothing is returned where the machine has no GPU.

    Args:
        make_room: called whenever there are too few; it may have another process give up some.

    Raises:
        EarlError: there are not as many, free or not.
    """
    visible = _visible() if count else []
    if visible and count > len(visible):
        raise EarlError(
            f"{count} GPUs are asked for where {len(visible)} are visible; ask for fewer, or set the launcher"
        )
    while visible:
        taken = _take_free(count, visible)
        if len(taken) == count:
            return taken
        for lock in taken.values():
            lock.close()
        if make_room is not None:
            make_room()
        time.sleep(LOOK)
    return {}


def _take_free(count: int, visible: list[str]) -> dict[str, IO[str]]:
    # Where Slurm shows a job its own GPUs alone, they have the same names in every job of the node.
    whose = "-".join([str(os.geteuid()), *filter(None, [os.environ.get("SLURM_JOB_ID")])])
    folder = Path(tempfile.gettempdir()) / f"earl-gpus-{whose}"
    folder.mkdir(exist_ok=True)
    taken: dict[str, IO[str]] = {}
    for name in visible:
        if len(taken) < count and (lock := processes.try_lock(folder / f"{name}.lock")) is not None:
            taken[name] = lock
    return taken


def _visible() -> list[str]:
    """Return the GPUs of this process: those that the environment names, or all of the machine's."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(index) for index, _ in enumerate(listed.stdout.splitlines())]
