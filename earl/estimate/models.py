"""The shapes of the models that a run will use, before any of them is there.

A folder that is there says its own. What the pipeline makes has the shape of what it starts from, and a checkpoint on
the hub is taken to be one of Emu3's, whose shape transformers has as its default.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from earl.config import paths
from earl.config.references import STAGE
from earl.emu3 import checkpoint
from earl.emu3.vision import SPATIAL_FACTOR

if TYPE_CHECKING:
    from transformers import Emu3TextConfig, Emu3VQVAEConfig

    from earl.config.schema import Config

SHAPES_POLICY = "package:shapes/base_policy"
WORDS = 35
"""Tokens of an instruction and what stands around it."""
REASONING = 400
"""Tokens of a reasoning: the published data cut it at 1,750 characters."""
MARKS = 9
"""Tokens of an image beside its visual ones and the ends of its rows: its size, such as 32*32, and its ends."""


def text(config: "Config", reference: str | None = None) -> "Emu3TextConfig":
    """Return the shape of a policy.

    Args:
        reference: a value of `model_path` or of a fine-tuning's `base_model`; None: that of `model_path`.
    """
    from earl.emu3.models import Emu3TextConfig

    reference = config.model_path if reference is None else reference
    folder = paths.policy_folder(config, reference)
    if (folder / "config.json").is_file():
        return checkpoint.text_config(folder)
    if reference.startswith(f"{STAGE}sft/"):
        return text(config, paths.fine_tuning(config, reference.removeprefix(f"{STAGE}sft/")).base_model)
    if reference.startswith(STAGE):
        return checkpoint.text_config(paths.resolve(config, SHAPES_POLICY))
    return Emu3TextConfig()


def vision(config: "Config") -> "Emu3VQVAEConfig":
    """Return the shape of the vision tokenizer."""
    from earl.emu3.models import Emu3VQVAEConfig

    folder = paths.vision_tokenizer_folder(config)
    if (folder / "config.json").is_file():
        return Emu3VQVAEConfig.from_dict(checkpoint.config_fields(folder))
    return Emu3VQVAEConfig()


@dataclass(frozen=True)
class Lengths:
    """Tokens of an episode with square images of `image_area`.

    Attributes:
        prompt: of an image and an instruction.
        completion: of one of usual length.
        longest: of the longest, which memory must suffice for.
    """

    prompt: int
    completion: int
    longest: int


def lengths(config: "Config") -> Lengths:
    side = image_side(config) // SPATIAL_FACTOR
    image = side * side + side + MARKS
    prompt = image + WORDS
    limits = (config.max_response_tokens, config.max_completion_len, config.model_context_size - prompt)
    longest = max(1, min(limit for limit in limits if limit is not None))
    if config.emu3_use_logit_processor and config.assistant_prefill.startswith("<|image start|>"):
        return Lengths(prompt, min(image, longest), min(image, longest))
    return Lengths(prompt, min(image + REASONING, longest), longest)


def notes(config: "Config") -> list[str]:
    """Return whether prompts leave too little room for the image that an episode is taken to hold."""
    found = lengths(config)
    image = found.prompt - WORDS
    if found.longest >= image:
        return []
    return [
        f"image_area = {config.image_area}: an image takes {image} tokens, but of model_context_size "
        f"{config.model_context_size} and max_response_tokens {config.max_response_tokens} a completion gets "
        f"{found.longest}; room for prompt and image takes {found.prompt + image} and {image}"
    ]


def image_side(config: "Config") -> int:
    """Return the pixels of a square image's side."""
    return math.isqrt(config.image_area)
