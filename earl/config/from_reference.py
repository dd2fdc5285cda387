"""A configuration of the reference (mair-lab/EARL), read field by field and written as ours.

Both are Jsonnet with variables ``APP__*``, and most fields have the same name and meaning. Here are the rest: defaults
that differ, settings that the reference has in its code, and names without a meaning. Variables stay variables, so
that none has to be set to import a file.

The facts were read off the reference's class of arguments (``rl/nano_aha_moment.py``) and the code that uses them, at
commits fa7eb98 (June 2025) and 4ca85f1 (November 2025).
"""

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from earl.config.jsonnet_values import PREFIX, RUN_NAME, shown
from earl.messages.errors import EarlError

REQUIRED = (
    "train_paths_file",
    "val_paths_file",
    "base_exp_dir",
    "model_path",
    "tokenizer_path",
    "assistant_prefill",
    "learning_rate",
    "num_iterations",
    "kl_coeff",
    "temperature",
    "per_device_batch_size",
    "episodes_per_iteration",
    "generations_per_sample",
    "max_response_tokens",
    "top_p",
    "top_k",
    "model_context_size",
    "vllm_gpu_memory_utilization",
)
"""Fields that the reference has no default for."""
DEFAULTS: dict[str, Any] = {
    "random_seed": 42,
    "coefficients": [],
    "val_coefficients": [],
    "model_revision": None,
    "max_prompt_len": None,
    "max_completion_len": None,
    "emu3_use_logit_processor": True,
    "separate_language_and_vision_vocabs": True,
    "train_text_tokens_only": False,
    "text_only_cycle_steps": 10,
    "text_only_steps": 10,
    "train_vision_tokens_only": False,
    "vision_only_cycle_steps": 10,
    "vision_only_steps": 10,
    "reward_function_api_base": None,
    "reward_function_api_model_name": "Qwen/Qwen2.5-VL-72B-Instruct",
    "reward_compute_viescore": True,
    "reward_compute_ground_score": True,
    "reward_final_reward": "viescore",
    "log_episodes_every_n_iterations": 20,
    "run_name": None,
    "keep_checkpoints_every_n_iterations": None,
    "save_checkpoints_every_n_iterations": None,
    "push_to_hub_every_n_iterations": None,
    "push_to_hub_repo_id": None,
}
"""The other fields of the reference, with its defaults."""
IN_CODE: dict[str, tuple[Any, str]] = {
    "engine": ("vllm", "the reference's only engine"),
    "dtype": ("bfloat16", "the type it computes in"),
    "vision_tokenizer_path": ("BAAI/Emu3-VisionTokenizer", "named in its code"),
    "judge": ("openai", "its only judge"),
    "judge_temperature": (0.0, "it names none, so its server takes the model's own, which is greedy"),
    "judge_image_size": (None, "it shows pictures as they are decoded"),
    "judge_timeout_seconds": (1000.0, "what it gives a question"),
    "judge_startup_seconds": (7200.0, "how long it waits for a server"),
    "wandb_mode": ("offline", "it always reports to W&B; `online` does so while the run goes on"),
    "push_to_hub": (False, "it pushes whenever a repository is named; set to true to do so"),
    "evaluations": ({}, "it evaluates nothing while it trains, though it names validation data"),
}
"""What the reference has in its code, as fields of ours, and why."""
API_BASE, API_VARIABLE = "reward_function_api_base", f"{PREFIX}REWARD_FUNCTION_API_BASE"
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters around a variable's name, in the place of its value."""
_VARIABLE = re.compile(f"{_OPEN}(.*?){_CLOSE}")


@dataclass(frozen=True)
class Line:
    """What becomes of one field.

    Attributes:
        field: its name in the reference's file; for a setting of its code, ours.
        fate: ``taken`` as it is, ``changed`` in name or value, ``added``, ``left out``.
        name: the field's name in our file, None where it is left out.
        value: its value there; variables stand as marks.
        why: a few words, empty for what is simply taken.
    """

    field: str
    fate: Literal["taken", "changed", "added", "left out"]
    name: str | None
    value: Any
    why: str = ""

    def text(self) -> str:
        """Return the line as it is printed."""
        left = self.field if self.name in (None, self.field) else f"{self.field} -> {self.name}"
        value = "" if self.name is None else f" = {_jsonnet_text(self.value)}"
        return f"{self.fate:<9} {left}{value}{f'  ({self.why})' if self.why else ''}"


