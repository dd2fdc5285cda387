"""What a node is to have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MINIMUM_FREE = 10 * 2**30
"""Bytes of disk where no configuration says more: some checkpoints of a small policy."""


@dataclass(frozen=True)
class Needs:
    """Bytes that something takes, and what that is.

    Attributes:
        size: bytes; 0: nothing is known to be needed.
        what: such as "3 checkpoints of 102 GB".
    """

    size: int = 0
    what: str = ""

    @property
    def text(self) -> str:
        """What follows "<n> GB free"; empty where nothing is known to be needed."""
        return f" of {self.size / 1e9:.0f} GB needed{f' ({self.what})' if self.what else ''}" * bool(self.size)


@dataclass(frozen=True)
class Wanted:
    """What the node is to have.

    Attributes:
        path: folder for the files of runs.
        gpus: that are to be visible; None: as many as there are, and one at least in a job that was given some.
        judge: address of a judge, or the file that holds it.
        disk, memory: free, on the file system of `path` and of main memory.
        misfits: from the name and bytes of its smallest GPU and how many there are to why stages do not fit on them.
        splits_gpus: whether processes of this node will work together on several GPUs.
    """

    path: Path
    gpus: int | None = None
    judge: str | None = None
    disk: Needs = field(default_factory=lambda: Needs(MINIMUM_FREE))
    memory: Needs = field(default_factory=Needs)
    misfits: Callable[[str, int, int], Sequence[str]] | None = None
    splits_gpus: bool = False
