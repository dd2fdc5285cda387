"""What fields of the configuration are made of: types of values, and whether a field determines results."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from earl.config import checks

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
"""A name that becomes part of a file's path: letters, digits, dot, underscore, hyphen."""

Integer = Annotated[int, BeforeValidator(checks.check_exact)]
"""A whole number that Jsonnet keeps as it was written."""
Positive = Annotated[Integer, Field(ge=1)]
Coefficient = Annotated[float, Field(gt=0)]
Path = Annotated[str, Field(min_length=1), AfterValidator(checks.check_path)]


def fixed(default: Any, description: str, **limits: Any) -> Any:
    """A field that determines results."""
    return _field(default, description, False, limits)


def free(default: Any, description: str, **limits: Any) -> Any:
    """A field that may change under the same run name."""
    return _field(default, description, True, limits)


def _field(default: Any, description: str, free: bool, limits: dict[str, Any]) -> Any:
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=description, json_schema_extra={"free": free}, **kind, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
