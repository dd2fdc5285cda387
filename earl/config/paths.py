"""Stages that come before a run and are shared by runs: where their results lie, and what they depend on.

::

    <base_exp_dir>/shared/raw/<dataset>-<key>.parquet      pairs of the shapes world
    <base_exp_dir>/shared/tokenised/<dataset>-<key>/       `stage:tokenise/<dataset>`
    <base_exp_dir>/shared/policy/shapes-<key>/             `stage:shapes-policy`
    <base_exp_dir>/shared/sft/<name>-<key>/                `stage:sft/<name>`

A key is twelve hexadecimal digits over exactly the fields that the stage's result depends on, those of the stages
before it included. So runs that agree in these fields use the same folder, and runs that do not never meet.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from earl.config.references import PACKAGE, STAGE
from earl.config.schema import Config, Sft
from earl.errors import EarlError
from earl.files import listing

Stage = Literal["raw", "tokenise", "policy", "sft"]

SHAPES_POLICY_SEED = 42
"""Seed of the weights of `stage:shapes-policy`, the ones that the shipped base policy was trained from."""
SFT_USES = ("dtype", "cpu_threads", "per_device_batch_size", "packing", "model_context_size")
"""Fields of the run that a fine-tuning depends on beside its own."""


@dataclass(frozen=True)
class SharedStage:
    """One stage that runs share."""

    stage: Stage
    name: str
    """Name in ``raw_datasets`` for `raw` and `tokenise`, in ``sft`` for `sft`; ``shapes`` for `policy`."""
    output: Path
    """A file for `raw`, a sealed folder for the others."""
    inputs: tuple[Path, ...]
    """Files and folders that it reads, outputs of other shared stages among them; hub names are left out."""


def resolve(config: Config, reference: str) -> Path:
    """Return the path that a path field means: an output of a shared stage, a file of the package, or itself.

    Raises:
        EarlError: for a reference to nothing.
    """
    if reference.startswith(PACKAGE):
        return Path(__file__).parent.parent / reference.removeprefix(PACKAGE)
    if not reference.startswith(STAGE):
        return Path(reference)
    stage, _, name = reference.removeprefix(STAGE).partition("/")
    match stage:
        case "tokenise":
            return tokenised_folder(config, name)
        case "shapes-policy":
            return shapes_policy_folder(config)
        case "sft":
            return sft_folder(config, name)
    raise EarlError(
        f"{reference}: is no stage; there are stage:tokenise/<raw dataset>, stage:sft/<name>, stage:shapes-policy"
    )


def raw_file(config: Config, name: str) -> Path:
    """Return the raw Parquet file of an entry of ``raw_datasets``: generated, or the user's own.

    The user's may be a folder or a pattern, too (`earl.files.listing`).
    """
    raw = _raw(config, name)
    if raw.path is not None:
        return Path(raw.path)
    return _shared(config, "raw") / f"{name}-{_digest(_raw_key(config, name))}.parquet"


def tokenised_folder(config: Config, name: str) -> Path:
    """Return the folder of an entry of ``raw_datasets`` once it is tokenised."""
    return _shared(config, "tokenised") / f"{name}-{_digest(_tokenised_key(config, name))}"


def shapes_policy_folder(config: Config) -> Path:
    """Return the folder of the shapes world's policy with random weights."""
    return _shared(config, "policy") / f"shapes-{_digest(_shapes_policy_key())}"


def sft_folder(config: Config, name: str) -> Path:
    """Return the folder of the policy that an entry of ``sft`` makes."""
    return _shared(config, "sft") / f"{name}-{_digest(_sft_key(config, name))}"


def shared_stages(config: Config) -> dict[Path, SharedStage]:
    """Return the shared stages that a run needs, by output, each after those that it reads from."""
    found: dict[Path, SharedStage] = {}
    for reference in (*prompt_paths(config), config.model_path, config.tokenizer_path):
        _collect(config, reference, found)
    return found


