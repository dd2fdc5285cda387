"""Whether the models and lists of data that a configuration names are there: asked before a run is planned."""

from pathlib import Path

from earl.config import hub, paths
from earl.config.references import STAGE
from earl.config.schema import Config
from earl.data import datalist
from earl.errors import EarlError
from earl.files import manifest


def check(config: Config) -> None:
    """Raise where a model field names neither a folder that is there, nor a stage, nor a repository of the hub.

    Only fields that are still needed count: of a fine-tuning that is made, the base model may be gone.

    Raises:
        EarlError: naming field, path and remedy.
    """
    for field, value in _needed(config).items():
        if value.startswith(STAGE) or hub.is_name(value) or paths.resolve(config, value).is_dir():
            continue
        place = Path(value).absolute()
        raise EarlError(
            f"field {field} is {value!r}, but there is no folder {place}; name a folder that is there, a checkpoint on "
            "the hub as <owner>/<name>, or a stage such as stage:sft/<name>"
        )


def check_data(config: Config) -> None:
    """Raise where a field names a ``tokenized_datalist.json`` that cannot be read, or whose files are not found.

    Raises:
        EarlError: naming field, list and remedy.
    """
    for field, value in _lists(config).items():
        if value.endswith(".json"):
            try:
                datalist.read(Path(value))
            except EarlError as error:
                raise EarlError(f"field {field}: {error}") from error


def _lists(config: Config) -> dict[str, str]:
    """Return the tokenised data sets that the run reads, by the dotted name of their field."""
    lists = {"train_paths_file": config.train_paths_file}
    for name, one in config.evaluations.items():
        field = f"evaluations.{name}.paths_file" if one.paths_file else "val_paths_file"
        lists[field] = paths.evaluation_paths(config, name)
    for name in _made(config):
        lists[f"sft.{name}.train_paths_file"] = config.sft[name].train_paths_file
    return {f"{field}.{index}": path for field, given in lists.items() for index, path in enumerate(given)}


def _made(config: Config) -> list[str]:
    """Return the fine-tunings that the run needs and that are not made yet."""
    stages = paths.shared_stages(config)
    return [stage.name for output, stage in stages.items() if stage.stage == "sft" and not _is_sealed(output)]


def _is_sealed(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _needed(config: Config) -> dict[str, str]:
    """Return the values that models are taken from, by the dotted name of their field."""
    stages = [stage for output, stage in paths.shared_stages(config).items() if not _is_sealed(output)]
    needed = {"model_path": config.model_path, "vision_tokenizer_path": config.vision_tokenizer_path}
    for stage in stages:
        if stage.stage == "sft":
            needed[f"sft.{stage.name}.base_model"] = config.sft[stage.name].base_model
        if stage.conversion and stage.conversion.tokenizer:
            needed["tokenizer_path"] = config.tokenizer_path
    return needed
