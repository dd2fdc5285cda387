"""Jsonnet files, evaluated: the plain value, and where each of its fields was written.

Jsonnet itself forgets which file a field came from. So a second evaluation wraps every file: it adds to each object a
hidden field that maps the names written in that file to the file. Jsonnet's own ``+`` then merges these maps by the
same rule as it merges the fields.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from earl.messages.errors import EarlError

PREFIX = "APP__"
"""Environment variables that begin with this are Jsonnet's external variables."""
RUN_NAME = "APP__RUN_NAME"
"""The one of them that need not be set: an experiment is named after its file then."""
_MARKS = "__written_in__"
_BARE = "bare!"


class _MissingVariable(EarlError):
    """An environment variable that a file asks for is not set."""

    def __init__(self, where: str, name: str) -> None:
        super().__init__(f"{where}: the environment variable {name} is not set; export {name}=... and try again")
        self.name = name


@dataclass
class Files:
    """The files of one evaluation, by path as Jsonnet names them."""

    texts: dict[str, str] = field(default_factory=dict)

    def read(self, folder: str, name: str) -> tuple[str, bytes]:
        """Jsonnet's import callback: the file as it is."""
        path = os.path.normpath(os.path.join(folder, name))
        try:
            self.texts[path] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EarlError(f"{shown(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        return path, self.texts[path].encode()

    def marked(self, folder: str, name: str) -> tuple[str, bytes]:
        """Jsonnet's import callback: the file wrapped with marks, and for its own names the file without imports."""
        if name.startswith(_BARE):
            path = name.removeprefix(_BARE)
            return os.path.join(_BARE + os.path.dirname(path), os.path.basename(path)), self.texts[path].encode()
        if folder.startswith(_BARE):
            return _BARE + "nothing", b"{}"
        path, text = self.read(folder, name)
        wrapped = (
            f"local whole = ({text.decode()}\n); local own = import {json.dumps(_BARE + path)};\n"
            f"if std.isObject(whole) then whole + {{ {_MARKS}+:: "
            f"{{ [name]: {json.dumps(shown(path))} for name in std.objectFields(own) }} }} else whole"
        )
        return path, wrapped.encode()


@dataclass(frozen=True)
class Evaluated:
    """The value of an experiment's file, and on demand where its fields were written."""

    path: Path
    overrides: Mapping[str, Any]
    variables: Mapping[str, str]
    files: Files
    value: dict[str, Any]

    @cached_property
    def written_in(self) -> dict[str, str]:
        """File that each top-level field was written in, with the variables that its value depends on.

        Evaluates the file again, and once for each variable that it may use: seldom needed, so not done before.
        """
        marks = _marks(self.path, self.files, self.variables)
        origins = {name: marks.get(name, shown(self.path)) for name in self.value}
        for variable in self.variables:
            if any(variable in text for text in self.files.texts.values()):
                for name in self._depend_on(variable):
                    origins[name] += f" ({variable})"
        return origins

    def _depend_on(self, variable: str) -> list[str]:
        """Return the top-level fields that change when a variable does."""
        # A digit more keeps a number a number.
        changed = dict(self.variables) | {variable: self.variables[variable] + "1"}
        try:
            other = _run(self.path, self.overrides, Files(), changed)
        except EarlError:
            return []
        return [name for name, value in self.value.items() if other.get(name) != value]


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the external variables."""
    return {name: value for name, value in environment.items() if name.startswith(PREFIX)}


def evaluate(path: Path, overrides: Mapping[str, Any]) -> Evaluated:
    """Return the value of a Jsonnet file.

    Args:
        path: A Jsonnet file whose value is an object.
        overrides: Values by dotted name. They are added in Jsonnet, so that fields which refer to them follow.

    Raises:
        EarlError: naming the file, when it is missing, no Jsonnet, no object, or asks for variables that are not set,
            which are all named.
    """
    files = Files()
    given = {RUN_NAME: path.stem} | variables()
    try:
        value = _run(path, overrides, files, given)
    except _MissingVariable as error:
        missing = _missing(path, overrides, given, error)
        raise EarlError("\n".join(map(str, missing))) from error
    if not isinstance(value, dict):
        raise EarlError(f"{path}: is a {type(value).__name__}, not an object of fields")
    return Evaluated(path, overrides, given, files, value)


def _missing(
    path: Path, overrides: Mapping[str, Any], given: Mapping[str, str], first: _MissingVariable
) -> list[_MissingVariable]:
    """Return all variables that are not set, as errors: one after the other gets a value until none is missed.

    The value stands for a text and for a number; where it is neither that is wanted, the search ends early.
    """
    found = [first]
    while True:
        try:
            _run(path, overrides, Files(), given | {error.name: "1" for error in found})
        except _MissingVariable as error:
            found.append(error)
        except EarlError:
            return found
        else:
            return found


def shown(path: Path | str) -> str:
    """Return a path as people read it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _run(path: Path, overrides: Mapping[str, Any], files: Files, given: Mapping[str, str]) -> Any:
    code = f"(import {json.dumps(str(path.absolute()))})"
    code += "".join(f" + {_nested(name.split('.'), value)}" for name, value in overrides.items())
    return _jsonnet(path, code, files.read, given)


def _nested(names: list[str], value: Any) -> str:
    first, *rest = names
    if not rest:
        return f"{{ {json.dumps(first)}: {json.dumps(value)} }}"
    return f"{{ {json.dumps(first)}+: {_nested(rest, value)} }}"


def _marks(path: Path, files: Files, given: Mapping[str, str]) -> dict[str, str]:
    code = f"(import {json.dumps(str(path.absolute()))}).{_MARKS}"
    try:
        return _jsonnet(path, code, files.marked, given)
    except EarlError:
        # A file that calls functions of its imports has no names of its own to tell; the value itself is sound.
        return {}


def _jsonnet(path: Path, code: str, callback: Any, given: Mapping[str, str]) -> Any:
    import _jsonnet

    failures: list[EarlError] = []

    def importing(folder: str, name: str) -> tuple[str, bytes]:
        # Jsonnet turns an exception of the callback into text; this keeps it.
        try:
            return callback(folder, name)
        except EarlError as error:
            failures.append(error)
            raise

    try:
        return json.loads(_jsonnet.evaluate_snippet("overrides", code, import_callback=importing, ext_vars=dict(given)))
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        raise _explained(path, str(error)) from error


def _explained(path: Path, message: str) -> EarlError:
    first, *trace = message.strip().splitlines()
    place = re.match(r"\s*(/.*?):(\d+)", trace[0]) if trace else None
    where = f"{shown(place[1])}:{place[2]}" if place else shown(path)
    variable = re.search(r"undefined external variable: (\S+)", first)
    if variable is None and first.endswith("ERROR: overflow"):
        return EarlError(f"{where}: a number is not finite; give one below 1.8e308 (while resolving {shown(path)})")
    if variable is None:
        text = re.sub(r"^(RUNTIME|STATIC) ERROR: ", "", first).replace(f"{Path.cwd()}/", "")
        return EarlError(f"{where}: {text} (while resolving {shown(path)})")
    name = variable[1]
    if not name.startswith(PREFIX):
        return EarlError(f"{where}: asks for the variable {name}; only names that begin with {PREFIX} are passed on")
    return _MissingVariable(where, name)
