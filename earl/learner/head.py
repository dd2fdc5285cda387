"""The head: from hidden states to the log-probabilities of sampled tokens, without a [tokens, vocabulary] tensor.

With a vocabulary of 184,622 the logits of a single completion of 1,060 tokens take 783 MB in float32, and a plain
log-softmax keeps several of their size for the gradient. Here logits exist one block of tokens and ids at a time: the
forward pass keeps the log-sum-exp of each token, the backward pass makes each block again and takes the softmax from it
(as in Liger, Hsu et al. 2024, arXiv:2410.10989, and Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009). Ids
outside a token's support are never computed. The gradient is exact: nothing is dropped or approximated.

Where the sampler truncated, `kept_ids` first finds what it kept, one bit an id, and the blocks leave out the rest.

Imports torch alone, like `logprobs`, whose `token_logprobs` is the plain way that this one is checked against.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earl.emu3 import float32
from earl.learner import logprobs
from earl.learner.logprobs import Support

TOKENS = 1024
IDS = 4096
"""A block of logits: 16 MiB in float32, large enough that its matrix products run at full speed."""
SORTED = TOKENS * IDS // 4
"""Logits that are sorted at once: with ids, sums and probabilities they take some 40 bytes each."""
LEFT_OUT = -1e30
"""Logit of an id that is not kept: its softmax is 0, and unlike an infinity it can be subtracted from itself."""


class Part(NamedTuple):
    """Tokens normalised over the same ids, or over some of them."""

    rows: Tensor  # int64 [R], places among the tokens
    first: int
    last: int  # exclusive
    kept: Tensor | None  # uint8 [R, (last - first) / 8 rounded up], a bit for each id: see kept_ids; None: all of them


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    support: Support,
    bfloat16: bool = False,
    kept: Sequence[Tensor] | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as of `logprobs.token_logprobs`, from what comes before the logits.

    Logits that fit in one block are computed whole where nothing is truncated or rounded to bfloat16, others block by
    block; the two agree within rounding.

    Args:
        hidden: [T, D], last hidden state at the positions that predict the targets.
        weight: [V, D], of the head.
        targets, temperature, support: as in `logprobs.token_logprobs`.
        bfloat16: whether products take bfloat16 factors. They and their sums are float32 in any case.
        kept: what `kept_ids` gave for these targets under this or another model, the log-probs of which are then over
            the same ids; None finds it where the support is truncated.
        accumulate: add the weight's gradient to `weight.grad` in place, a block at a time, instead of handing autograd
            a second tensor of its size to add. It is done for a leaf of the type of the sums without hooks of its own;
            `torch.autograd.grad` sees no gradient then, nor does what listens to autograd itself
            (DistributedDataParallel). Elsewhere (a gathered or cast weight) the gradient goes the usual way.

    Returns:
        (logp [T], entropy [T]), float32, or float64 where `hidden` is.

    Raises:
        ValueError: see `logprobs.token_logprobs`.
    """
    if not bfloat16 and not support.truncated and len(targets) * len(weight) <= TOKENS * IDS:
        return logprobs.token_logprobs(F.linear(hidden, weight), targets, temperature, support)
    if kept is None:
        kept = kept_ids(hidden, weight, targets, temperature, support, bfloat16)
    parts = _parts(targets, len(weight), support, kept)
    temperatures = _temperatures(temperature, hidden, len(targets))
    return _BlockedLogprobs.apply(hidden, weight, targets, temperatures, parts, bfloat16, accumulate)


