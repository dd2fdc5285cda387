"""The settings of a workflow: all that ``--config``, a profile and ``config/config.yaml`` can say."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from earl.config import load
from earl.config.schema import Config
from earl.messages import names
from earl.messages.errors import EarlError


def _items(value: Any) -> list[str]:
    """Return the texts of a list, of a JSON list, or a single one."""
    with contextlib.suppress(TypeError, ValueError):
        value = json.loads(value) if str(value).startswith("[") else value
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _paths(value: Any) -> list[str]:
    return [path.strip() for item in _items(value) for path in item.split(",") if path.strip()]


def _overrides(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list):
        return {name: field for item in value for name, field in _overrides(item).items()}
    text = str(value)
    return load.parse_overrides(_items(text) if text.startswith("[") else text, load.WORKFLOW)


class Settings(BaseModel):
    """The settings, each by its name in ``--config``."""

    model_config = ConfigDict(frozen=True)

    experiment: Annotated[list[str], BeforeValidator(_paths)] = []
    """Jsonnet files, one run each."""
    set: Annotated[dict[str, Any], BeforeValidator(_overrides)] = {}
    """Values of fields by dotted name, which take the place of those of the experiments."""
    granularity: Literal["segment", "stage"] = "segment"
    """What one job is: a segment of iterations, or a single stage."""
    accept_changes: bool = False
    """Continue a run whose frozen configuration differs."""
    check_memory: bool = True
    """Refuse stages that, by estimate, do not fit on their GPUs, where it is known which these are."""
    earl_command: str = f"{shlex.quote(sys.executable)} -m earl"
    """The words that run ``earl`` in the environment of the stages."""


def read(config: Mapping[str, Any], arguments: Iterable[str] = ()) -> Settings:
    """Return the settings.

    Args:
        config: Snakemake's ``config``, in which configuration files and ``--config`` are joined.
        arguments: what followed ``--config``, as typed. Snakemake reads it as YAML, which turns ``a: b`` into a
            mapping, ends a text at `` #`` and takes ``007`` for 7; so these texts count, not what became of them.

    Raises:
        EarlError: an unknown setting, with the nearest name; a value that a setting cannot have; no experiment.
    """
    typed: dict[str, Any] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        typed.setdefault(name, []).append(text)
    # What can be a list may be given several times; of the others, the last counts.
    typed = {name: texts if name in ("experiment", "set") else texts[-1] for name, texts in typed.items()}
    given = {name: value for name, value in (dict(config) | typed).items() if value not in (None, "", [""])}
    for name in given:
        if name not in Settings.model_fields:
            is_field = name.split(".")[0] in Config.model_fields
            remedy = f"set the field by set={name}=..." if is_field else names.hint(name, Settings.model_fields, "")
            raise EarlError(f"--config {name}=...: is not a setting; {remedy}")
    if not given.get("experiment"):
        raise EarlError("No experiment was named; --config experiment=config/demo.jsonnet, or several with commas")
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = [f"{each['loc'][0]}={each['input']}: {each['msg']}" for each in error.errors()]
        raise EarlError(f"--config {'; '.join(problems)}") from error
