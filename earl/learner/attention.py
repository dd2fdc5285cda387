"""How the learner's models attend: every sequence causally to itself, in padded or packed rows, by a choice of kernels.

The mask is never a tensor of the whole row: right-padded rows need none beyond causality, and packed ones (see
`packing`) are computed block by block, so that what lies outside the mask is not computed.

The kernel `flash` is the package flash-attn 2, imported where it is chosen alone. It has not been run on a GPU yet;
what it is asked for is tested against `sdpa`.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from earl.learner.packing import Group
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

OLDEST_GPU = (8, 0)
"""Compute capability that flash-attn 2 needs: Ampere's."""

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query [B, H, L, D], key and value [B, K, M, D], scale) -> [B, H, L, D], where the queries are those of the last L of
M places: causal there, and everything before is visible."""


def choose(choice: str, device: torch.device, bfloat16: bool) -> str:
    """Return the kernel to use, "sdpa" or "flash", for the choice "auto", "sdpa" or "flash".

    Raises:
        EarlError: "flash" is asked for where it cannot run.
    """
    if choice == "sdpa":
        return "sdpa"
    missing = [what for what, there in (("a GPU", device.type == "cuda"), ("dtype bfloat16", bfloat16)) if not there]
    problem = f"needs {' and '.join(missing)}" if missing else _flash_problem()
    if problem is None:
        return "flash"
    if choice == "flash":
        raise EarlError(f"attention is 'flash', which {problem}; set it to 'auto' or 'sdpa'")
    if not missing and _is_installed():
        _warn(f"attention: flash-attn is installed, but {problem}; torch's own kernels are used")
    return "sdpa"


def _is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _flash_problem() -> str | None:
    """Say why flash-attn cannot compute on this process's GPU; None: it can."""
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        name, version = torch.cuda.get_device_name(), ".".join(map(str, OLDEST_GPU))
        return f"needs a GPU of compute capability {version} or newer, not {name}"
    try:
        from flash_attn import flash_attn_func  # noqa: F401  (what `_flash` calls)
    except Exception as error:  # A build for another torch or CUDA raises what it likes.
        reason = f"{type(error).__name__}: {error}" if _is_installed() else "it is not installed"
        return (
            f"cannot be imported ({reason}); in EARL's folder, beside the torch that is installed, "
            "pip install --no-build-isolation -e '.[flash]'"
        )
    return None


@functools.cache
def _warn(text: str) -> None:
    """Say something once."""
    log.warning("%s", text)


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
    mask = _last_queries(length, visible, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _last_queries(length: int, visible: int, device: torch.device) -> Tensor:
    """The mask [length, visible] of queries that are those of the last places."""
    if device.type == "cuda":
        return causal_lower_right(length, visible)  # no tensor: it has kernels of its own, faster than those of a mask
    return torch.ones(length, visible, dtype=torch.bool, device=device).tril(visible - length)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    # Its layout is [B, L, H, D]; of fewer queries than keys it takes the queries for the last ones, as is meant here.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(query, key, value, softmax_scale=scale, causal=True, deterministic=True).transpose(1, 2)
