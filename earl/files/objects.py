"""JSON files that hold one object, as stages write and read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earl.files import atomic
from earl.messages.errors import EarlError


def read(path: Path, remedy: str = "run the stage that writes it again") -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        EarlError: when it is missing, no JSON, or not an object; ``remedy`` ends the message.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarlError(f"{path}: is not readable JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise EarlError(f"{path}: holds no JSON object; {remedy}")
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically, its keys in order; numbers have to be finite."""
    atomic.write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
