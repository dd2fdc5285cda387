"""GPUs that a job may get: how much they hold and how fast they are, by what a profile or the command line calls them.

Nothing here imports torch or asks a cluster.
"""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from earl.messages import names
from earl.messages.errors import EarlError

USABLE = 0.99
"""Of the nominal memory, in GiB: what torch may use of an 80 GB H100 is 79.2 GiB."""
MEMORY = "gpu_memory_gb"
"""A job's resource that says how much memory its GPUs have."""


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
    kind, _, size = text.strip().lower().rpartition(":") if ":" in text else (text.strip().lower(), "", "")
    if not size and re.fullmatch(r"\d+(\.\d+)?", kind):
        kind, size = "gpu", kind
    if size and not re.fullmatch(r"\d+(\.\d+)?", size):
        raise EarlError(f"--gpu {text}: give a type, or type:GB, such as h100 or a100:40")
    found = of_type(kind, float(size) if size else None)
    if found is None:
        raise EarlError(f"--gpu {text}: {_unknown(kind)}; or say its memory in GB: {kind}:80")
    return found


def of_type(kind: str, gigabytes: float | None = None) -> Gpu | None:
    """Return the GPU of a type, as Slurm calls it; None where nothing says how much memory it has.

    Args:
        gigabytes: its memory; None: as the type's name says (`a100_40gb`), or its data sheet.
    """
    plain = re.sub(r"[^a-z0-9]", "", kind.lower())
    # The longest name wins: an L40S is no L4.
    sheet = next((DATA_SHEETS[name] for name in sorted(DATA_SHEETS, key=len, reverse=True) if name in plain), None)
    if gigabytes is None:
        said = re.search(r"(\d+)\s*gb", kind.lower())
        gigabytes = float(said[1]) if said else sheet and sheet[0]
    if gigabytes is None:
        return None
    flops, bandwidth = sheet[1:] if sheet else UNKNOWN
    return Gpu(kind, int(USABLE * gigabytes * 2**30), flops, bandwidth)


def _unknown(kind: str) -> str:
    known = names.hint(kind, DATA_SHEETS, f"there are {', '.join(DATA_SHEETS)}")
    return f"is no type of GPU that is known here; {known}"


Resources = Callable[[str], Mapping[str, Any]]
"""From a rule's name to what its jobs ask for, by the name of a resource."""


@dataclass(frozen=True)
class Asked:
    """GPUs that a rule's job asks for.

    Attributes:
        gpu: None where nothing says what kind they are.
        count: on each node; None: as many as the configuration needs.
    """

    gpu: Gpu | None
    count: int | None
    nodes: int = 1


def asked(resources: Mapping[str, Any]) -> Asked:
    """Return what a job asks for: `gpu` as a number or type:number, `gpu_memory_gb`, `nodes`."""
    kind, _, count = str(resources.get("gpu") or "").rpartition(":")
    gigabytes = resources.get(MEMORY)
    found = of_type(kind or "gpu", float(gigabytes) if gigabytes else None) if kind or gigabytes else None
    return Asked(found, int(count) if count.isdigit() else None, int(resources.get("nodes") or 1))


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


def here() -> Gpu | None:
    """Return the smallest GPU of this machine, by the driver's own program; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.partition(",") for line in listed.splitlines() if line.strip()]
    sizes = [(int(size), name.strip()) for size, _, name in rows if size.strip().isdigit()]
    if not sizes:
        return None
    mebibytes, name = min(sizes)
    return of_type(name, mebibytes / 1024)
