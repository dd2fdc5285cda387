"""What a run keeps of its configuration: ``<run>/config.json``, and the digest that its files carry.

Fields that do not determine results (how long, where, what to log) may change from call to call. A changed field that
does determine them would mix two experiments under one name, so it stops with what differs. How to evaluate may change
too, but not under the name of an evaluation that has results: they would stand in one curve with others.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from earl.config.load import COMMAND_LINE, Options, leaves, read
from earl.config.schema import Config, is_free
from earl.files import atomic, objects
from earl.files.layout import Run
from earl.messages.errors import EarlError

Change = tuple[str, Any, Any]
"""A field's dotted name, its frozen value and its value now; `ABSENT` where there is none."""
ABSENT = "(absent)"
SAMPLING = ("prompts", "samples_per_prompt", "temperature", "top_p", "top_k", "assistant_prefill")
"""Fields of an evaluation that all results under its name have in common."""
PROMPTS_ASKED = "prompts_asked"
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


def sampling(config: Config, evaluation: str) -> dict[str, Any]:
    """Return how many prompts an evaluation draws and how it samples: `SAMPLING` by name."""
    found = {name: getattr(config.evaluations[evaluation], name) for name in SAMPLING}
    return found | {"assistant_prefill": config.prefill(evaluation)}


def recorded(config: Config, evaluation: str) -> dict[str, Any]:
    """Return `sampling` as the summary of an evaluation records it, beside the number of prompts that it found."""
    found = sampling(config, evaluation)
    return {PROMPTS_ASKED: found.pop("prompts"), **found}


def sampling_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return `sampling` of the results that a summary is of, as far as it records it."""
    asked = {"prompts": summary[PROMPTS_ASKED]} if PROMPTS_ASKED in summary else {}
    return asked | {name: summary[name] for name in SAMPLING[1:] if name in summary}


def changes(frozen: Config, config: Config) -> list[Change]:
    """Return what differs between a run's frozen configuration and another, in fields that determine results.

    Evaluations may come and go; one that stays keeps its data. `check_evaluations` looks at how it samples.
    """
    common = frozen.evaluations.keys() & config.evaluations.keys()
    old, new = (dict(leaves(_compared(one, common))) for one in (frozen, config))
    return [
        (field, old.get(field, ABSENT), new.get(field, ABSENT))
        for field in sorted(old.keys() | new.keys())
        if old.get(field, ABSENT) != new.get(field, ABSENT)
    ]


def check(config: Config, path: Path | str, options: Options = COMMAND_LINE) -> None:
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
            f"Give the new experiment a name of its own ({options.set}run_name=...), go back to the old values, "
            f"or go on under this name with {options.accept_changes}."
        )


def check_evaluations(config: Config, run: Run) -> None:
    """Refuse an evaluation whose results on disk were sampled otherwise, accepted changes or not.

    Raises:
        EarlError: with the differing fields, old and new, and what to do about them.
    """
    frozen = read(run.config) if run.config.is_file() else None
    found: list[Change] = []
    folders = []
    for name in config.evaluations:
        folder = run.evaluation(name, 0).summary.parent
        old = _sampled(frozen, folder, name) if folder.is_dir() and any(folder.iterdir()) else {}
        new = sampling(config, name)
        differing = [(f"evaluations.{name}.{key}", old[key], new[key]) for key in old if old[key] != new[key]]
        found += differing
        folders += [str(folder)] if differing else []
    if found:
        raise EarlError(
            f"{run.path}: evaluations that have results are to be made otherwise, which would mix the two in one "
            f"curve\n{_table(found)}\n"
            "Give the changed evaluation a name of its own (evaluations.<new name>), go back to the old values, or "
            f"remove {', '.join(folders)}: where a policy is still on disk, it is evaluated anew."
        )


def _sampled(frozen: Config | None, folder: Path, name: str) -> dict[str, Any]:
    """Return how the results in an evaluation's folder were sampled, as far as that is known."""
    if frozen is not None and name in frozen.evaluations:
        return sampling(frozen, name)
    # It was left out of the configuration for a while, and is back.
    summaries = sorted(folder.glob("*.json"))
    return sampling_of(objects.read(summaries[-1])) if summaries else {}


def write(config: Config, path: Path | str, accept_changes: bool = False) -> bool:
    """Write ``config.json``, after `check` unless changes are accepted; return whether the file changed.

    A file that already says the same is left alone, so that nothing that depends on it looks out of date.

    Raises:
        EarlError: as `check` and `check_evaluations`, or when the file cannot be written.
    """
    path = Path(path)
    if not accept_changes:
        check(config, path)
    check_evaluations(config, Run(path.parent))
    text = frozen_text(config)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    atomic.write_text(path, text)
    return True


def _compared(config: Config, evaluations_kept: Set[str]) -> dict[str, Any]:
    evaluations = {name: config.evaluations[name].model_dump(include={"paths_file"}) for name in evaluations_kept}
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