@torch.no_grad()
def kept_ids(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    support: Support,
    bfloat16: bool = False,
) -> list[Tensor] | None:
    """Return what `logprobs.kept_ids` keeps for each target, a bit an id, or None where nothing is truncated.

    Takes T V / 8 bytes at most, and works on `SORTED` logits at a time.

    Returns:
        For each part of the support uint8 [targets in it, ids of it / 8 rounded up], the lowest bit first.
    """
    if not support.truncated:
        return None
    temperatures = _temperatures(temperature, hidden, len(targets))
    found = []
    for rows, first, last in support.rows(targets, len(weight)):
        packed = torch.zeros(len(rows), -(-(last - first) // 8), dtype=torch.uint8, device=hidden.device)
        count = max(1, SORTED // (last - first))
        for bits, part in zip(packed.split(count), rows.split(count), strict=True):
            if len(part):
                block = _Block(hidden[part], targets[part], temperatures[part], bfloat16)
                kept = logprobs.kept_ids(block.logits(weight, first, last), targets[part] - first, support)
                bits.copy_(_pack(kept))
        found.append(packed)
    return found


def _parts(targets: Tensor, size: int, support: Support, kept: Sequence[Tensor] | None) -> list[Part]:
    ranges = list(support.rows(targets, size))
    return [Part(*part, bits) for part, bits in zip(ranges, kept or [None] * len(ranges), strict=True)]


def _temperatures(temperature: float | Tensor, hidden: Tensor, tokens: int) -> Tensor:
    """[tokens], in the type of the sums."""
    return torch.as_tensor(temperature, dtype=_sum_type(hidden), device=hidden.device).expand(tokens)


def _sum_type(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _BlockedLogprobs(torch.autograd.Function):
    """The arguments of `apply` below -> (logp, entropy)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        parts: list[Part],
        bfloat16: bool,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, normalizer = (
            torch.zeros(len(targets), dtype=_sum_type(hidden), device=hidden.device) for _ in range(3)
        )
        for rows, first, last, kept in _token_blocks(parts):
            block = _Block(hidden[rows], targets[rows], temperatures[rows], bfloat16)
            logp[rows], entropy[rows], normalizer[rows] = block.normalised(weight, first, last, kept)
        ctx.save_for_backward(hidden, weight, targets, temperatures, normalizer, entropy)
        ctx.parts, ctx.bfloat16 = parts, bfloat16
        ctx.accumulate = accumulate and _can_accumulate(weight, _sum_type(hidden))
        ctx.set_materialize_grads(False)  # None for what the loss does not have
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperatures, normalizer, entropy = ctx.saved_tensors
        grad_logp = torch.zeros_like(normalizer) if grad_logp is None else grad_logp
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _gradient_of(weight, normalizer.dtype, ctx.accumulate) if ctx.needs_input_grad[1] else None
        for rows, first, last, kept in _token_blocks(ctx.parts):
            block = _Block(hidden[rows], targets[rows], temperatures[rows], ctx.bfloat16)
            scale = (grad_logp[rows] / temperatures[rows]).to(normalizer.dtype).unsqueeze(1)
            for start, end in _id_blocks(first, last):
                logits = block.logits(weight, start, end, _unpack(kept, start - first, end - first))
                logprobs_ = logits.sub_(normalizer[rows].unsqueeze(1))
                # d logp / d logit = (one-hot of the target - softmax) / temperature
                factor = -scale
                if grad_entropy is not None:  # d entropy / d logit = -softmax (log softmax + entropy) / temperature
                    own = (grad_entropy[rows] / temperatures[rows]).unsqueeze(1)
                    factor = (logprobs_ + entropy[rows].unsqueeze(1)).mul_(-own).sub_(scale)
                grad = logprobs_.exp_().mul_(factor)
                inside = block.inside(start, end)
                grad[inside, block.targets[inside] - start] += scale.squeeze(1)[inside]
                grad = grad.to(block.hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += float32.product(grad, weight[start:end].to(grad.dtype))
                if grad_weight is not None:
                    grad_weight[start:end] += float32.product(grad.T, block.hidden)
        if ctx.accumulate:
            grad_weight = None
        grads = (
            None if grad is None else grad.to(x.dtype) for grad, x in ((grad_hidden, hidden), (grad_weight, weight))
        )
        return (*grads, None, None, None, None, None)


def _can_accumulate(weight: Tensor, dtype: torch.dtype) -> bool:
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.is_leaf and weight.requires_grad and weight.dtype == dtype and not hooks


def _gradient_of(weight: Tensor, dtype: torch.dtype, accumulate: bool) -> Tensor:
    """What the blocks of the weight's gradient are added to."""
    if not accumulate:
        return torch.zeros_like(weight, dtype=dtype)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Block:
    """The arithmetic of at most TOKENS tokens."""

    def __init__(self, hidden: Tensor, targets: Tensor, temperatures: Tensor, bfloat16: bool) -> None:
        self.hidden = hidden.to(torch.bfloat16 if bfloat16 else temperatures.dtype)
        self.targets, self.temperatures, self.dtype = targets, temperatures.unsqueeze(1), temperatures.dtype

    def logits(self, weight: Tensor, start: int, end: int, kept: Tensor | None = None) -> Tensor:
        """[tokens, end - start], divided by the temperature; `LEFT_OUT` where bool `kept` is false."""
        scaled = float32.logits(self.hidden, weight[start:end].to(self.hidden.dtype)).div_(self.temperatures)
        return scaled if kept is None else scaled.masked_fill_(~kept, LEFT_OUT)

    def inside(self, start: int, end: int) -> Tensor:
        """Places of the tokens whose target is one of the ids start..end-1."""
        return ((self.targets >= start) & (self.targets < end)).nonzero().squeeze(1)

    def normalised(self, weight: Tensor, first: int, last: int, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the targets, entropy and log-sum-exp over first..last-1, by one pass over the blocks.

        Keeps the largest logit m so far, s = sum exp(l - m) and u = sum exp(l - m) (l - m), so that the log-sum-exp is
        m + log s and the entropy log s - u / s.
        """
        largest = torch.full_like(self.targets, torch.finfo(self.dtype).min, dtype=self.dtype)
        total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
        for start, end in _id_blocks(first, last):
            logits = self.logits(weight, start, end, _unpack(kept, start - first, end - first))
            inside = self.inside(start, end)
            chosen[inside] = logits[inside, self.targets[inside] - start]
            new = torch.maximum(largest, logits.amax(1))
            shift = largest - new
            shrink = shift.exp()
            logits.sub_(new.unsqueeze(1))
            weights = logits.exp()
            block_total = weights.sum(1)
            weighted = shrink * (weighted + shift * total) + weights.mul_(logits).sum(1)
            total = shrink * total + block_total
            largest = new
        normalizer = largest + total.log()
        return chosen - normalizer, total.log() - weighted / total, normalizer


def _pack(kept: Tensor) -> Tensor:
    """bool [R, N] as uint8 [R, N / 8 rounded up], the lowest bit first."""
    eights = F.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), -1, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor | None, start: int, end: int) -> Tensor | None:
    """bool [R, end - start] of what `_pack` packed, or None of None."""
    if packed is None:
        return None
    first = start // 8
    bytes_ = packed[:, first : -(-end // 8)].unsqueeze(-1)
    bits = (bytes_ >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1)[:, start - 8 * first : end - 8 * first].bool()


def _token_blocks(parts: list[Part]) -> Iterator[Part]:
    for rows, first, last, kept in parts:
        pieces = rows.split(TOKENS)
        for piece, bits in zip(pieces, [None] * len(pieces) if kept is None else kept.split(TOKENS), strict=True):
            if len(piece):
                yield Part(piece, first, last, bits)


def _id_blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, IDS):
        yield start, min(start + IDS, last)
