"""The settings of a workflow: everything that ``--config``, a profile or ``config/config.yaml`` can say.

Snakemake reads ``--config key=value`` as YAML, which turns ``a: b`` into a mapping, cuts a text at `` #`` and leaves
``false`` a text that is true. So what was given there is read from its words as they were typed.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from earl.config import load
from earl.config.schema import Config
from earl.messages import names
from earl.messages.errors import EarlError

Granularity = Literal["segment", "stage"]


@dataclass(frozen=True)
class Settings:
    """The settings, each by the name that it has in ``--config``.

    Attributes:
        experiment: Jsonnet files, one run each.
        set: values of fields by dotted name, in the place of those of the experiments.
        granularity: what one job is: a segment of iterations, or a single stage.
        accept_changes: continue a run whose frozen configuration differs.
        earl_command: the words that run ``earl`` in the environment of the stages.
    """

    experiment: tuple[str, ...]
    set: Mapping[str, Any] = field(default_factory=dict)
    granularity: Granularity = "segment"
    accept_changes: bool = False
    earl_command: str = f"{shlex.quote(sys.executable)} -m earl"

    @property
    def by_segment(self) -> bool:
        return self.granularity == "segment"


def read(config: Mapping[str, Any], arguments: Iterable[str] | None = ()) -> Settings:
    """Return the settings.

    Args:
        config: Snakemake's ``config``, in which configuration files and ``--config`` are joined.
        arguments: what followed ``--config``, as it was typed; it takes the place of what ``config`` makes of it.

    Raises:
        EarlError: a setting that does not exist, with the nearest one; a value that a setting cannot have; no
            experiment.
    """
    values = dict(config) | _typed(arguments or ())
    known = [each.name for each in fields(Settings)]
    for name in values:
        if name not in known:
            is_field = name.split(".")[0] in Config.model_fields
            remedy = f"to set the field, write set={name}=..." if is_field else names.hint(name, known, "")
            raise EarlError(f"--config {name}=...: is not a setting; {remedy}")
    readers = {
        "experiment": _experiments,
        "set": _overrides,
        "granularity": _granularity,
        "accept_changes": _flag,
        "earl_command": str,
    }
    found = {name: readers[name](value) for name, value in values.items() if value not in (None, "", [])}
    if not found.get("experiment"):
        raise EarlError(
            "No experiment was named. Say which one, or a list with commas between: "
            "--config experiment=config/demo.jsonnet"
        )
    return Settings(**found)


def _typed(arguments: Iterable[str]) -> dict[str, Any]:
    """Return the texts after ``--config`` by name; what can be a list may be given several times."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        found[name] = [*found.get(name, []), *_listed(text)] if name in ("experiment", "set") else text
    return found


def _listed(text: str) -> list[Any]:
    """Return the items of a JSON list, or the text as the only one."""
    try:
        value = json.loads(text) if text.startswith("[") else None
    except ValueError:
        value = None
    return value if isinstance(value, list) else [text]


def _items(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list | tuple) else _listed(str(value)))]


def _experiments(value: Any) -> tuple[str, ...]:
    return tuple(path.strip() for item in _items(value) for path in item.split(",") if path.strip())


def _overrides(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return {name: text for item in _items(value) for name, text in load.parse_overrides(item, load.WORKFLOW).items()}


def _granularity(value: Any) -> Any:
    if value not in get_args(Granularity):
        raise EarlError(f"granularity={value}: is neither segment nor stage")
    return value


def _flag(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise EarlError(f"accept_changes={value}: is neither true nor false")
    return text == "true"
