"""GPUs that a job may get: how much they hold and how fast they are, by what a profile or the command line calls them.

Nothing here imports torch or asks a cluster.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from earl.execution import gpus as visible_gpus
from earl.messages import names
from earl.messages.errors import EarlError

USABLE = 0.99
"""Of the nominal memory, in GiB: what torch may use of an 80 GB H100 is 79.2 GiB."""
MEMORY = "gpu_memory_gb"
"""A job's resource that says how much memory its GPUs have."""
SLICES = 7
"""Of which a MIG device has some: `3g.20gb` computes on three of them."""
LEAST = 10
"""GB that a GPU of a known type has at least; what is less after its colon is a number of GPUs."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: bytes that its processes may use.
        flops: floating-point operations a second in bfloat16, dense, by the data sheet.
        bandwidth: bytes a second of its memory, by the data sheet.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float

    @property
    def is_part(self) -> bool:
        """Whether it is a MIG device, of which CUDA shows a process one at most."""
        return bool(_slices(self.name))

    @property
    def text(self) -> str:
        return f"{self.name} ({self.memory / 1e9:.0f} GB)"


DATA_SHEETS = {
    "b200": (180, 2250e12, 8.0e12),
    "h200": (141, 989e12, 4.8e12),
    "h100": (80, 989e12, 3.35e12),
    "gh200": (96, 989e12, 4.0e12),
    "h20": (96, 148e12, 4.0e12),
    "a100": (80, 312e12, 2.0e12),
    "a40": (45, 150e12, 0.7e12),
    "l40s": (45, 362e12, 0.86e12),
    "l40": (45, 181e12, 0.86e12),
    "rtx6000": (45, 364e12, 0.96e12),
    "a6000": (48, 155e12, 0.77e12),
    "a10": (22, 125e12, 0.6e12),
    "l4": (22, 121e12, 0.3e12),
    "v100": (32, 125e12, 0.9e12),
}
"""Nominal GiB (what error correction takes left out), FLOP/s and bytes/s, by type."""
UNKNOWN = (312e12, 2.0e12)
"""Speed that is assumed of another type: an A100's."""


def gpu(text: str) -> Gpu:
    """Return the GPU of a text: a type (`h100`), a type and its GB (`a100:40`), or GB alone (`24`).

    Raises:
        EarlError: the type is unknown, and nothing says how much memory it has.
    """
    kind, colon, size = text.strip().lower().rpartition(":") if ":" in text else (text.strip().lower(), "", "")
    if not size and re.fullmatch(r"\d+(\.\d+)?", kind):
        kind, size = "gpu", kind
    if not kind or (colon and not re.fullmatch(r"\d+(\.\d+)?", size)) or (size and float(size) == 0):
        raise EarlError(f"--gpu {text!r}: give a type, type:GB or GB, such as h100, a100:40 or 24")
    if size and float(size) < LEAST and _sheet(kind):
        raise EarlError(
            f"--gpu {text}: the number is the GB of one GPU, and no {kind} has {size}; give {kind} alone. How many a "
            "job has is what the configuration says (train_processes), or `gpu` of a profile"
        )
    found = of_type(kind, float(size) if size else None)
    if found is None:
        raise EarlError(f"--gpu {text}: {_unknown(kind)}; or say its memory in GB: {kind}:80")
    return found


def of_type(kind: str, gigabytes: float | None = None) -> Gpu | None:
    """Return the GPU of a type, as Slurm calls it; None where nothing says how much memory it has.

    Args:
        gigabytes: its memory; None: as the type's name says (`a100_40gb`), or its data sheet.
    """
    sheet = _sheet(kind)
    if gigabytes is None:
        said = re.search(r"(\d+)\s*gb", kind.lower())
        gigabytes = float(said[1]) if said else sheet and sheet[0]
    if gigabytes is None:
        return None
    share = (_slices(kind) or SLICES) / SLICES
    flops, bandwidth = (share * speed for speed in (sheet[1:] if sheet else UNKNOWN))
    return Gpu(kind, int(USABLE * gigabytes * 2**30), flops, bandwidth)


def _slices(kind: str) -> int | None:
    """Return the seventh parts of a GPU that a MIG device computes on, by its name; None of a whole GPU."""
    found = re.search(r"(?<![a-z\d])(\d)g\.\d+gb", kind.lower())
    return int(found[1]) if found else None


def _sheet(kind: str) -> tuple[int, float, float] | None:
    spelled = (kind.lower(), re.sub(r"[^a-z0-9]", "", kind.lower()))
    # The longest name wins: an L40S is no L4. A digit after it is part of another name.
    for name in sorted(DATA_SHEETS, key=len, reverse=True):
        if any(re.search(rf"{name}(?!\d)", text) for text in spelled):
            return DATA_SHEETS[name]
    return None


