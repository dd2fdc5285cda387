"""The machine: GPU, driver, memory, MIG, /dev/shm, and whether products and copies run at the card's speed."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.context import Context, Stop
from benchmarks.gpu.results import Range

PACKAGES = ("transformers", "numpy", "safetensors", "pydantic", "pyarrow", "snakemake", "vllm", "flash-attn")
QUERY = "name,driver_version,mig.mode.current,power.limit,clocks.max.sm,ecc.mode.current"
BF16_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "B200": 2250,
    "B300": 2250,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "L40S": 362,
}
"""Dense products in bfloat16, by what is in a card's name, from the makers' data sheets."""
SHARED_MEMORY = 1.0
"""GB that NCCL and vLLM need of /dev/shm; containers have 0.064 unless told otherwise."""


def run(context: Context) -> None:
    context.note("machine", f"{platform.platform()}, Python {platform.python_version()}, {_cores()} CPU cores")
    context.note("packages", ", ".join(_versions()))
    _shared_memory(context)
    import torch

    context.note("torch", f"{torch.__version__}, for CUDA {torch.version.cuda}")
    if not context.small:
        _visible(context)
        _gpu(context)
    with context.attempt("bfloat16 product"):
        _product(context)
    with context.attempt("copy on the device"):
        _copy(context)


def specification(name: str) -> int | None:
    """Return the TFLOP/s of `BF16_TFLOPS` for a card's name, None where it is unknown."""
    known = [key for key in BF16_TFLOPS if all(word in name.replace("-", " ").split() for word in key.split())]
    return BF16_TFLOPS[max(known, key=len)] if known else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


def _shared_memory(context: Context) -> None:
    path = Path("/dev/shm")
    size = shutil.disk_usage(path).total / 1e9 if path.is_dir() else 0.0
    context.measure("/dev/shm", size, "GB", Range(low=SHARED_MEMORY))


def _visible(context: Context) -> None:
    import torch

    if torch.version.cuda is None:
        raise Stop(f"torch {torch.__version__} is a build for CPUs; install one for CUDA, or name --device cpu")
    if not torch.cuda.is_available():
        raise Stop("torch sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or name --device cpu")


def _gpu(context: Context) -> None:
    import torch

    device = context.device
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    capability = torch.cuda.get_device_capability(device)
    count, processors = torch.cuda.device_count(), properties.multi_processor_count
    context.note("GPU", f"{properties.name}, {count} visible, {processors} multiprocessors")
    found = ".".join(map(str, capability))
    context.require("compute capability", capability >= (8, 0), found, "at least 8.0, for bfloat16")
    context.note("libraries", f"cuDNN {torch.backends.cudnn.version()}, NCCL {_nccl()}")
    context.measure("memory of the GPU", total / 1e9, "GB", note=f"{total / 2**30:.1f} GiB")
    context.measure("free at the start", 100 * free / total, "%", Range(low=97), "others use the rest")
    context.note("nvidia-smi", f"{QUERY}: {_smi(f'--query-gpu={QUERY}', '--format=csv,noheader')}")
    divided = [line.strip() for line in _smi("--list-gpus").splitlines() if line.strip().startswith("MIG")]
    context.note("MIG", f"{len(divided)} devices: {'; '.join(divided)}" if divided else "not divided")


def _nccl() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not built in"


def _smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return f"no answer ({type(error).__name__})"
    return (done.stdout or done.stderr).strip()


def _product(context: Context) -> None:
    import torch

    side = 256 if context.small else 8192
    one, other = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = context.seconds(lambda: one @ other, 3 if context.small else 20)
    known = None if context.small else specification(torch.cuda.get_device_name(context.device))
    note = f"{known} by its data sheet" if known else ""
    context.measure(
        "bfloat16 product", 2e-12 * side**3 / seconds, "TFLOP/s", Range(low=0.65 * known) if known else None, note
    )


def _copy(context: Context) -> None:
    import torch

    source = torch.ones(2**20 if context.small else 2**32, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = context.seconds(lambda: target.copy_(source), 10)
    context.measure("copy on the device", 2e-9 * source.nbytes / seconds, "GB/s", note="read and written")
