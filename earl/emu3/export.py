"""A policy and its vision tokenizer as one model that transformers and vLLM load without this package.

::

    config.json                     of Emu3ForConditionalGeneration
    model-*.safetensors             its weights, text model and vision tokenizer, and their index
    causal_lm-*.safetensors         the text model again, with the names of Emu3ForCausalLM, and an index
    vision_tokenizer/               the vision tokenizer again, as stages read it
    processor_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
    generation_config.json
    README.md                       the model card

The two classes name the same weights differently, and a safetensors file can give a tensor one name only. Without the
second copy `AutoModelForCausalLM` would find none of its weights; transformers then warns and takes random ones. So its
configuration names the files of that copy: where it was left out, loading fails.

transformers loads a model in one type. In bfloat16 the vision tokenizer gives other tokens than in float32, which
policies are trained with (37% of those of the shapes world). So the card's program takes it from a folder of its own.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.emu3 import checkpoint, merge, model_card, saving, weight_files
from earl.emu3.vision import SPATIAL_FACTOR
from earl.emu3.vocabulary import ROLES, Vocabulary, visual_token
from earl.files import atomic, manifest, tensors
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from transformers import Emu3TextConfig

CAUSAL_LM = "causal_lm"
"""What names of the files of the second copy begin with."""
VISION_TOKENIZER = "vision_tokenizer"
"""Folder of the vision tokenizer."""
PLACEHOLDERS = ("<image>", "<|extra_0|>", ROLES["eol"])
"""Tokens that may stand for an image in a prompt, best first: transformers' own, one that Emu3 leaves unused, and the
end of a row. The processor repeats it once for each token of the image, the ends of rows included, and the model puts
the image's embeddings there, so the last one, which every vocabulary has, is as right as the others."""
# transformers' processor puts <bos> before a prompt whatever the template says, vLLM does not: there `bos` is given.
CHAT_TEMPLATE = """\
{%- if bos is defined and bos -%}BOS{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}IMAGE{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}PREFILL{%- endif -%}
"""


@dataclass(frozen=True)
class Use:
    """How the policy was trained, hence how it is to be used."""

    image_area: int
    """Pixels of the images."""
    prefill: str
    """Text that completions start from; `{H}` and `{W}` stand for the size of the image in visual tokens."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' `GenerationConfig`."""
    title: str = "An image editor"
    """Of the model card."""
    policy_digest: str | None = None
    base_model: str | None = None
    """Name on the hub of the model that training started from."""

    @property
    def constant_prefill(self) -> str:
        """What does not depend on the image of `prefill`: the policy writes the size itself."""
        return self.prefill.partition("{H}")[0]


