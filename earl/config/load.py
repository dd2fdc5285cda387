"""From a file to a `Config`: Jsonnet with overrides, or a run's frozen JSON. Mistakes are named with their remedy."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from earl.config.fields import NAME
from earl.config.jsonnet_values import Evaluated, evaluate, shown
from earl.config.schema import Config
from earl.messages import names
from earl.messages.errors import EarlError

DEFAULT = "default"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How options are spelt where the user is, for messages."""

    set: str
    """What gives an override: it is followed by ``field=value``."""
    accept_changes: str

    @property
    def override(self) -> str:
        """Where the value of an overridden field came from."""
        return self.set.strip()


COMMAND_LINE = Options("--set ", "--accept-changes")
WORKFLOW = Options("set=", "accept_changes=true")


@dataclass(frozen=True)
class Loaded:
    """A resolved experiment."""

    config: Config
    evaluated: Evaluated
    options: Options = COMMAND_LINE

    @cached_property
    def origins(self) -> dict[str, str]:
        """Where the value of each field, by dotted name, came from.

        A file, with the variables that the value depends on in parentheses; ``--set``; or ``default``.
        """
        return {name: self.origin(name) for name, _ in leaves(self.config.model_dump(mode="json"))}

    def origin(self, name: str) -> str:
        """Return one of `origins`, of a field or section by its dotted name."""
        if not _holds(self.evaluated.value, name):
            return DEFAULT
        if any(name == other or name.startswith(f"{other}.") for other in self.evaluated.overrides):
            return self.options.override
        return self.evaluated.written_in[name.split(".")[0]]


def load(path: Path | str, overrides: Mapping[str, Any] | None = None, options: Options = COMMAND_LINE) -> Loaded:
    """Resolve a Jsonnet file.

    Args:
        path: The experiment, for example ``config/demo.jsonnet``.
        overrides: Values by dotted name (``sft.steps``) that take the place of the file's.
        options: How messages spell them.

    Raises:
        EarlError: naming file and field, when the file does not evaluate, a field is unknown, missing, ill-typed or
            out of range, or fields contradict each other.
    """
    evaluated = evaluate(Path(path), dict(overrides or {}))
    if str(evaluated.value.get("run_name", "")).lower() == "none":
        # As in the reference, where null and its text name a run after its file.
        evaluated.value["run_name"] = Path(path).stem

    def source(field: str) -> str:
        if any(field == name or field.startswith(f"{name}.") for name in evaluated.overrides):
            return options.override
        return evaluated.written_in.get(field.split(".")[0], shown(path))

    return Loaded(_validated(evaluated.value, shown(path), source), evaluated, options)


REMOVED = ("window_length", "workers", "worker_idle_seconds")
"""Fields that earlier versions wrote to ``config.json``. None of them determined results."""
_AGAIN = "remove it, and start the run again with its experiment, which writes it"


def read(path: Path | str) -> Config:
    """Read a run's frozen ``config.json``. Fields that only an earlier version had are dropped.

    Raises:
        EarlError: naming file and field, as `load` does.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EarlError(
            f"{path}: does not exist; check the path of the run, or write the file by `earl config freeze`"
        ) from error
    except OSError as error:
        raise EarlError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise EarlError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise EarlError(f"{path}: is no object of fields; {_AGAIN}")
    if removed := [name for name in REMOVED if name in value]:
        log.info("%s: ignored, from an earlier version: %s", path, ", ".join(removed))
        value = {name: item for name, item in value.items() if name not in removed}
    return _validated(value, str(path), lambda name: str(path))


def validate(values: Mapping[str, Any], where: str) -> Config:
    """Return the configuration of these fields; errors name ``where`` they come from, and are those of `load`."""
    return _validated(dict(values), where, lambda name: where)


def changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a configuration with values by dotted name in the place of its own; `EarlError` as `load`."""
    values = config.model_dump(mode="json")
    for name, value in overrides.items():
        *sections, field = name.split(".")
        place = values
        for section in sections:
            # A section may be null. What is none, or unknown, fails below by its name.
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[field] = value
    override = COMMAND_LINE.override
    return _validated(values, override, lambda name: override)


def parse_overrides(items: Iterable[str] | str, options: Options = COMMAND_LINE) -> dict[str, Any]:
    """Return values by dotted name from ``name=value`` texts, or one text of several with commas between.

    A value is read as JSON, or taken as text where it is none or the field holds text.

    Raises:
        EarlError: for a text without ``=``, or a number that is not finite.
    """
    if isinstance(items, str):
        items = re.split(r",(?=\s*[A-Za-z_][\w.-]*=)", items)
    overrides: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.strip().partition("=")
        if not item.strip():
            continue
        if not equals or not name:
            raise EarlError(f"{options.set}{item}: is not of the form field=value")
        try:
            overrides[name.strip()] = _override(name.strip(), text)
        except ValueError as error:
            raise EarlError(f"{options.set}{item}: holds a number that is not finite; give a finite one") from error
    return overrides


