"""Whether the models that a configuration starts from are there: asked before a run is planned."""

from pathlib import Path

from earl.config import hub, paths
from earl.config.references import STAGE
from earl.config.schema import Config
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


def _needed(config: Config) -> dict[str, str]:
    """Return the values that models are taken from, by the dotted name of their field."""
    stages = [stage for output, stage in paths.shared_stages(config).items() if not (output / manifest.NAME).is_file()]
    needed = {"model_path": config.model_path, "vision_tokenizer_path": config.vision_tokenizer_path}
    for stage in stages:
        if stage.stage == "sft":
            needed[f"sft.{stage.name}.base_model"] = config.sft[stage.name].base_model
        if stage.conversion and stage.conversion.tokenizer:
            needed["tokenizer_path"] = config.tokenizer_path
    return needed
