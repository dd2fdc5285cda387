"""Packing without padding: many sequences in one row, and a prompt that several completions share computed once.

    input_ids     prompt A   completion A0   completion A1   prompt B   completion B0
    position_ids  0 .. P-1   P .. P+L0-1     P .. P+L1-1     0 ..       ..

Under the block mask a prompt sees itself, a completion its prompt and itself, each causally, so that every token gets
the hidden state that it has in a sequence of its own. What lies outside the mask is not computed: attention runs block
by block, never over the whole row. With N completions of L tokens to a prompt of P this takes P + N L tokens through
the layers instead of N (P + L): little more than half for prompts with an image as large as the completions'.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

ATTENTION = "earl_packed"


class Group(NamedTuple):
    """Where a prompt and its completions lie in the row."""

    prompt: slice
    completions: list[slice]


class Packed(NamedTuple):
    """A row of S tokens."""

    input_ids: np.ndarray  # int64 [S]
    position_ids: np.ndarray  # int64 [S], place in prompt and completion together
    groups: list[Group]


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Packed:
    """Pack (prompt, completion) pairs in their order; neighbours with equal prompts share one."""
    ids, positions, groups, last_prompt, end = [], [], [], None, 0
    for prompt, completion in sequences:
        if last_prompt is None or not np.array_equal(prompt, last_prompt):
            groups.append(Group(slice(end, end + len(prompt)), []))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            last_prompt, end = prompt, end + len(prompt)
        groups[-1].completions.append(slice(end, end + len(completion)))
        ids.append(completion)
        positions.append(len(prompt) + np.arange(len(completion)))
        end += len(completion)
    return Packed(np.concatenate(ids), np.concatenate(positions), groups)


def hidden_states(model: "Emu3ForCausalLM", input_ids: Tensor, position_ids: Tensor, groups: Sequence[Group]) -> Tensor:
    """Last hidden states [1, S, D] of a packed row; `input_ids` and `position_ids` are int64 [1, S]."""
    with _attention_by_groups(model):
        return model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, earl_groups=groups
        ).last_hidden_state


@contextmanager
def _attention_by_groups(model: "Emu3ForCausalLM") -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    usual = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    earl_groups: Sequence[Group],
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention under the block mask, with the signature that transformers calls.

    Args:
        query: [1, heads, S, D].
        key, value: [1, key heads, S, D].
        earl_groups: cover the row from left to right.

    Returns:
        ([1, S, heads, D], None).
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts = []
    for prompt, completions in earl_groups:
        if len(completions) == 1:
            whole = slice(prompt.start, completions[0].stop)
            parts.append(_attend(query, key, value, whole, [whole], scaling))
            continue
        parts.append(_attend(query, key, value, prompt, [prompt], scaling))
        parts += [_attend(query, key, value, own, [prompt, own], scaling) for own in completions]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, own: slice, seen: list[slice], scaling: float) -> Tensor:
    """Queries of `own`, the last of `seen`: causal there, and everything in those before it is visible."""
    keys, values = (torch.cat([x[:, :, part] for part in seen], dim=2) for x in (key, value))
    length, visible = own.stop - own.start, keys.shape[2]
    if visible == length:
        return F.scaled_dot_product_attention(query[:, :, own], keys, values, is_causal=True, scale=scaling)
    mask = torch.ones(length, visible, dtype=torch.bool, device=query.device).tril(visible - length)
    return F.scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask, scale=scaling)
