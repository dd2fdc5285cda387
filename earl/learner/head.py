"""The head: from hidden states to the log-probabilities of sampled tokens, without a [tokens, vocabulary] tensor.

With a vocabulary of 184,622 the logits of a single completion of 1,060 tokens take 783 MB in float32, and a plain
log-softmax keeps several of their size for the gradient. Here logits exist one block of tokens and ids at a time: the
forward pass keeps the log-sum-exp of each token, the backward pass makes each block again and takes the softmax from it
(as in Liger, Hsu et al. 2024, arXiv:2410.10989, and Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009). Ids
outside a token's support are never computed. The gradient is exact: nothing is dropped or approximated.

Imports torch alone, like `objective`, whose `token_logprobs` is the plain way that this one is checked against.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earl.learner import objective

TOKENS = 1024
IDS = 8192
"""A block of logits: 32 MiB in float32, large enough that its matrix products run at full speed."""


class Support(NamedTuple):
    """Tokens normalised over the same ids."""

    rows: Tensor  # int64, places among the tokens
    first: int
    last: int  # exclusive


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    visual_range: tuple[int, int],
    split_vocab: bool,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as of `objective.token_logprobs`, from what comes before the logits.

    Logits that fit in one block are computed whole, others block by block; the two agree within rounding.

    Args:
        hidden: [T, D], last hidden state at the positions that predict the targets.
        weight: [V, D], of the head.
        targets, temperature, visual_range, split_vocab: as in `objective.token_logprobs`.
        bfloat16: whether products take bfloat16 factors; sums of blocks are in float32 in any case.

    Returns:
        (logp [T], entropy [T]), float32, or float64 where `hidden` is.

    Raises:
        ValueError: see `objective.token_logprobs`.
    """
    if len(targets) * len(weight) <= TOKENS * IDS:
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = F.linear(hidden, weight)
        return objective.token_logprobs(logits, targets, temperature, visual_range, split_vocab)
    supports = _supports(targets, len(weight), visual_range, split_vocab)
    return _BlockedLogprobs.apply(hidden, weight, targets, temperature, supports, bfloat16)


def _supports(targets: Tensor, size: int, visual_range: tuple[int, int], split_vocab: bool) -> list[Support]:
    if not split_vocab:
        return [Support(torch.arange(len(targets), device=targets.device), 0, size)]
    is_visual = objective.visual_targets(targets, visual_range)
    parts = (is_visual, *visual_range), (~is_visual, 0, visual_range[0])
    return [Support(chosen.nonzero().squeeze(1), first, last) for chosen, first, last in parts]


class _BlockedLogprobs(torch.autograd.Function):
    """(hidden, weight, targets, temperature, supports, bfloat16) -> (logp, entropy); no gradient from the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        supports: list[Support],
        bfloat16: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy, normalizer = (torch.zeros(len(targets), dtype=dtype, device=hidden.device) for _ in range(3))
        for rows, first, last in _token_blocks(supports):
            block = _Block(hidden[rows], targets[rows], temperature, bfloat16, dtype)
            logp[rows], entropy[rows], normalizer[rows] = block.normalised(weight, first, last)
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.temperature, ctx.supports, ctx.bfloat16, ctx.dtype = temperature, supports, bfloat16, dtype
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        for rows, first, last in _token_blocks(ctx.supports):
            block = _Block(hidden[rows], targets[rows], ctx.temperature, ctx.bfloat16, ctx.dtype)
            scale = (grad_logp[rows] / ctx.temperature).to(ctx.dtype).unsqueeze(1)
            for start, end in _id_blocks(first, last):
                # d logp / d logit = (one-hot of the target - softmax) / temperature
                grad = block.logits(weight, start, end).sub_(normalizer[rows].unsqueeze(1)).exp_().mul_(-scale)
                inside = block.inside(start, end)
                grad[inside, block.targets[inside] - start] += scale.squeeze(1)[inside]
                grad = grad.to(block.hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += grad @ weight[start:end].to(grad.dtype)
                if grad_weight is not None:
                    grad_weight[start:end] += grad.T @ block.hidden
        grads = (
            None if grad is None else grad.to(x.dtype) for grad, x in ((grad_hidden, hidden), (grad_weight, weight))
        )
        return (*grads, None, None, None, None)


class _Block:
    """The arithmetic of at most TOKENS tokens."""

    def __init__(self, hidden: Tensor, targets: Tensor, temperature: float, bfloat16: bool, dtype: torch.dtype) -> None:
        self.hidden = hidden.to(torch.bfloat16 if bfloat16 else dtype)
        self.targets, self.temperature, self.dtype = targets, temperature, dtype

    def logits(self, weight: Tensor, start: int, end: int) -> Tensor:
        """[tokens, end - start], divided by the temperature."""
        product = self.hidden @ weight[start:end].to(self.hidden.dtype).T
        return product.to(self.dtype).div_(self.temperature)

    def inside(self, start: int, end: int) -> Tensor:
        """Places of the tokens whose target is one of the ids start..end-1."""
        return ((self.targets >= start) & (self.targets < end)).nonzero().squeeze(1)

    def normalised(self, weight: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the targets, entropy and log-sum-exp over first..last-1, by one pass over the blocks.

        Keeps the largest logit m so far, s = sum exp(l - m) and u = sum exp(l - m) (l - m), so that the log-sum-exp is
        m + log s and the entropy log s - u / s.
        """
        largest = torch.full_like(self.targets, torch.finfo(self.dtype).min, dtype=self.dtype)
        total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
        for start, end in _id_blocks(first, last):
            logits = self.logits(weight, start, end)
            inside = self.inside(start, end)
            chosen[inside] = logits[inside, self.targets[inside] - start]
            new = torch.maximum(largest, logits.amax(1))
            shift = largest - new
            shrink = shift.exp()
            logits.sub_(new.unsqueeze(1))
            weights = logits.exp()
            weighted = shrink * (weighted + shift * total) + weights.mul(logits).sum(1)
            total = shrink * total + weights.sum(1)
            largest = new
        normalizer = largest + total.log()
        return chosen - normalizer, total.log() - weighted / total, normalizer


def _token_blocks(supports: list[Support]) -> Iterator[Support]:
    for rows, first, last in supports:
        for part in rows.split(TOKENS):
            if len(part):
                yield Support(part, first, last)


def _id_blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, IDS):
        yield start, min(start + IDS, last)