def read(path: Path) -> list[Line]:
    """Return what becomes of each field of a configuration of the reference.

    Args:
        path: A ``.jsonnet`` or ``.json`` file of the reference's.

    Raises:
        EarlError: the file does not evaluate, is no object of fields, or lacks one that the reference needs.
    """
    given = _evaluate(path)
    lines = [_line(name, value, given.keys()) for name, value in given.items()]
    found = {line.name: line.value for line in lines if line.name is not None}
    missing = [name for name in REQUIRED if found.get(name) is None]
    if missing:
        raise EarlError(
            f"{shown(path)}: lacks {', '.join(missing)}, which the reference needs; "
            "import one of its experiments (sft_X__rl_Y.jsonnet), not a part of one"
        )
    defaults = [_line(name, default, DEFAULTS) for name, default in DEFAULTS.items() if name not in found]
    lines += [
        replace(line, fate="added", why=line.why or "the reference's default")
        for line in defaults
        if line.fate == "changed" or _differs_from_ours(line.field)
    ]
    return lines + [Line(name, "added", name, setting, why) for name, (setting, why) in IN_CODE.items()]


def jsonnet(lines: list[Line], source: str) -> str:
    """Return our configuration as Jsonnet, in the order of our fields.

    Args:
        lines: from `read`.
        source: Name of the file that it was read from, for the first line.
    """
    from earl.config.schema import Config

    order = list(Config.model_fields)
    kept = sorted((line for line in lines if line.name is not None), key=lambda line: order.index(line.name))
    rows = [f"  {line.name}: {_jsonnet_text(line.value)},{f'  // {line.why}' if line.why else ''}" for line in kept]
    return "\n".join([f"// Imported from the reference's {source}.", "{", *rows, "}", ""])


def values(lines: list[Line]) -> dict[str, Any]:
    """Return our fields, a variable's name in the place of its value: what can be checked without any of them."""
    return {line.name: _plain(line.value) for line in lines if line.name is not None}


def _line(name: str, found: Any, given: Collection[str]) -> Line:
    """Return what becomes of a field; ``given`` are the names of all in the file."""
    if name not in (*REQUIRED, *DEFAULTS):
        free = sorted({*REQUIRED, *DEFAULTS} - set(given))
        near = difflib.get_close_matches(name, free, n=1, cutoff=0.75)
        if near:
            return Line(name, "changed", near[0], found, f"the reference has no field {name}; this one is meant")
        return Line(name, "left out", None, None, "the reference has no such field")
    if name == API_BASE and str(found).lower() == "none":
        why = "the reference looks the address up on a page of its authors; here it has to be given"
        return Line(name, "changed", name, _mark(API_VARIABLE), why)
    if name == "run_name" and str(found).lower() == "none":
        return Line(name, "changed", name, _mark(RUN_NAME), "named after the file where the variable is not set")
    return Line(name, "taken", name, found)


def _differs_from_ours(name: str) -> bool:
    from earl.config.schema import Config

    field = Config.model_fields[name]
    return field.default_factory is not None or field.default != DEFAULTS[name]


def _evaluate(path: Path) -> dict[str, Any]:
    """Evaluate with a mark in the place of each variable, found one by one as Jsonnet asks for them."""
    import _jsonnet

    variables: dict[str, str] = {}
    while True:
        try:
            found = json.loads(_jsonnet.evaluate_file(str(path), ext_vars=variables))
            break
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            asked = re.search(r"undefined external variable: (\S+)", first)
            if asked is None or asked[1] in variables:
                raise EarlError(f"{shown(path)}: does not evaluate: {first}") from error
            variables[asked[1]] = _mark(asked[1])
    if not isinstance(found, dict):
        raise EarlError(f"{shown(path)}: is a {type(found).__name__}, not an object of fields")
    return found


def _mark(variable: str) -> str:
    """Return what stands for a variable; one of another prefix gets ours, since no other is passed on."""
    name = variable if variable.startswith(PREFIX) else PREFIX + variable.removeprefix("APP_")
    return f"{_OPEN}{name}{_CLOSE}"


def _plain(item: Any) -> Any:
    if isinstance(item, list):
        return [_plain(one) for one in item]
    return _VARIABLE.sub(r"\1", item) if isinstance(item, str) else item


def _jsonnet_text(item: Any) -> str:
    """Return a value as Jsonnet; a mark becomes ``std.extVar``."""
    if isinstance(item, list):
        return "[" + ", ".join(_jsonnet_text(one) for one in item) + "]"
    if not isinstance(item, str):
        return json.dumps(item)
    parts = _VARIABLE.split(item)
    # Odd parts are the variables' names.
    terms = [f"std.extVar('{part}')" if i % 2 else json.dumps(part) for i, part in enumerate(parts) if part or i % 2]
    return " + ".join(terms) or "''"