def _unknown(kind: str) -> str:
    known = names.hint(kind, DATA_SHEETS, f"there are {', '.join(DATA_SHEETS)}")
    return f"is no type of GPU that is known here; {known}"


Resources = Callable[[str], Mapping[str, Any]]
"""From a rule's name to what its jobs ask for, by the name of a resource."""


PROFILE = "the profile asks for"


@dataclass(frozen=True)
class Asked:
    """GPUs that a rule's job asks for.

    Attributes:
        gpu: None where nothing says what kind they are.
        count: on each node; None: as many as the configuration needs.
        source: what says so, with its verb.
    """

    gpu: Gpu | None
    count: int | None
    nodes: int = 1
    source: str = PROFILE

    def or_of(self, machine: "Asked") -> "Asked":
        """Return what is asked for, and what it leaves open as the machine that jobs run on has it."""
        gpu = self.gpu or machine.gpu
        if self.count is None and machine.count is not None:
            return replace(machine, gpu=gpu)
        return replace(self, gpu=gpu)


def asked(resources: Mapping[str, Any]) -> Asked:
    """Return what a job asks for: `gpu` as a number or type:number, `gpu_memory_gb`, `nodes`.

    Raises:
        EarlError: one of them cannot be right.
    """
    for name, (pattern, fitting) in WRITTEN.items():
        if resources.get(name) is not None and not re.fullmatch(pattern, str(resources[name])):
            raise EarlError(f"resource {name}={resources[name]!r} of a profile should be {fitting}")
    kind, _, count = str(resources.get("gpu") or "").rpartition(":")
    gigabytes = resources.get(MEMORY)
    found = of_type(kind or "gpu", float(gigabytes) if gigabytes else None) if kind or gigabytes else None
    return Asked(found, int(count) if count else None, int(resources.get("nodes") or 1))


WRITTEN = {
    "gpu": (r"([^\s:,]+:)?\d+", "a number of GPUs, or type:number, such as h100:8"),
    MEMORY: (r"0*[1-9]\d*(\.\d+)?", "a number of GB, such as 80"),
    "nodes": (r"0*[1-9]\d*", "a whole number, 1 or more"),
}
"""Resources that are read, as a pattern and in words."""


def of_profiles(*profiles: str) -> Resources:
    """Return what Snakemake profiles say, the later ones in the place of the earlier.

    Args:
        profiles: names below `profiles/`, or folders.

    Raises:
        EarlError: there is none of this name, or it cannot be read.
    """
    default: dict[str, Any] = {}
    by_rule: dict[str, dict[str, Any]] = {}
    for profile in profiles:
        path = _profile_file(profile)
        try:
            said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            default |= _mapping(said.get("default-resources"))
            for rule, resources in _by_rule(said.get("set-resources")).items():
                by_rule.setdefault(rule, {}).update(resources)
        except (yaml.YAMLError, ValueError, AttributeError) as error:
            raise EarlError(
                f"{path}: cannot be read ({error}); see the page on profiles in Snakemake's docs"
            ) from error
    return lambda rule: {**default, **by_rule.get(rule, {})}


def _profile_file(profile: str) -> Path:
    places = [folder / "config.yaml" for folder in (Path(profile), Path("profiles") / profile)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise EarlError(f"--profile {profile}: there is neither {places[0]} nor {places[1]}; name a profile's folder")
    return path


def _mapping(said: Any) -> dict[str, Any]:
    """Read resources as a mapping, or as a list of name=value."""
    if isinstance(said, Mapping):
        return dict(said)
    return dict(item.split("=", 1) for item in said or ())


def _by_rule(said: Any) -> dict[str, dict[str, Any]]:
    """Read resources of rules as a mapping of mappings, or as a list of rule:name=value."""
    if isinstance(said, Mapping):
        return {rule: _mapping(values) for rule, values in said.items()}
    found: dict[str, dict[str, Any]] = {}
    for item in said or ():
        rule, _, resource = item.partition(":")
        found.setdefault(rule, {}).update(_mapping([resource]))
    return found


def here() -> Asked:
    """Return the GPUs that jobs on this machine can have: the smallest of them, and how many a job can use at once.

    Those that are visible here count, by the driver's own program. A job uses MIG devices only where there are no whole
    GPUs, and one at most. Nothing is known where there is none.
    """
    visible = visible_gpus.visible()
    whole = [gpu.uuid for gpu in visible if not gpu.is_part]
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in listed.splitlines() if line.count(",") >= 2]
    kinds = [of_type(name, int(size) / 1024) for uuid, size, name in rows if uuid in whole and size.isdigit()]
    if not whole:
        kinds = [of_type(gpu.kind) for gpu in visible]
    smallest = min((gpu for gpu in kinds if gpu), key=lambda gpu: gpu.memory, default=None)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return Asked(smallest, len(whole) or min(1, len(visible)) or None, nodes, "this machine has")