def write(
    policy: Path,
    vision_tokenizer: Path,
    out: Path,
    use: Use,
    dtype: "torch.dtype | None" = None,
    causal_lm: bool = True,
) -> str:
    """Write the model and return the digest of its folder, which is sealed.

    Args:
        policy: Folder of a policy of any format (`earl.emu3.checkpoint`). An adapter is added to its base.
        vision_tokenizer: Folder of an `Emu3VQVAE`.
        out: Where the folder appears once it is complete.
        use: How the policy is used.
        dtype: Of the text model's weights; None: what the policy says. The vision tokenizer's stay as they are.
        causal_lm: Whether to write the second copy of the text model.

    Raises:
        EarlError: a folder is missing, damaged or not what it should be; the two have different codebooks.
    """
    import torch

    vocabulary = checkpoint.check_identity(policy)
    codes = checkpoint.check_vision_tokenizer(vision_tokenizer)
    if codes != vocabulary.num_visual:
        raise EarlError(
            f"{policy}: has {vocabulary.num_visual} visual tokens, but {vision_tokenizer} has {codes} codes; give the "
            "vision tokenizer that the policy was trained with"
        )
    text = checkpoint.text_config(policy)
    dtype = dtype or text.dtype or torch.float32
    with (
        atomic.folder(out) as temporary,
        checkpoint.reading_policy(policy),
        manifest.reading(vision_tokenizer),
    ):
        config = _config(text, _vision_fields(vision_tokenizer), vocabulary, dtype)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_processor(policy, vocabulary, text.max_position_embeddings, use, temporary)
        _write_generation_config(vocabulary, use, temporary)
        (temporary / "README.md").write_text(model_card.text(vocabulary, use, causal_lm), encoding="utf-8")
        entries = weight_files.write(temporary, _whole_weights(policy, vision_tokenizer, dtype), indexed=True)
        if causal_lm:
            entries |= weight_files.write(temporary, _text_weights(policy, dtype), CAUSAL_LM, indexed=True)
        for name in ("config.json", *(path.name for path in vision_tokenizer.glob("*.safetensors*"))):
            (temporary / VISION_TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(vision_tokenizer / name, temporary / VISION_TOKENIZER / name)
        checkpoint.check_identity(temporary)
        return manifest.seal(temporary, entries)


def _config(
    text: "Emu3TextConfig", vision: dict[str, Any], vocabulary: Vocabulary, dtype: "torch.dtype"
) -> dict[str, Any]:
    config = json.loads(saving.config_text(text, dtype))
    config["text_config"]["transformers_weights"] = weight_files.index_name(CAUSAL_LM)
    names = {visual_token(index): vocabulary.first_visual + index for index in range(vocabulary.num_visual)}
    return config | {
        "architectures": ["Emu3ForConditionalGeneration"],
        "tie_word_embeddings": text.tie_word_embeddings,
        "vocabulary_map": names | {ROLES["eol"]: vocabulary.eol, "<image>": _id(vocabulary, placeholder(vocabulary))},
        "vq_config": vision,
    }


def _vision_fields(folder: Path) -> dict[str, Any]:
    fields = checkpoint.config_fields(folder)
    return {name: value for name, value in fields.items() if name not in ("architectures", "transformers_version")}


def placeholder(vocabulary: Vocabulary) -> str:
    """Return the token that stands for an image in a prompt."""
    return next(name for name in PLACEHOLDERS if _id(vocabulary, name) is not None)


def _id(vocabulary: Vocabulary, name: str) -> int | None:
    return vocabulary.text.token_to_id(name)


def _write_processor(policy: Path, vocabulary: Vocabulary, longest: int, use: Use, out: Path) -> None:
    from earl.emu3.models import Emu3ImageProcessor, Emu3Processor, PreTrainedTokenizerFast

    image = placeholder(vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(policy / "tokenizer.json"),
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": ROLES[role] for role in ("pad", "bos", "eos")},
        extra_special_tokens={
            "image_token": image,
            "boi_token": ROLES["boi"],
            "eoi_token": ROLES["eoi"],
            "image_wrapper_token": ROLES["img"],
            "eof_token": ROLES["eof"],
        },
    )
    # An image of about this area, as data are tokenised, keeps its size: sides are rounded to whole tokens.
    margin = 5 * SPATIAL_FACTOR * math.isqrt(use.image_area) // 4
    images = Emu3ImageProcessor(
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=use.image_area - margin,
        max_pixels=use.image_area + margin,
        spatial_factor=SPATIAL_FACTOR,
    )
    template = CHAT_TEMPLATE.replace("BOS", ROLES["bos"]).replace("IMAGE", image)
    template = template.replace("PREFILL", use.constant_prefill)
    Emu3Processor(images, tokenizer, chat_template=template).save_pretrained(out)


def _write_generation_config(vocabulary: Vocabulary, use: Use, out: Path) -> None:
    from earl.emu3.models import GenerationConfig

    ids = {f"{role}_token_id": getattr(vocabulary, role) for role in ("pad", "bos", "eos")}
    GenerationConfig(**ids, **use.sampling).save_pretrained(out)


def _text_weights(policy: Path, dtype: "torch.dtype") -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the weights of the policy by their names in `Emu3ForCausalLM`.

    Raises:
        EarlError: one is not finite in this type.
    """
    for name, weight in merge.merged_weights(policy):
        weight = weight.to(dtype)
        if not tensors.is_finite(weight):
            raise EarlError(f"{policy}: weight {name!r} is not finite as {dtype}; go back to an earlier checkpoint")
        yield name, weight


def _whole_weights(policy: Path, vision: Path, dtype: "torch.dtype") -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the weights of policy and vision tokenizer by their names in `Emu3ForConditionalGeneration`."""
    for name, weight in _text_weights(policy, dtype):
        yield re.sub(r"^model\.", "model.text_model.", name), weight
    for _, name, weight in checkpoint.weights(vision):
        yield f"model.vqmodel.{name}", weight
