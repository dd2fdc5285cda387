"""Stages that come before a run and are shared by runs: where their results lie, and what they depend on.

::

    <base_exp_dir>/shared/raw/<dataset>-<key>.parquet      pairs of the shapes world
    <base_exp_dir>/shared/download/<owner>--<name>-<key>/  `hf://datasets/<owner>/<name>/...`, files on the hub
    <base_exp_dir>/shared/fetched/<dataset>-<key>/         `stage:fetch/<dataset>`, published tokenised data
    <base_exp_dir>/shared/tokenised/<dataset>-<key>/       `stage:tokenise/<dataset>`
    <base_exp_dir>/shared/selected/<name>-<key>/           `stage:select/<name>`, completions of a run
    <base_exp_dir>/shared/policy/shapes-<key>/             `stage:shapes-policy`
    <base_exp_dir>/shared/convert/<owner>--<name>-<key>/   `<owner>/<name>`, a checkpoint on the hub
    <base_exp_dir>/shared/sft/<name>-<key>/                `stage:sft/<name>`

A key is twelve hexadecimal digits over exactly the fields that the stage's result depends on, those of the stages
before it included. So runs that agree in these fields use the same folder, and runs that do not never meet.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from earl.config.references import PACKAGE, STAGE
from earl.config.schema import Config
from earl.config.sections import Selection, Sft
from earl.data import catalogue
from earl.files import hub_names, listing
from earl.messages.errors import EarlError

Stage = Literal["raw", "download", "fetch", "tokenise", "select", "policy", "convert", "sft"]

SHAPES_POLICY_SEED = 42
"""Seed of the weights of `stage:shapes-policy`, the ones that the shipped base policy was trained from."""
SFT_USES = ("dtype", "cpu_threads", "per_device_batch_size", "packing", "model_context_size")
"""Fields of the run that a fine-tuning depends on beside its own."""
SFT_FREE = {"save_checkpoints_every_n_steps"}
"""Fields of a fine-tuning that change nothing of what it leaves behind."""


@dataclass(frozen=True)
class SharedStage:
    """One stage that runs share."""

    stage: Stage
    name: str
    """Name in ``raw_datasets`` for `raw` and `tokenise`, in ``sft`` for `sft`, in ``selections`` for `select`, on the
    hub for `convert` and `download`, in the catalogue for `fetch`; ``shapes`` for `policy`."""
    output: Path
    """A file for `raw`, a sealed folder for the others."""
    inputs: tuple[Path, ...]
    """Files and folders that it reads, outputs of other shared stages among them; names on the hub are left out, and
    the files of the run that `select` reads, which depend on how far it is."""
    conversion: hub_names.Conversion | None = None
    """Of `convert`: what is converted, and how."""


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
        case "fetch":
            return fetched_folder(config, name)
        case "select":
            return selected_folder(config, name)
        case "shapes-policy":
            return shapes_policy_folder(config)
        case "sft":
            return sft_folder(config, name)
    raise EarlError(
        f"{reference}: is no stage; there are stage:tokenise/<raw dataset>, stage:fetch/<published data set>, "
        "stage:select/<selection>, stage:sft/<name>, stage:shapes-policy"
    )


def policy_folder(config: Config, reference: str) -> Path:
    """Return the folder of a policy that a field names: as `resolve`, or what a name on the hub is converted to."""
    return converted_folder(config, reference, False) if hub_names.is_name(reference) else resolve(config, reference)


def vision_tokenizer_folder(config: Config) -> Path:
    """Return the folder of the vision tokenizer: as `resolve`, or what a name on the hub is converted to."""
    name = config.vision_tokenizer_path
    return converted_folder(config, name, True) if hub_names.is_name(name) else resolve(config, name)


def raw_file(config: Config, name: str) -> Path:
    """Return the raw Parquet file of an entry of ``raw_datasets``: generated, or the user's own.

    The user's may be a folder or a pattern, too (`earl.files.listing`); what is downloaded is a folder.
    """
    raw = _raw(config, name)
    if raw.path is not None:
        wanted = hub_names.data_files(raw.path)
        return downloaded_folder(config, wanted) if wanted else Path(raw.path)
    return _shared(config, "raw") / f"{name}-{_digest(_raw_key(config, name))}.parquet"


def downloaded_folder(config: Config, wanted: hub_names.DataFiles) -> Path:
    """Return the folder of files of a data set on the hub once they are downloaded."""
    return _shared(config, "download") / f"{hub_names.file_name(wanted.repository)}-{_digest(str(wanted))}"


def fetched_folder(config: Config, name: str) -> Path:
    """Return the folder of a published tokenised data set once it is fetched and converted."""
    return _shared(config, "fetched") / f"{name}-{_digest(_fetched_key(name))}"


def tokenised_folder(config: Config, name: str) -> Path:
    """Return the folder of an entry of ``raw_datasets`` once it is tokenised."""
    return _shared(config, "tokenised") / f"{name}-{_digest(_tokenised_key(config, name))}"


def selected_folder(config: Config, name: str) -> Path:
    """Return the folder of the completions that an entry of ``selections`` takes from a run."""
    return _shared(config, "selected") / f"{name}-{_digest(_selected_key(config, name))}"


def shapes_policy_folder(config: Config) -> Path:
    """Return the folder of the shapes world's policy with random weights."""
    return _shared(config, "policy") / f"shapes-{_digest(_shapes_policy_key())}"


