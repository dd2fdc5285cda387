"""What a launcher is asked to run: a command, what it needs, and a folder for what is kept about it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from earl.messages import names
from earl.messages.errors import EarlError


@dataclass(frozen=True)
class Resources:
    """What a job needs. The names are those that workflow profiles use; a GPU, a minute and a MiB are whole numbers.

    ``local`` reads ``tasks_per_node`` and ``gpu``, ``slurm`` all of them.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    """Ranks on each node. With more than one rank in all, each finds its rank in its environment."""
    gpu: int = 0
    """GPUs on each node, for all of its ranks together."""
    cpus_per_task: int = 1
    mem_mb: int | None = None
    """Memory on each node, in MiB."""
    runtime: int | None = None
    """Minutes until the job is stopped; it is warned and queued again as the same job, see ``timeouts``."""
    slurm_partition: str | None = None
    slurm_account: str | None = None
    constraint: str | None = None
    """Features that the node must have, as in ``sbatch --constraint``."""
    qos: str | None = None
    timeouts: int = 3
    """How often a job that reached its time limit is queued again before it counts as failed."""
    warn_seconds: int = 60
    """Seconds before the time limit at which the job is stopped in good order and queued again."""

    @property
    def ranks(self) -> int:
        """The number of ranks on all nodes."""
        return self.nodes * self.tasks_per_node

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hexadecimal."""
        return _digest(asdict(self))

    @classmethod
    def names(cls) -> list[str]:
        return [item.name for item in fields(cls)]

    @classmethod
    def parse(cls, settings: Sequence[str]) -> "Resources":
        """Return what ``name=value`` texts ask for.

        Raises:
            EarlError: a name that is not known, or a value that is not a whole number where there should be one.
        """
        values: dict[str, int | str] = {}
        for setting in settings:
            name, separator, value = setting.partition("=")
            if not separator or name not in cls.names():
                hint = names.hint(name, cls.names(), f"there are {', '.join(cls.names())}")
                raise EarlError(f"resource '{setting}': is not name=value with a known name; {hint}")
            is_text = "str" in str(cls.__dataclass_fields__[name].type)
            if not is_text and not value.isdecimal():
                raise EarlError(f"resource '{setting}': should be a whole number")
            values[name] = value if is_text else int(value)
        found = cls(**values)  # type: ignore[arg-type]
        if found.nodes < 1 or found.tasks_per_node < 1 or found.cpus_per_task < 1:
            raise EarlError("resources nodes, tasks_per_node and cpus_per_task: should be 1 at least")
        return found


@dataclass(frozen=True)
class Job:
    """A command to run, and where what is known about the running of it lies.

    Attributes:
        name: short name for people, such as ``train-000012``.
        command: the command and its arguments; it runs in the present working directory.
        folder: logs and the record of what was started, for this command's outputs alone: two jobs of one folder
            never run at once.
        outputs: files that are there when the job has done its work.
        resources: what it needs.
    """

    name: str
    command: list[str]
    folder: Path
    outputs: list[Path] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)

    @property
    def digest(self) -> str:
        """SHA-256 of the command, in hexadecimal: the same job asked for again has the same."""
        return _digest(self.command)

    def missing_outputs(self) -> list[Path]:
        return [path for path in self.outputs if not path.exists()]

    @property
    def slurm_name(self) -> str:
        """The job's name in Slurm: no two folders have the same."""
        where = hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:12]
        return f"earl-{self.name}-{where}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
