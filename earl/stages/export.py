"""Export: a policy of a run as one model for others, with all that the run's configuration says about its use."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from earl.config import paths
from earl.config.load import load, read
from earl.emu3 import export
from earl.files import hub_names, manifest, remedies
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import state

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What is written."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; None: as they are."""
    causal_lm: bool = True
    """Whether `AutoModelForCausalLM` loads it, too, for which the language model is written twice."""


def of_run(run: Path, iteration: int | None, out: Path, options: Options = Options()) -> None:
    """Export the policy of an iteration of a run; None: the newest that is on disk.

    Raises:
        EarlError: the policy is not on disk or not the one on record, or ``out`` is a folder that is no export; see
            also `earl.emu3.export.write`.
    """
    files = Run(run)
    config = read(files.config)
    index = state.newest_checkpoint(files) if iteration is None else iteration
    folder = files.iteration(index).policy
    remedies.check_policy_folder(folder)
    state.check_policy(files, index)
    _write(config, folder, out, f"{config.run_name}, iteration {index}", options)


def of_folder(policy: Path, config_file: Path | None, out: Path, options: Options = Options()) -> None:
    """Export any policy folder, for use as a configuration says.

    Args:
        policy: The folder.
        config_file: An experiment, or the frozen configuration of a run; None: the folder is one of a run's iterations.
        out: The folder to write, sealed.
        options: What is written.

    Raises:
        EarlError: there is no configuration; see also `of_run`.
    """
    remedies.check_policy_folder(policy)
    iteration = policy.absolute().parent
    if config_file is None and iteration.parent.name == "iterations" and iteration.name.isdigit():
        of_run(iteration.parent.parent, int(iteration.name), out, options)
        return
    if config_file is None:
        raise EarlError(
            f"{policy}: give --config, the experiment that this policy was trained by: it says which vision tokenizer "
            "belongs to it, the size of images, and how completions begin"
        )
    config = read(config_file) if config_file.suffix == ".json" else load(config_file).config
    _write(config, policy, out, policy.absolute().name, options)


def _write(config: "Config", policy: Path, out: Path, title: str, options: Options) -> None:
    import torch

    is_export = all((out / name).exists() for name in (manifest.NAME, export.VISION_TOKENIZER))
    if out.is_dir() and any(out.iterdir()) and not is_export:
        raise EarlError(f"{out}: is there already and no export, which would replace it; give the name of a new folder")
    vision_tokenizer = paths.vision_tokenizer_folder(config)
    if not vision_tokenizer.is_dir():
        raise EarlError(
            f"{vision_tokenizer}: is missing, the vision tokenizer that vision_tokenizer_path "
            f"({config.vision_tokenizer_path}) stands for; make it by `earl convert model`, or give the path of one"
        )
    use = export.Use(
        image_area=config.image_area,
        prefill=config.assistant_prefill,
        sampling={
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": max(config.top_k, 0),
            "max_new_tokens": config.max_response_tokens,
        },
        title=title,
        policy_digest=manifest.digest_folder(policy),
        base_model=str(config.model_path) if hub_names.is_name(str(config.model_path)) else None,
    )
    dtype = getattr(torch, options.dtype) if options.dtype else None
    digest = export.write(policy, vision_tokenizer, out, use, dtype, options.causal_lm)
    log.info("export: %s -> %s, digest %s", policy, out, digest[:12])
