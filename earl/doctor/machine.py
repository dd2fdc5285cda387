"""What this node has: GPUs, memory, shared memory, disk."""

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from earl.doctor.wanted import Wanted
from earl.files import atomic

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 2**30
"""Bytes of shared memory that NCCL and vLLM may use between processes of a node; containers often have 64 MiB."""


def gpus(wanted: Wanted) -> tuple[bool | None, str]:
    """Multiply matrices on every visible GPU."""
    from earl.execution import runtime

    count, missed = 0, runtime.refusal("auto")
    if runtime.sees_gpu():
        import torch

        count = torch.cuda.device_count()
    if not count:
        least = int(missed is not None) if wanted.gpus is None else wanted.gpus
        told = f"; device {missed}" if missed and least else ""
        return (False if least else None), f"none visible of {least} asked for{told}"
    details, is_right = [], wanted.gpus is None or count >= wanted.gpus
    for index in range(count):
        is_right &= multiplies(f"cuda:{index}")
        free, total = torch.cuda.mem_get_info(index)
        details.append(f"{torch.cuda.get_device_name(index)} {free / 1e9:.0f}/{total / 1e9:.0f} GB free")
    few = f" of {wanted.gpus} asked for" if wanted.gpus is not None and count < wanted.gpus else ""
    return is_right, f"{count}{few}: {', '.join(details)}"


def fit(wanted: Wanted) -> tuple[bool | None, str]:
    """Compare what stages take with the smallest GPU of this node, by simulating them: some minutes of the CPU."""
    from earl.execution import runtime

    if wanted.misfits is None or not runtime.sees_gpu():
        return None, "no experiment or no GPU"
    import torch

    count = torch.cuda.device_count()
    size, name = min((torch.cuda.mem_get_info(index)[1], torch.cuda.get_device_name(index)) for index in range(count))
    misfits = wanted.misfits(name, size, count)
    return not misfits, "; ".join(misfits) or f"every stage fits on {count} times {name}, {size / 1e9:.0f} GB"


def multiplies(device: str) -> bool:
    import torch

    ones = torch.ones(512, 512, device=device)
    return bool((ones @ ones == 512).all())


def memory(wanted: Wanted) -> tuple[bool | None, str]:
    """Look at main memory that is free for this process, by the machine and by what its job was given."""
    free = min([_available(), *_left_in_groups()])
    return free >= wanted.memory.size, f"{free / 1e9:.0f} GB free{wanted.memory.text}"


def _available() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    return 1024 * int(found[1]) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what the limits of this process's control groups, and of those above them, leave of main memory."""
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cached = root, "memory.max", "memory.current", r"^(?:in)?active_file (\d+)$"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = r"^total_(?:in)?active_file (\d+)$"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.relative_to(top).parts)]):
            try:
                most, used, held = ((folder / name).read_text().strip() for name in (limit, usage, "memory.stat"))
            except OSError:  # the group above all others has none, and a container may not see its own
                continue
            if most != "max":
                # Files in memory make room for others.
                yield int(most) - int(used) + sum(map(int, re.findall(cached, held, re.MULTILINE)))


def shared_memory(wanted: Wanted) -> tuple[bool | None, str]:
    """Look at the file system by which processes of a node share memory."""
    if not SHARED_MEMORY.is_dir():
        return None, f"there is no {SHARED_MEMORY}"
    free = shutil.disk_usage(SHARED_MEMORY).free
    told = f"{SHARED_MEMORY}: {free / 2**30:.1f} GiB free"
    if free >= LEAST_SHARED:
        return True, told
    told += f", of {LEAST_SHARED / 2**30:.0f} GiB that NCCL and vLLM may need between the GPUs of a node"
    remedy = "start the container with --shm-size=8g or --ipc=host"
    return (False, f"{told}; {remedy}") if wanted.splits_gpus else (None, told)


def disk(wanted: Wanted) -> tuple[bool | None, str]:
    """Write a file as stages do: whole, and in place of another at once."""
    wanted.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(wanted.path).free
    probe, text = probe_file(wanted.path, "disk"), "x" * 2**22
    start = time.monotonic()
    try:
        for content in (text, text[::-1] + "y"):
            atomic.write_text(probe, content)
        is_right = probe.read_text() == text[::-1] + "y" and free >= wanted.disk.size
    finally:
        probe.unlink(missing_ok=True)
    rate = 2 * len(text) / (time.monotonic() - start) / 1e6
    return is_right, f"{wanted.path}: {free / 1e9:.0f} GB free{wanted.disk.text}, renames, {rate:.0f} MB/s"


def probe_file(path: Path, check: str) -> Path:
    """Return a file of this process alone."""
    return path / f".doctor-{check}-{socket.gethostname()}-{os.getpid()}"