def prompt_paths(config: Config) -> list[str]:
    """Return the data sets that a run draws prompts from, each once: those of training, then those of evaluations."""
    held_out = [path for name in config.evaluations for path in evaluation_paths(config, name)]
    return list(dict.fromkeys([*config.train_paths_file, *held_out]))


def evaluation_paths(config: Config, name: str) -> list[str]:
    """Return the data sets that an evaluation draws its prompts from."""
    return config.evaluations[name].paths_file or config.val_paths_file


def _collect(config: Config, reference: str, found: dict[Path, SharedStage]) -> None:
    if not reference.startswith(STAGE) or resolve(config, reference) in found:
        return
    stage = _stage_of(config, reference)
    if stage.stage == "tokenise" and config.raw_datasets[stage.name].source == "shapes":
        raw = raw_file(config, stage.name)
        found[raw] = SharedStage("raw", stage.name, raw, ())
    if stage.stage == "sft":
        for needed in _read_by_sft(config, stage.name):
            _collect(config, needed, found)
    found[stage.output] = stage


def _stage_of(config: Config, reference: str) -> SharedStage:
    output = resolve(config, reference)
    stage, _, name = reference.removeprefix(STAGE).partition("/")
    if stage == "tokenise":
        return SharedStage("tokenise", name, output, tuple(listing.parquet_files(raw_file(config, name))))
    if stage == "shapes-policy":
        return SharedStage("policy", "shapes", output, ())
    needed = _read_by_sft(config, name)
    return SharedStage("sft", name, output, tuple(path for one in needed if (path := _on_disk(config, one))))


def _read_by_sft(config: Config, name: str) -> list[str]:
    tuning = fine_tuning(config, name)
    return [*tuning.train_paths_file, tuning.base_model]


def _on_disk(config: Config, reference: str) -> Path | None:
    """Return the path of a reference that can be a file, None for what may only be a name on the hub."""
    path = resolve(config, reference)
    return path if reference.startswith((STAGE, PACKAGE)) or path.is_absolute() or path.exists() else None


def _raw(config: Config, name: str) -> Any:
    if name not in config.raw_datasets:
        raise EarlError(f"raw_datasets has no entry {name!r}; it has {', '.join(config.raw_datasets) or 'none'}")
    return config.raw_datasets[name]


def fine_tuning(config: Config, name: str) -> Sft:
    """Return the entry of ``sft`` with this name; EarlError where there is none."""
    if name not in config.sft:
        raise EarlError(f"sft has no entry {name!r}; it has {', '.join(config.sft) or 'none'}")
    return config.sft[name]


def _shared(config: Config, kind: str) -> Path:
    return Path(config.base_exp_dir) / "shared" / kind


def _raw_key(config: Config, name: str) -> Any:
    # How many rows may be rejected does not change those that are kept.
    return _raw(config, name).model_dump(mode="json", exclude={"max_rejected_fraction"})


def _tokenised_key(config: Config, name: str) -> Any:
    # The name stands in every row.
    return {
        "name": name,
        "raw": _raw_key(config, name),
        "vision_tokenizer_path": config.vision_tokenizer_path,
        "image_area": config.image_area,
        "cpu_threads": config.cpu_threads,
    }


def _shapes_policy_key() -> Any:
    return {"seed": SHAPES_POLICY_SEED}


def _sft_key(config: Config, name: str) -> Any:
    tuning = fine_tuning(config, name)
    settings = tuning.model_dump(mode="json")
    settings["train_paths_file"] = [_key(config, path) for path in tuning.train_paths_file]
    settings["base_model"] = _key(config, tuning.base_model)
    return {"sft": settings} | {name: getattr(config, name) for name in SFT_USES}


def _key(config: Config, reference: str) -> Any:
    """Return what identifies the content behind a path field."""
    if reference.startswith(f"{STAGE}tokenise/"):
        return _tokenised_key(config, reference.removeprefix(f"{STAGE}tokenise/"))
    if reference.startswith(f"{STAGE}sft/"):
        return _sft_key(config, reference.removeprefix(f"{STAGE}sft/"))
    if reference == f"{STAGE}shapes-policy":
        return _shapes_policy_key()
    return reference


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