def sft_folder(config: Config, name: str) -> Path:
    """Return the folder of the policy that an entry of ``sft`` makes."""
    return _shared(config, "sft") / f"{name}-{_digest(_sft_key(config, name))}"


def converted_folder(config: Config, name: str, vision: bool) -> Path:
    """Return the folder of a checkpoint on the hub once it is converted to a policy or a vision tokenizer."""
    key = _digest(_converted_key(config, name, vision))
    return _shared(config, "convert") / f"{hub_names.file_name(name)}-{key}"


def shared_stages(config: Config) -> dict[Path, SharedStage]:
    """Return the shared stages that a run needs, by output, each after those that it reads from."""
    found: dict[Path, SharedStage] = {}
    if hub_names.is_name(config.vision_tokenizer_path):
        _collect_converted(config, config.vision_tokenizer_path, True, found)
    for reference in (*prompt_paths(config), config.tokenizer_path):
        _collect(config, reference, found)
    _collect_policy(config, config.model_path, found)
    return found


@dataclass(frozen=True)
class Mixed:
    """Tokenised data sets that are drawn from, and the field that names them."""

    field: str
    references: list[str]
    coefficients: list[float]

    @contextmanager
    def named(self, where: str = "") -> Iterator[None]:
        """Have errors that the data are to blame for name the field, after ``where``."""
        try:
            yield
        except EarlError as error:
            raise EarlError(f"{where}field {self.field}: {error}") from error


def training_data(config: Config) -> Mixed:
    """Return what a run draws its prompts from."""
    return Mixed("train_paths_file", config.train_paths_file, config.coefficients)


def evaluation_data(config: Config, name: str) -> Mixed:
    """Return what an evaluation draws its prompts from."""
    own = config.evaluations[name].paths_file
    if own:
        return Mixed(f"evaluations.{name}.paths_file", own, [1.0] * len(own))
    return Mixed("val_paths_file", config.val_paths_file, config.val_coefficients)


def fine_tuning_data(config: Config, name: str) -> Mixed:
    """Return what a fine-tuning draws its examples from; EarlError where there is none of this name."""
    tuning = fine_tuning(config, name)
    return Mixed(f"sft.{name}.train_paths_file", tuning.train_paths_file, tuning.coefficients)


def validation_data(config: Config, name: str) -> Mixed | None:
    """Return what the fine-tuning of this name is validated on; None where it is not validated.

    Its examples are taken from all of them alike, so the coefficients say nothing.
    """
    validation = fine_tuning(config, name).validation
    if validation is None:
        return None
    own = validation.paths_file
    field = f"sft.{name}.validation.paths_file" if own else "val_paths_file"
    return Mixed(field, own or config.val_paths_file, [1.0] * len(own or config.val_paths_file))


