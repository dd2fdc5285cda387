"""A policy of one layer for tests of whole runs, whose weights are written down instead of trained.

It samples several times faster than the shipped one. Every instruction of the shapes world is equally long, so that a
visual token of the original stands `AWAY` before its copy in the edit: one head copies that token, the other one the
token two columns to the left of it, and now and then that one wins. Some objects vanish, hence some edits of the task
`remove` succeed in part, and the rewards of a group differ.
"""

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import saving
from earl.emu3.vocabulary import Vocabulary
from earl.files import atomic
from earl.shapes import policy
from earl.statistics import seeds

if TYPE_CHECKING:
    import torch
    from transformers import Emu3ForCausalLM

AWAY = 91
"""Tokens from a token of the original to what is predicted at the end of which the same token of the edit follows."""
HEAD = 32
"""Width of a head. A token's embedding is 1, zeros, and a vector of length 1 in the last `HEAD` - 1 dimensions."""
LOOKS = ((AWAY, 4.0), (AWAY - 2, 3.2))
"""How far back each head looks, and what it weighs beside the embedding of the present token."""
SHARPNESS = 22.0
TEXT, VISUAL = 56.0, 14.0
"""How sure it is of a token, as a factor of its logit: a wrong word would be no image."""


def fields(model: str = "sft.shapes.base_model") -> dict[str, object]:
    """Return the fields of the demo that make it a run of this policy, which `model` names."""
    return {model: folder(), "raw_datasets.shapes_rl.tasks": ["remove"]}


@functools.cache
def folder() -> str:
    """Write the policy, once a process, and return its folder."""
    path = Path(_workshop().name) / "copier"
    with atomic.folder(path) as temporary:
        saving.save_policy(_model(), temporary, saving.companions(policy.BASE_POLICY))
    return str(path)


@functools.cache
def _workshop() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="earl-copier-")


def _model() -> "Emu3ForCausalLM":
    import torch

    vocabulary, width = Vocabulary.from_folder(policy.BASE_POLICY), HEAD * len(LOOKS)
    model = policy.build_model(vocabulary.text, seed=0, layers=1, width=width)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seeds.seed("copier"))
        tokens = torch.nn.functional.normalize(torch.randn(vocabulary.size, HEAD - 1), dim=-1)
        model.model.embed_tokens.weight.copy_(torch.nn.functional.pad(tokens, (width - HEAD + 1, 0)))
        model.model.embed_tokens.weight[:, 0] = 1
        for projection in model.model.layers[0].self_attn.children():
            projection.weight *= 0.05  # Close to nothing, but with gradients for all.
        for head, (away, weight) in enumerate(LOOKS):
            _look(model.model.layers[0].self_attn, head, away, weight)
        model.lm_head.weight.copy_(torch.nn.functional.pad(tokens, (width - HEAD + 1, 0)))
        model.lm_head.weight[: vocabulary.first_visual] *= TEXT / width**0.5
        model.lm_head.weight[vocabulary.first_visual :] *= VISUAL / width**0.5
    return model.to(torch.bfloat16)


def _look(attention: "torch.nn.Module", head: int, away: int, weight: float) -> None:
    """Let a head add `weight` times the embedding of the token that stands so far back, less its first dimension.

    Query and key come from the first dimension, the same for all tokens; the key is turned as rotary embeddings turn a
    key so far back, against which the turning of positions cancels there alone.
    """
    import torch

    width = attention.q_proj.in_features
    first = (width / 2) ** 0.5  # Of the first dimension and of the token's vector, after the norm.
    scale = SHARPNESS**0.5 / first
    turned = away * 100.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    rows, last = slice(head * HEAD, (head + 1) * HEAD), range(width - HEAD + 1, width)
    attention.q_proj.weight[rows, 0] = scale * torch.cat([torch.ones(HEAD // 2), torch.zeros(HEAD // 2)])
    attention.k_proj.weight[rows, 0] = scale * torch.cat([turned.cos(), turned.sin()])
    for row, dimension in enumerate(last, start=head * HEAD + 1):
        attention.v_proj.weight[row, dimension] += 1 / first
        attention.o_proj.weight[dimension, row] += weight
