"""What a node is to have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earl.config.schema import Config

MINIMUM_FREE = 10 * 2**30
"""Bytes of disk where no configuration says more: some checkpoints of a small policy."""


@dataclass(frozen=True)
class Needs:
    """Bytes that something takes, and what that is.

    Attributes:
        size: bytes; 0: nothing is known to be needed.
        what: such as "a checkpoint of 8.5B weights".
    """

    size: int = 0
    what: str = ""

    def lack(self, free: int) -> str:
        """Return how much of what is needed, where `free` bytes are too few, else an empty text."""
        return f" of {self.size / 1e9:.0f} GB needed{f' ({self.what})' if self.what else ''}" * (free < self.size)


@dataclass(frozen=True)
class Wanted:
    """What the node is to have.

    Attributes:
        path: folder for the files of runs.
        gpus: that are to be visible; None: as many as there are, and one at least in a job that was given some.
        judge: address of a judge, or the file that holds it.
        disk, memory: free, on the file system of `path` and of main memory.
        gpu_memory: of each GPU, in all.
        splits_gpus: whether processes of this node will work together on several GPUs.
    """

    path: Path
    gpus: int | None = None
    judge: str | None = None
    disk: Needs = field(default_factory=lambda: Needs(MINIMUM_FREE))
    memory: Needs = field(default_factory=Needs)
    gpu_memory: Needs = field(default_factory=Needs)
    splits_gpus: bool = False


def of(config: "Config | None", path: Path | None = None, gpus: int | None = None, judge: str | None = None) -> Wanted:
    """Return what a configuration needs of a node; what is given besides takes the place of what it says."""
    if config is None:
        return Wanted(path or Path("runs"), gpus, judge)
    if gpus is None and config.device == "cuda":
        gpus = 1
    if judge is None and config.judge == "openai":
        judge = config.reward_function_api_base
    return Wanted(path or Path(config.base_exp_dir), gpus, judge)
