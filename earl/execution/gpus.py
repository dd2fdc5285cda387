"""GPUs of this machine that a stage has to itself: one lock file per GPU, of this user's processes.

A MIG device, an instance of a GPU that is divided, is a GPU of its own, with one difference: CUDA shows a process one
of them at most. So a stage that needs several GPUs takes whole ones.
"""

import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.messages.errors import EarlError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CLAIMED = "EARL_GPUS"
"""Environment variable with the GPUs that this process, or one that started it, has claimed."""
SLURM_LISTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
"""Environment variables that name the GPUs of a job."""
SLURM_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
"""Environment variables that count them, as `2` or `h100:2`."""
LOOK = 0.5
"""Seconds between two looks for GPUs that have become free."""

_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")
_LISTED = re.compile(r"^(GPU (?P<index>\d+)|\s+(?P<part>MIG \S+)).*\(UUID: (?P<uuid>[^)]+)\)", re.MULTILINE)

_held: list[IO[str]] = []
"""Locks, which last as long as the process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device.

    Attributes:
        name: its name in `CUDA_VISIBLE_DEVICES`.
        uuid: its name for every process of the machine; the same as `name` where nothing lists GPUs.
        is_part: whether it is a MIG device.
        kind: what `nvidia-smi` calls such a device, `MIG 3g.20gb`.
    """

    name: str
    uuid: str
    is_part: bool = False
    kind: str = ""


def claim(count: int) -> None:
    """Wait until `count` GPUs are free, keep them until this process ends and see no others, nor its children.

    Call it before CUDA is used. Nothing happens on a machine without GPUs, nor where this process or the one that
    started it holds all that are visible. All or none are held: two processes never wait for each other. Where one is
    needed, MIG devices come after whole GPUs.

    Raises:
        EarlError: there are not as many, free or not.
    """
    gpus = visible() if count else []
    if not gpus:
        return
    whole, parts = [gpu for gpu in gpus if not gpu.is_part], [gpu for gpu in gpus if gpu.is_part]
    usable = whole + parts if count == 1 else whole
    if count > len(usable):
        beside = f", beside {len(parts)} MIG devices, of which a process can use only one" if parts else ""
        raise EarlError(
            f"the stage needs {count} GPUs, but {len(whole)} are visible here{beside}; lower the configuration's"
        )
    if {gpu.name for gpu in gpus} <= set(os.environ.get(CLAIMED, "").split(",")):
        return
    # Where Slurm shows each job its own GPUs alone, they may have the same names in every job of the node.
    owner = "-".join(filter(None, [str(os.geteuid()), os.environ.get("SLURM_JOB_ID")]))
    folder = Path(tempfile.gettempdir()) / f"earl-gpus-{owner}"
    is_told = False
    while len(taken := _take_free(folder, usable, count)) < count:
        for lock in taken.values():
            lock.close()
        if not is_told:
            log.info("waiting for %d free GPUs of %d", count, len(usable))
            is_told = True
        time.sleep(LOOK)
    _held.extend(taken.values())
    os.environ[VISIBLE] = os.environ[CLAIMED] = ",".join(taken)


def visible() -> list[Gpu]:
    """Return the GPUs of this process: those that the environment names, or all of the machine's.

    A number stands for the GPU that `nvidia-smi` lists under it, and for its MIG devices where it is divided.
    """
    named = os.environ.get(VISIBLE)
    if named is not None and not _names(named):
        return []
    by_index = _listed()
    if named is None:
        return [gpu for gpus in by_index.values() for gpu in gpus]
    return [gpu for name in _names(named) for gpu in _named(name, by_index)]


def asked_for() -> str | None:
    """Return the variable and value by which the environment gives this process GPUs; None where it gives none.

    Those that it has claimed itself were not given.
    """
    named = os.environ.get(VISIBLE, "")
    found = [VISIBLE] if _names(named) and named != os.environ.get(CLAIMED) else []
    found += [variable for variable in SLURM_LISTS if os.environ.get(variable)]
    found += [name for name in SLURM_COUNTS if os.environ.get(name, "").rpartition(":")[2] not in ("", "0")]
    return f"{found[0]}={os.environ[found[0]]}" if found else None


def _take_free(folder: Path, gpus: list[Gpu], count: int) -> dict[str, IO[str]]:
    taken: dict[str, IO[str]] = {}
    for gpu in gpus:
        path = folder / f"{gpu.uuid.replace('/', '-')}.lock"
        if len(taken) < count and (lock := processes.try_lock(path)) is not None:
            taken[gpu.name] = lock
    return taken


def _names(value: str) -> list[str]:
    """Return the names in a list of GPUs as CUDA reads it: what follows a wrong one, such as -1, is hidden."""
    return list(takewhile(_NAME.fullmatch, (name.strip() for name in value.split(","))))


def _named(name: str, by_index: dict[str, list[Gpu]]) -> Iterator[Gpu]:
    if name.isdigit():
        gpus = by_index.get(str(int(name)), [])
        # The whole one keeps its number: CUDA may count in another order than nvidia-smi.
        yield from gpus if gpus and gpus[0].is_part else [Gpu(name, gpus[0].uuid if gpus else name)]
        return
    # CUDA takes the beginning of a UUID for the whole.
    known = [gpu for gpus in by_index.values() for gpu in gpus if gpu.uuid.startswith(name)]
    yield replace(known[0], name=name) if known else Gpu(name, name, name.startswith("MIG-"))


def _listed() -> dict[str, list[Gpu]]:
    """Return the machine's GPUs by their numbers: for each, itself or its MIG devices."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return {}
    whole: dict[str, list[Gpu]] = {}
    parts: dict[str, list[Gpu]] = {}
    index = ""
    for line in _LISTED.finditer(listed):
        uuid = line["uuid"]
        if line["index"] is not None:
            index = line["index"]
            whole[index] = [Gpu(uuid, uuid)]
        else:
            parts.setdefault(index, []).append(Gpu(uuid, uuid, True, line["part"]))
    return whole | parts