def trained_on(config: Config) -> dict[str, list[str]]:
    """Return the evaluations whose data RL, or the fine-tuning that it starts from, trains on, with those data."""
    start = config.sft.get(config.model_path.removeprefix("stage:sft/"))
    trained = {*config.train_paths_file, *(start.train_paths_file if start else ())}
    found = {name: evaluation_data(config, name).references for name in config.evaluations}
    common = {name: [one for one in references if one in trained] for name, references in found.items()}
    return {name: references for name, references in common.items() if references}


def fine_tuning_inputs(config: Config, name: str) -> list[str]:
    """Return the data sets that a fine-tuning reads: those it is trained on, then those it is validated on."""
    validation = validation_data(config, name)
    return [*fine_tuning_data(config, name).references, *(validation.references if validation else ())]


def prompt_paths(config: Config) -> list[str]:
    """Return the data sets that a run draws prompts from, each once: those of training, then those of evaluations."""
    held_out = [path for name in config.evaluations for path in evaluation_data(config, name).references]
    return list(dict.fromkeys([*config.train_paths_file, *held_out]))


def _collect(config: Config, reference: str, found: dict[Path, SharedStage]) -> None:
    if not reference.startswith(STAGE) or resolve(config, reference) in found:
        return
    stage = _stage_of(config, reference)
    if stage.stage == "tokenise":
        raw, wanted = raw_file(config, stage.name), _on_hub(config, stage.name)
        if wanted:
            found[raw] = SharedStage("download", str(wanted), raw, ())
        elif config.raw_datasets[stage.name].source == "shapes":
            found[raw] = SharedStage("raw", stage.name, raw, ())
    if stage.stage == "sft":
        tuning = fine_tuning(config, stage.name)
        for needed in fine_tuning_inputs(config, stage.name):
            _collect(config, needed, found)
        _collect_policy(config, tuning.base_model, found)
    found[stage.output] = stage


def _collect_policy(config: Config, reference: str, found: dict[Path, SharedStage]) -> None:
    if hub_names.is_name(reference):
        _collect_converted(config, reference, False, found)
    else:
        _collect(config, reference, found)


def _collect_converted(config: Config, name: str, vision: bool, found: dict[Path, SharedStage]) -> None:
    tokenizer = _tokenizer_of(config, name, vision)
    inputs: tuple[Path, ...] = ()
    if tokenizer is not None and not hub_names.is_name(tokenizer):
        _collect(config, tokenizer, found)
        tokenizer, inputs = str(resolve(config, tokenizer)), (resolve(config, tokenizer),)
    revision = _revision_of(config, name, vision)
    output = converted_folder(config, name, vision)
    wanted = hub_names.Conversion(name, revision, tokenizer, vision)
    found[output] = SharedStage("convert", name, output, inputs, wanted)


def _tokenizer_of(config: Config, name: str, vision: bool) -> str | None:
    return None if vision or config.tokenizer_path == name else config.tokenizer_path


def _revision_of(config: Config, name: str, vision: bool) -> str | None:
    return config.model_revision if name == config.model_path and not vision else None


def _stage_of(config: Config, reference: str) -> SharedStage:
    output = resolve(config, reference)
    stage, _, name = reference.removeprefix(STAGE).partition("/")
    if stage == "tokenise":
        vision = [vision_tokenizer_folder(config)] if hub_names.is_name(config.vision_tokenizer_path) else []
        raw = raw_file(config, name)
        try:
            files = [raw] if _on_hub(config, name) else listing.parquet_files(raw)
        except EarlError:
            # Once the data set is tokenised they may be gone; `earl.run.preflight` looks for those still needed.
            files = [raw]
        return SharedStage("tokenise", name, output, (*files, *vision))
    if stage in ("fetch", "select"):
        return SharedStage(stage, name, output, ())
    if stage == "shapes-policy":
        return SharedStage("policy", "shapes", output, ())
    tuning = fine_tuning(config, name)
    data = [resolve(config, path) for path in fine_tuning_inputs(config, name)]
    return SharedStage("sft", name, output, (*data, policy_folder(config, tuning.base_model)))