def show(loaded: Loaded) -> str:
    """Return the resolved experiment as Jsonnet, each value followed by a comment that says where it came from."""
    rows = list(_rows(loaded.config.model_dump(mode="json"), loaded.origins, "", 1))
    width = min(72, max(len(text) for text, origin in rows if origin))
    lines = [f"{text:<{width}}  // {origin}" if origin else text for text, origin in rows]
    return "\n".join(["{", *lines, "}"])


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values; a list, and an object without fields, is one value."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _rows(value: Mapping[str, Any], origins: Mapping[str, str], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    indent = "  " * depth
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{indent}{json.dumps(name)}: {{", ""
            yield from _rows(item, origins, f"{prefix}{name}.", depth + 1)
            yield f"{indent}}},", ""
        elif isinstance(item, list) and len(item) > 1:
            yield f"{indent}{json.dumps(name)}: [", origins[prefix + name]
            yield from ((f"{indent}  {json.dumps(entry)},", "") for entry in item)
            yield f"{indent}],", ""
        else:
            yield f"{indent}{json.dumps(name)}: {json.dumps(item)},", origins[prefix + name]


def _holds(value: Any, name: str) -> bool:
    # Names inside an object may hold dots themselves, so both ways to split are tried.
    if not isinstance(value, dict):
        return False
    return name in value or any(_holds(value[k], name.removeprefix(f"{k}.")) for k in value if name.startswith(f"{k}."))


def _override(name: str, text: str) -> Any:
    field = Config.model_fields.get(name)
    try:
        value = json.loads(text)
    except ValueError:
        return text
    json.dumps(value, allow_nan=False)
    takes_text = field is not None and (field.annotation is str or str in get_args(field.annotation))
    # run_name=7 is a name, though 7 alone reads as a number; null and quoted text keep their meaning.
    return text if takes_text and isinstance(value, int | float) else value


def _validated(value: dict[str, Any], path: str, source: Callable[[str], str]) -> Config:
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        # A default that waits for another field fails with it; that says nothing new.
        problems = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
        lines = [_problem(problem, path, source) for problem in problems]
        if len(lines) == 1:
            raise EarlError(f"{path}: {lines[0]}") from error
        raise EarlError(
            f"{path}: {len(lines)} fields are wrong\n" + "\n".join(f"  {line}" for line in lines)
        ) from error


def _problem(problem: Mapping[str, Any], path: str, source: Callable[[str], str]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "cross_field":
        location.append(problem["ctx"]["field"])
    field = ".".join(location)
    origin = source(field)
    place = f"field {field}" + (f" (in {origin})" if origin != path else "")
    match problem["type"]:
        case "extra_forbidden":
            return f"{place} is unknown; {_hint(location)}"
        case "missing":
            given = names.near(location[-1], problem["input"])
            near = f"; the nearest name given is {given}" if given else ""
            return f"{place} is missing{near}. It is: {_description(location)}"
        case "cross_field" | "inexact":
            return f"{place} {problem['msg']}"
        case "string_pattern_mismatch" if problem["ctx"]["pattern"] == NAME:
            return (
                f"{place} is {json.dumps(problem['input'])}, which cannot be a folder's name; use letters, digits, "
                "`.`, `_` and `-`, and begin with a letter or a digit"
            )
    message = problem["msg"]
    if problem["type"] == "model_type":
        first = next(iter(_model_at([*location, ""]).model_fields))
        message = f"input should be an object of its fields, such as {{{first}: ...}}"
    found = json.dumps(problem["input"], default=str)
    return f"{place} is {found}: {message[0].lower()}{message[1:]}. It is: {_description(location)}"


def _model_at(location: list[str]) -> type[BaseModel]:
    """Return the model that holds the last name of a field's location."""
    model, parts = Config, iter(location[:-1])
    for part in parts:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = _model_in(annotation)
        if inner is None:
            break
        model = inner
        if get_origin(annotation) is dict:
            next(parts, None)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def _hint(location: list[str]) -> str:
    model = _model_at(location)
    where = f"{model.__module__.replace('.', '/')}.py lists all fields"
    return names.hint(location[-1], model.model_fields, where)


def _description(location: list[str]) -> str:
    for end in range(len(location), 0, -1):
        fields = _model_at(location[:end]).model_fields
        if location[end - 1] in fields:
            return fields[location[end - 1]].description or ""
    return ""
