"""How the learner's models attend: every sequence causally to itself, in padded or packed rows, by a choice of kernels.

The mask is never a tensor of the whole row: right-padded rows need none beyond causality, and packed ones (see
`packing`) are computed block by block, so that what lies outside the mask is not computed.

The kernel `flash` is the package flash-attn, imported where it is chosen alone. It has not been run on a GPU yet; what
it is asked for is tested against `sdpa`.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earl.learner.packing import Group
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query [B, H, L, D], key and value [B, K, M, D], scale) -> [B, H, L, D], where the queries are those of the last L of
M places: causal there, and everything before is visible."""


def choose(choice: str, device: torch.device, bfloat16: bool) -> str:
    """Return the kernel to use, "sdpa" or "flash", for the choice "auto", "sdpa" or "flash".

    Raises:
        EarlError: "flash" is asked for where it cannot run.
    """
    missing = [
        what
        for what, there in (
            ("a GPU", device.type == "cuda"),
            ("dtype bfloat16", bfloat16),
            ("the package flash-attn", importlib.util.find_spec("flash_attn") is not None),
        )
        if not there
    ]
    if choice == "flash" and missing:
        raise EarlError(f"attention is 'flash', which needs {', '.join(missing)}; set it to 'auto' or 'sdpa'")
    return "sdpa" if choice == "sdpa" or missing else "flash"


@contextmanager
def used_by(model: "Emu3ForCausalLM", kernel: str) -> Iterator[None]:
    """Have a model attend by a kernel within the block; `earl_groups` among its arguments says that a row is packed."""
    from transformers import AttentionInterface

    name, function = IMPLEMENTATIONS[kernel]
    AttentionInterface.register(name, function)
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def by_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers calls, by torch's own kernels.

    Args:
        query: [B, heads, S, D].
        key, value: [B, key heads, S, D].
        mask: none; transformers makes none for an implementation that it does not know.
        more: `earl_groups`, which cover the row from left to right where it is packed, and what else models pass on.

    Returns:
        ([B, S, heads, D], None).
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return _attend(_sdpa, query, key, value, more.get("earl_groups"), scaling), None


def by_flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """The same by flash-attn, which computes in bfloat16 and repeats no keys."""
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    return _attend(_flash, query, key, value, more.get("earl_groups"), scaling), None


# A name with "flash" in it transformers would take for a kernel to load from a hub.
IMPLEMENTATIONS = {"sdpa": ("earl_torch", by_sdpa), "flash": ("earl_fa", by_flash)}


def _attend(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group] | None, scale: float
) -> Tensor:
    if groups is None:
        return kernel(query, key, value, scale).transpose(1, 2).contiguous()
    parts = []
    for prompt, completions in groups:
        spans = [[prompt], *([prompt, own] for own in completions)]
        if len(completions) == 1:  # Next to each other, and causal as a whole.
            spans = [[slice(prompt.start, completions[0].stop)]]
        for seen in spans:
            keys, values = (torch.cat([x[:, :, part] for part in seen], dim=2) for x in (key, value))
            parts.append(kernel(query[:, :, seen[-1]], keys, values, scale))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    length, visible = query.shape[2], key.shape[2]
    if visible == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = torch.ones(length, visible, dtype=torch.bool, device=query.device).tril(visible - length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    # Its layout is [B, L, H, D]; of fewer queries than keys it takes the queries for the last ones, as is meant here.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(query, key, value, softmax_scale=scale, causal=True, deterministic=True).transpose(1, 2)
