"""Log-probabilities of tokens over their support, the plain way: from logits that are there whole.

`earl.learner.head` computes the same by blocks, from what comes before the logits, and is checked against this.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earl.emu3 import truncation


class Support(NamedTuple):
    """The ids that a token's log-probability is normalised over.

    `parts` are ranges of ids, first and last (exclusive; None: the model's last), that exclude each other. A target is
    normalised over the part that it lies in, and of that over what `top_k` and `top_p` leave (`kept_ids`).
    """

    parts: tuple[tuple[int, int | None], ...]
    top_k: int = -1
    top_p: float = 1.0

    @property
    def truncated(self) -> bool:
        return truncation.is_on(self.top_k, self.top_p)

    def rows(self, targets: Tensor, size: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield for each part the places int64 of its targets, and its first and last (exclusive) id.

        Args:
            size: ids that the model has.

        Raises:
            ValueError: a target lies in no part.
        """
        left = torch.ones_like(targets, dtype=torch.bool)
        for first, last in self.parts:
            end = size if last is None else last
            chosen = (targets >= first) & (targets < end)
            left &= ~chosen
            yield chosen.nonzero().squeeze(1), first, end
        if bool(left.any()):
            raise ValueError(f"target id {int(targets[left][0])} lies in no part of the support: {self.parts}")


FULL = Support(((0, None),))
"""All ids of the model."""


def split_vocab(visual_range: tuple[int, int]) -> Support:
    """A visual target over the visual ids, any other over the ids below them (the reference's
    `separate_language_and_vision_vocabs`).

    Args:
        visual_range: [first, last) ids of the visual tokens.
    """
    return Support((visual_range, (0, visual_range[0])))


def scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits / temperature in float32, or float64 where the logits are; `temperature` is one number or [T]."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).unsqueeze(1)
    return logits / temperature


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, support: Support
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature) over its support, and the entropy there.

    What `support` truncates is found from these logits, and held fixed: the gradient is that of the softmax over the
    ids that are kept, as if a small step could not change which they are.

    Args:
        logits: [T, V], any float type; the arithmetic is in float32, or float64 where the logits are.
        targets: int64 [T], ids 0..V-1.
        temperature: > 0, one number or float [T].

    Returns:
        (logp [T] in nats, <= 0; entropy [T] in nats, >= 0, of the softmax over the support), both differentiable.

    Raises:
        ValueError: a target lies in no part of the support.
    """
    logits = scaled(logits, temperature)
    logp = entropy = logits.new_zeros(len(targets))
    for rows, first, last in support.rows(targets, logits.shape[1]):
        part, own = logits[rows, first:last], targets[rows] - first
        if support.truncated:
            part = part.masked_fill(~kept_ids(part.detach(), own, support), -torch.inf)
        logprobs = F.log_softmax(part, dim=-1)
        # index_copy keeps the autograd path of every part and restores the order of the targets.
        logp = logp.index_copy(0, rows, logprobs.gather(-1, own.unsqueeze(-1)).squeeze(-1))
        entropy = entropy.index_copy(0, rows, _entropy(logprobs))
    return logp, entropy


def kept_ids(logits: Tensor, targets: Tensor, support: Support) -> Tensor:
    """bool [rows, ids]: what `top_k` and `top_p` leave of a part of the support, and the target.

    A sampler finds this set from logits of its own. Those of a learner with the same weights are equal but for
    rounding, which may move an id or two that lie right on the boundary in or out; so may it the target, which the
    sampler has drawn and which is therefore always kept.

    Args:
        logits: [rows, ids] of the part, divided by the temperature.
        targets: int64 [rows], places in the part.
    """
    kept = truncation.kept_ids(F.log_softmax(logits, dim=-1), support.top_k, support.top_p)
    return kept.scatter(1, targets.unsqueeze(1), True)


def _entropy(logprobs: Tensor) -> Tensor:
    # An id masked to -inf has probability 0 and adds nothing, nor to the gradient; unmasked it would add 0 * inf = NaN.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1)
