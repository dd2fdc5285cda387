"""The model card of an exported policy: what it is, a program that uses it, and the format of its prompts."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from earl.emu3.vision import SPATIAL_FACTOR
from earl.emu3.vocabulary import ROLES, Vocabulary

if TYPE_CHECKING:
    from earl.emu3.export import Use


def text(vocabulary: Vocabulary, use: "Use", causal_lm: bool) -> str:
    """Return the card, Markdown with front matter as the Hugging Face hub reads it.

    Args:
        vocabulary: Of the policy.
        use: How it is used.
        causal_lm: Whether the files for `AutoModelForCausalLM` are there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    ids = {role: getattr(vocabulary, role) for role in ("img", "eol", "eof", "eoi", "eos", "first_visual", "size")}
    return environment.get_template("model_card.md.j2").render(
        **ids,
        title=use.title,
        policy_digest=use.policy_digest,
        base_model=use.base_model,
        prefill=use.constant_prefill,
        image_area=use.image_area,
        side=math.isqrt(use.image_area) // SPATIAL_FACTOR,
        factor=SPATIAL_FACTOR,
        bos=ROLES["bos"],
        instruction="Remove the red circle",
        causal_lm=causal_lm,
    )
