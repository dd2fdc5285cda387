"""From the learner's GPU to files and back: the rates by which checkpoints, and stages by file, hand weights over."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu import models
from benchmarks.gpu.context import Context, SkipSection
from benchmarks.gpu.results import Range
from earl.emu3 import saving
from earl.files import manifest, tensors

THREADS = 16


def run(context: Context) -> None:
    source = torch.randn(2**16 if context.small else 2**30, device=context.device).bfloat16()
    with context.attempt("device to host"):
        _to_host(context, source)
    with context.attempt("finite"):
        _finite(context, source)
    del source
    folders = {"/dev/shm": Path("/dev/shm"), "the results' folder": context.path.parent}
    for name, folder in folders.items():
        with context.attempt(f"policy in {name}"):
            _policy(context, name, folder)


def _rate(context: Context, size: int, function: Callable[[], object], times: int = 1) -> float:
    return size / 1e9 / context.seconds(function, times)


def _to_host(context: Context, source: torch.Tensor) -> None:
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=context.device.type == "cuda")
    rate = _rate(context, source.nbytes, lambda: pinned.copy_(source), 3)
    context.measure("device to host, pinned", rate, "GB/s", Range(low=20))
    rate = _rate(context, source.nbytes, source.cpu, 2)
    context.measure("device to host, pageable", rate, "GB/s", Range(low=2), "as weights are written")
    rate = _rate(context, source.nbytes, lambda: source.copy_(pinned), 3)
    context.measure("host to device, pinned", rate, "GB/s", Range(low=20))


def _finite(context: Context, source: torch.Tensor) -> None:
    """Whether all weights are finite is asked before they are written and after they were read."""
    host = source.cpu()
    for name, tensor, low in (("the device", source, 500), (f"{torch.get_num_threads()} CPU threads", host, 1)):
        part = tensor if tensor is source else tensor[: len(tensor) // 4]
        rate = _rate(context, part.nbytes, lambda part=part: tensors.is_finite(part), 2)
        context.measure(f"finite, by extremes, on {name}", rate, "GB/s", Range(low=low))
        rate = _rate(context, part.nbytes, lambda part=part: bool(part.isfinite().all()), 1)
        context.measure(f"finite, by isfinite, on {name}", rate, "GB/s")


def _policy(context: Context, name: str, parent: Path) -> None:
    """Write a policy as stages do, read it, and hash it: embedding, head and one layer, 3.5 GB at full size."""
    config = models.text_config(context.small, 1)
    size = 2 * (2 * config.vocab_size * config.hidden_size + models.layer_weights(config))
    if not parent.is_dir() or shutil.disk_usage(parent).free < 2 * size:
        raise SkipSection(f"{parent} has less room than {2 * size / 1e9:.1f} GB")
    model = models.policy(config, context.device, torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="earl-gpu-check-", dir=parent) as temporary:
        folder = Path(temporary)
        rate = size / 1e9 / context.seconds(partial(saving.save_policy, model, folder, {}), 1, warm=False)
        context.measure(f"{name}: written, hashed and sealed", rate, "GB/s", Range(low=1))
        rate = size / 1e9 / context.seconds(partial(saving.save_policy, model, None, {}), 1, warm=False)
        context.measure(f"{name}: hashed alone, from the GPU", rate, "GB/s", Range(low=1))
        del model
        files = sorted(folder.glob("*.safetensors"))
        loaded = context.seconds(lambda: [load_file(path, str(context.device)) for path in files], 1, warm=False)
        rate = size / 1e9 / loaded
        context.measure(f"{name}: safetensors to the device", rate, "GB/s", Range(low=1), "cached by the system")
        if parent == context.path.parent:
            return
        largest = max(files, key=lambda path: path.stat().st_size)
        rate = _rate(context, largest.stat().st_size, lambda: manifest.digest_file(largest))
        context.measure("SHA-256, 1 thread", rate, "GB/s", Range(low=0.8))
        rate = _rate(context, largest.stat().st_size, lambda: _hashed_in_parts(largest))
        cores = len(os.sched_getaffinity(0))
        context.measure(f"SHA-256, {THREADS} threads on {cores} cores", rate, "GB/s")


def _hashed_in_parts(path: Path) -> list[bytes]:
    length = -(-path.stat().st_size // THREADS)

    def part(index: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(index * length)
            return hashlib.sha256(stream.read(length)).digest()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(part, range(THREADS)))
