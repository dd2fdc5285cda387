"""Policies for tests: the shapes world's, with random weights, that have been taught a few certain tokens."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import saving, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.files import atomic
from earl.shapes import policy

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM


def write(folder: Path, change: "Callable[[Emu3ForCausalLM, Vocabulary], None]", seed: int = 0) -> Path:
    """Write a small policy, with the shipped one's tokenizer, whose weights ``change`` has altered."""
    import torch

    vocabulary = Vocabulary.from_folder(policy.BASE_POLICY)
    model = policy.build_model(vocabulary.text, seed, layers=2, width=64)
    with torch.no_grad():
        change(model, vocabulary)
    with atomic.folder(folder) as temporary:
        saving.save_policy(model, temporary, saving.companions(policy.BASE_POLICY))
    return folder


def teach(model: "Emu3ForCausalLM", ids: Sequence[int], strength: float) -> None:
    """Make each id follow the one before it; how often, ``strength`` says."""
    import torch

    # All embeddings share a common part; what tells tokens apart is the rest.
    embedding = model.model.embed_tokens.weight - model.model.embed_tokens.weight.mean(0)
    for before, after in itertools.pairwise(ids):
        model.lm_head.weight[after] += strength * torch.nn.functional.normalize(embedding[before], dim=0)


def be_picky(model: "Emu3ForCausalLM", vocabulary: Vocabulary) -> None:
    """Prefer some visual tokens a lot, so that truncation leaves few, and begin an image after a few words or none."""
    end = vocabulary.encode(sequence.END_THINKING)
    size_and_img = [vocabulary.boi, *vocabulary.encode("8*8"), vocabulary.img]
    teach(model, [vocabulary.encode(sequence.START_THINKING)[-1], *end, *size_and_img], strength=9)
    model.lm_head.weight[vocabulary.first_visual :] *= 3
