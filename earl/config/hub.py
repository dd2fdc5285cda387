"""Names of published checkpoints in a configuration: told from folders, and which fields take one.

``model_path``, ``sft.<name>.base_model`` and ``vision_tokenizer_path`` may name a repository of the Hugging Face hub.
The pipeline downloads and converts it, once for all runs that name it (`earl.config.paths`). ``tokenizer_path`` may
name the one that such a policy's tokenizer comes from.
"""

import re
from dataclasses import dataclass
from pathlib import Path

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
