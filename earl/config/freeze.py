"""What a run keeps of its configuration: ``<run>/config.json``, and the digest that its files carry.

Fields that do not determine results (how long, where, what to log) may change from call to call. A changed field that
does determine them would mix two experiments under one name, so it stops with what differs.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from earl.config.load import leaves, read
from earl.config.schema import Config, Evaluation, is_free
from earl.errors import EarlError
from earl.files import atomic

Change = tuple[str, Any, Any]
"""A field's dotted name, its frozen value and its value now; `ABSENT` where there is none."""
ABSENT = "(absent)"
_WIDEST = 48


def determining(config: Config) -> dict[str, Any]:
    """Return the fields that determine a run's rollouts, scores and policies."""
    values = config.model_dump(mode="json")
    return {name: value for name, value in values.items() if not is_free(name)}


def config_digest(config: Config) -> str:
    """Return the SHA-256, in hexadecimal, of the canonical JSON of the fields that determine results."""
    return hashlib.sha256(_canonical(determining(config)).encode()).hexdigest()


def frozen_text(config: Config) -> str:
    """Return the text of ``config.json``: every field, sorted by name."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def changes(frozen: Config, config: Config) -> list[Change]:
    """Return what differs between a run's frozen configuration and another, in fields that determine results.

    Evaluations may come and go and be made at other iterations; one that stays keeps its prompts and sampling, since
    its results stand beside older ones.
    """
    common = frozen.evaluations.keys() & config.evaluations.keys()
    old, new = (dict(leaves(_compared(one, common))) for one in (frozen, config))
    return [
        (field, old.get(field, ABSENT), new.get(field, ABSENT))
        for field in sorted(old.keys() | new.keys())
        if old.get(field, ABSENT) != new.get(field, ABSENT)
    ]


def check(config: Config, path: Path | str) -> None:
    """Compare with the ``config.json`` of a run; a run without one accepts any configuration.

    Raises:
        EarlError: with the differing fields, old and new, and what to do about them.
    """
    if not Path(path).is_file():
        return
    found = changes(read(path), config)
    if found:
        raise EarlError(
            f"{path}: the run {config.run_name!r} was made with another configuration\n{_table(found)}\n"
            "Give the new experiment a name of its own (--set run_name=...), go back to the old values, "
            "or go on under this name with --accept-changes."
        )


def write(config: Config, path: Path | str, accept_changes: bool = False) -> bool:
    """Write ``config.json``, after `check` unless changes are accepted; return whether the file changed.

    A file that already says the same is left alone, so that nothing that depends on it looks out of date.

    Raises:
        EarlError: as `check`, or when the file cannot be written.
    """
    path = Path(path)
    if not accept_changes:
        check(config, path)
    text = frozen_text(config)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    atomic.write_text(path, text)
    return True


def _compared(config: Config, evaluations_kept: Set[str]) -> dict[str, Any]:
    sampling = {name for name in Evaluation.model_fields if not is_free(name, Evaluation)}
    evaluations = {name: config.evaluations[name].model_dump(include=sampling) for name in evaluations_kept}
    return determining(config) | {"evaluations": evaluations}


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _table(found: list[Change]) -> str:
    rows = [("field", "was", "is now")] + [(name, _cell(old), _cell(new)) for name, old, new in found]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows)


def _cell(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST // 2]}...{text[-_WIDEST // 2 :]}"