def _on_hub(config: Config, name: str) -> hub_names.DataFiles | None:
    return hub_names.data_files(_raw(config, name).path or "")


def _raw(config: Config, name: str) -> Any:
    if name not in config.raw_datasets:
        raise EarlError(f"raw_datasets has no entry {name!r}; it has {', '.join(config.raw_datasets) or 'none'}")
    return config.raw_datasets[name]


def fine_tuning(config: Config, name: str) -> Sft:
    """Return the entry of ``sft`` with this name; EarlError where there is none."""
    if name not in config.sft:
        raise EarlError(f"sft has no entry {name!r}; it has {', '.join(config.sft) or 'none'}")
    return config.sft[name]


def selection(config: Config, name: str) -> Selection:
    """Return the entry of ``selections`` with this name; EarlError where there is none."""
    if name not in config.selections:
        raise EarlError(f"selections has no entry {name!r}; it has {', '.join(config.selections) or 'none'}")
    return config.selections[name]


def _shared(config: Config, kind: str) -> Path:
    return Path(config.base_exp_dir) / "shared" / kind


def _raw_key(config: Config, name: str) -> Any:
    # How many rows may be rejected does not change those that are kept.
    return _raw(config, name).model_dump(mode="json", exclude={"max_rejected_fraction"})


def _fetched_key(name: str) -> Any:
    return catalogue.entries()[name].key


def _tokenised_key(config: Config, name: str) -> Any:
    # The name stands in every row.
    return {
        "name": name,
        "raw": _raw_key(config, name),
        "vision_tokenizer_path": config.vision_tokenizer_path,
        "image_area": config.image_area,
        "cpu_threads": config.cpu_threads,
    }


def _selected_key(config: Config, name: str) -> Any:
    return {"selection": selection(config, name).model_dump(mode="json"), "reward": config.reward_final_reward}


def _converted_key(config: Config, name: str, vision: bool) -> Any:
    tokenizer = _tokenizer_of(config, name, vision)
    return {
        "hub": name,
        "revision": _revision_of(config, name, vision),
        "tokenizer": tokenizer and _key(config, tokenizer),
        "vision": vision,
    }


def _shapes_policy_key() -> Any:
    return {"seed": SHAPES_POLICY_SEED}


def _sft_key(config: Config, name: str) -> Any:
    tuning = fine_tuning(config, name)
    settings = tuning.model_dump(mode="json", exclude=SFT_FREE)
    if validation := validation_data(config, name):
        settings["validation"]["paths_file"] = [_key(config, path) for path in validation.references]
    settings["train_paths_file"] = [_key(config, path) for path in tuning.train_paths_file]
    settings["base_model"] = _policy_key(config, tuning.base_model)
    return {"sft": settings} | {name: getattr(config, name) for name in SFT_USES}


def _policy_key(config: Config, reference: str) -> Any:
    """Return what identifies the content behind a field that names a policy."""
    return _converted_key(config, reference, False) if hub_names.is_name(reference) else _key(config, reference)


def _key(config: Config, reference: str) -> Any:
    """Return what identifies the content behind a path field."""
    if reference.startswith(f"{STAGE}tokenise/"):
        return _tokenised_key(config, reference.removeprefix(f"{STAGE}tokenise/"))
    if reference.startswith(f"{STAGE}fetch/"):
        return _fetched_key(reference.removeprefix(f"{STAGE}fetch/"))
    if reference.startswith(f"{STAGE}select/"):
        return _selected_key(config, reference.removeprefix(f"{STAGE}select/"))
    if reference.startswith(f"{STAGE}sft/"):
        return _sft_key(config, reference.removeprefix(f"{STAGE}sft/"))
    if reference == f"{STAGE}shapes-policy":
        return _shapes_policy_key()
    return reference


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
