"""A starting policy for the shapes world: a small `Emu3ForCausalLM` with random weights, and its tokenizer.

Nothing here is special-cased elsewhere: the folder holds what any Emu3 policy folder holds, with Emu3's token names,
so every stage reads it as it would read a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import saving, sequence, vocabulary
from earl.files import atomic
from earl.shapes import world
from earl.statistics import seeds

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Emu3ForCausalLM

VISION_TOKENIZER = Path(__file__).parent / "vision_tokenizer"
"""The trained `Emu3VQVAE` that ships with the package (scripts/train_shapes_vision_tokenizer.py makes it)."""
BASE_POLICY = Path(__file__).parent / "base_policy"
"""The pretrained policy that ships with the package (config/shapes_base.jsonnet describes how it was trained)."""
CODES = 256
"""Codes of that vision tokenizer, hence visual tokens of the policy."""
TEXT_IDS = 480
"""At most; the texts of this world need fewer, and every word of an instruction becomes one id."""
MAX_LENGTH = 512
COMMON = 0.03
"""Standard deviation of one random vector added to all embeddings (their own is 0.02).

Attention by place needs a query and a key that are the same for all tokens, and Emu3's projections have no biases. A
common part of the embeddings supplies them from the first step, so that copying, the better part of editing, is learned
in about 300 steps instead of thousands.
"""
_SPECIAL = (
    "<|endoftext|>",
    "<|extra_200|>",
    "<|extra_201|>",
    "<|extra_203|>",
    "<|extra_204|>",
    "<|image token|>",
    "<|image start|>",
    "<|image end|>",
)


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE of at most TEXT_IDS text ids, Emu3's special tokens, and the visual tokens as the last ids.

    Any UTF-8 text round-trips, since all 256 bytes are in the vocabulary. Always the same tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TEXT_IDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    names = [*_SPECIAL, *(vocabulary.visual_token(i) for i in range(CODES))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _texts() -> Iterator[str]:
    for index in range(2000):
        edit = world.edit(seeds.seed("shapes tokenizer"), index)
        yield edit.instruction
        if index % 4 == 0:
            yield sequence.START_THINKING
            yield sequence.reasoning_text(list(edit.reasoning.items()))
            yield sequence.END_THINKING
            yield f"{world.SIZE // 8}*{world.SIZE // 8}"


def build_model(tokenizer: Tokenizer, seed: int, layers: int = 4, width: int = 128) -> Emu3ForCausalLM:
    """Random weights that depend on the arguments alone; leaves torch's global generator as it was.

    Args:
        tokenizer: Its vocabulary is the model's.
        seed: Of the weights.
        layers: Number of layers.
        width: Size of a hidden state, a multiple of the 32 that a head has.
    """
    import torch

    from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig

    config = Emu3TextConfig(
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        attention_dropout=0.0,
        # Wavelengths of 6 to 500 tokens: all of them tell places inside a sequence of 170 apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=tokenizer.token_to_id(vocabulary.ROLES["pad"]),
        bos_token_id=tokenizer.token_to_id(vocabulary.ROLES["bos"]),
        eos_token_id=tokenizer.token_to_id(vocabulary.ROLES["eos"]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.seed("shapes policy", seed))
        model = Emu3ForCausalLM(config).float().eval()
        with torch.no_grad():
            model.model.embed_tokens.weight += COMMON * torch.randn(config.hidden_size)
        return model


def write_policy(folder: Path | str, seed: int) -> None:
    """Write the starting policy: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, sealed."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    with atomic.folder(folder) as temporary:
        model.generation_config.save_pretrained(temporary)
        vocabulary.write_tokenizer(tokenizer, temporary, MAX_LENGTH)
        saving.save_policy(model, temporary, {})
