"""Names on the Hugging Face hub in a configuration: of published checkpoints, and of the files of data sets.

``model_path``, ``sft.<name>.base_model`` and ``vision_tokenizer_path`` may name a repository of the Hugging Face hub.
The pipeline downloads and converts it, once for all runs that name it (`earl.config.paths`). ``tokenizer_path`` may
name the one that such a policy's tokenizer comes from. ``raw_datasets.<name>.path`` may name files of a data set,
``hf://datasets/<owner>/<name>/<files>``, which the pipeline downloads in the same way.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# A path has one slash where the name had two.
_DATA_FILES = re.compile(r"hf:/{1,2}datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+\.(?:parquet|arrow))", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_name(value: str) -> bool:
    """Return whether a field's value is the name of a repository, ``<owner>/<name>``, and no folder here."""
    return _REPOSITORY.fullmatch(value) is not None and not Path(value).exists()


def file_name(name: str) -> str:
    """Return a repository's name as part of a path, in the hub's own spelling: ``<owner>--<name>``."""
    return name.replace("/", "--")


@dataclass(frozen=True)
class Conversion:
    """A published checkpoint that is turned into a folder of ours; what `earl convert model` is called with."""

    source: str
    revision: str | None = None
    tokenizer: str | None = None
    """Folder or repository of a policy's tokenizer; None takes that of ``source``."""
    vision: bool = False
    """Whether the vision tokenizer is wanted, not the policy."""


@dataclass(frozen=True)
class DataFiles:
    """Parquet or Arrow files of a data set on the hub, as `earl download` is called with."""

    repository: str
    revision: str | None
    """A branch, tag or commit; None takes the main one."""
    files: str
    """A path in the repository, or a pattern, in which ``*`` stands for slashes too."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://datasets/{self.repository}{revision}/{self.files}"


def data_files(path: Path | str) -> DataFiles | None:
    """Return the files that ``hf://datasets/<owner>/<name>[@<revision>]/<path or pattern>.parquet`` names, or None.

    Raises:
        ValueError: when it begins like such a name and is none.
    """
    if not str(path).startswith("hf:"):
        return None
    found = _DATA_FILES.fullmatch(str(path))
    if found is None:
        raise ValueError(
            "does not name files as `hf://datasets/<owner>/<name>/<path or pattern>.parquet` (or .arrow) does"
        )
    return DataFiles(*found.groups())
