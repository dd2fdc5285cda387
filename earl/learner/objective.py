"""The mathematics of the learner: advantages, token log-probabilities, KL estimate and losses.

Imports torch alone, knows nothing of files, models or configuration, and keeps no state, so that every formula can be
checked on a handful of numbers. Token tensors are flat: T counts the completion tokens of any set of episodes, in any
order, which makes every function below indifferent to how episodes were batched or padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ADVANTAGE_EPSILON = 1e-4


def group_advantages(rewards: Tensor, groups: Tensor, used: Tensor, divide_by_std: bool = True) -> Tensor:
    """Advantage of each episode relative to the other samples of its prompt.

    A = (r - mean) / (std + 1e-4) with the mean and *population* standard deviation of the used episodes of the group
    (GRPO, Shao et al. 2024, arXiv:2402.03300; the epsilon and the population form are those of nano-aha-moment).
    Without the division A = r - mean (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783): a group whose rewards hardly
    differ then weighs little instead of as much as any other.

    Args:
        rewards: float [N], any unit; values of unused episodes are ignored.
        groups: int64 [N], group index 0..G-1 of each episode.
        used: bool [N], False for an episode that must influence neither its group nor the loss.

    Returns:
        float64 [N], in units of the rewards where they are not divided; 0 for unused episodes, for groups of one and
        for groups whose rewards are all equal.
    """
    rewards = torch.where(used, rewards.double(), 0.0)
    weight = used.double()
    zeros = torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=rewards.device)
    count = zeros.index_add(0, groups, weight).clamp(min=1.0)
    mean = zeros.index_add(0, groups, rewards) / count
    deviation = (rewards - mean[groups]) * weight
    if not divide_by_std:
        return deviation
    std = (zeros.index_add(0, groups, deviation**2) / count).sqrt()
    return deviation / (std[groups] + ADVANTAGE_EPSILON)


def zero_std_groups(rewards: Tensor, groups: Tensor, used: Tensor) -> Tensor:
    """bool [G]: True where the used rewards of a group are all equal, or fewer than two are used.

    Such a group has no preference to teach: its advantages are 0 whatever the epsilon.
    """
    size = int(groups.max()) + 1
    low = torch.full((size,), float("inf"), dtype=torch.float64, device=rewards.device)
    kept, index = rewards.double()[used], groups[used]
    highest = (-low).scatter_reduce(0, index, kept, "amax")
    lowest = low.scatter_reduce(0, index, kept, "amin")
    return highest <= lowest


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, visual_range: tuple[int, int], split_vocab: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature) over its support, and the entropy there.

    With `split_vocab` a visual target is normalised over the visual ids and any other target over the ids below the
    first visual one (the reference's `separate_language_and_vision_vocabs`, and what a grid-constrained sampler
    samples from); without it every target is normalised over the whole vocabulary.

    Args:
        logits: [T, V], any float type; the arithmetic is in float32, or float64 where the logits are.
        targets: int64 [T], ids 0..V-1.
        temperature: > 0.
        visual_range: [first, last) ids of the visual tokens.

    Returns:
        (logp [T] in nats, <= 0; entropy [T] in nats, >= 0, detached: it is a metric here, not part of a loss).

    Raises:
        ValueError: `split_vocab` and a target at or above the end of the visual range: it is in neither support.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits / temperature
    if not split_vocab:
        return _logprob_and_entropy(logits, targets)
    first, last = visual_range
    if bool((targets >= last).any()):
        raise ValueError(f"target id {int(targets.max())} lies above the visual ids {first}..{last - 1}")
    is_visual = targets >= first
    visual, text = is_visual.nonzero().squeeze(1), (~is_visual).nonzero().squeeze(1)
    visual_logp, visual_entropy = _logprob_and_entropy(logits[visual, first:last], targets[visual] - first)
    text_logp, text_entropy = _logprob_and_entropy(logits[text, :first], targets[text])
    # index_copy keeps the autograd path of both supports and restores the order of the targets.
    zeros = logits.new_zeros(len(targets))
    logp = zeros.index_copy(0, visual, visual_logp).index_copy(0, text, text_logp)
    entropy = zeros.index_copy(0, visual, visual_entropy).index_copy(0, text, text_entropy)
    return logp, entropy


def _logprob_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    detached = logprobs.detach()
    # An id masked to -inf has probability 0 and adds nothing; without the clamp it would add 0 * inf = NaN.
    entropy = -(detached.exp() * detached.clamp(min=torch.finfo(detached.dtype).min)).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def k3_kl(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from tokens sampled by the policy: exp(d) - 1 - d, d = reference - policy.

    The k3 estimator (Schulman, "Approximating KL divergence", 2020; used as a loss term by GRPO): unbiased as a
    value, never negative. [T] nats, differentiable in `logp`.
    """
    difference = reference_logp - logp
    return torch.expm1(difference) - difference


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    denominator: int,
    reference_logp: Tensor | None = None,
    kl_coeff: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """sum_t mask_t * (-A_t * logp_t + kl_coeff * k3_t) / denominator, the on-policy GRPO loss of nano-aha-moment.

    The denominator is the number of completion tokens of the *whole iteration*, not of this batch, so that the sum
    over any split into micro-batches, shards or ranks is the same loss with the same gradient.

    Args:
        logp: [T] differentiable log-probabilities of the sampled tokens.
        advantages: [T], the advantage of the token's episode.
        reference_logp: [T] under the frozen reference, or None when kl_coeff is 0.
        mask: [T], 1 where the token counts; None where tokens that do not were left out beforehand.

    Returns:
        scalar.
    """
    per_token = -advantages.to(logp.dtype) * logp
    if reference_logp is not None and kl_coeff != 0.0:
        per_token = per_token + kl_coeff * k3_kl(logp, reference_logp)
    return (per_token if mask is None else per_token * mask).sum() / denominator


def sft_loss(logits: Tensor, targets: Tensor, denominator: int) -> Tensor:
    """Cross-entropy over the whole vocabulary, summed over the targets [T] and divided by `denominator`. Scalar."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / denominator


def counted_tokens(iteration: int, text_only: tuple[int, int] | None, vision_only: tuple[int, int] | None) -> str:
    """Which completion tokens count in an iteration: "all", "text" or "visual".

    Args:
        iteration: 1 is the first that trains.
        text_only: (steps, cycle_steps) of text-only training, or None. The first `steps` iterations of every cycle
            train text tokens only, the others visual tokens only.
        vision_only: likewise; the first `steps` train visual tokens only, the others all tokens.

    Raises:
        ValueError: both are given: they contradict each other.
    """
    if text_only is not None and vision_only is not None:
        raise ValueError("text-only and vision-only training exclude each other")
    if text_only is not None:
        return "text" if _in_first_part(iteration, *text_only) else "visual"
    if vision_only is not None:
        return "visual" if _in_first_part(iteration, *vision_only) else "all"
    return "all"


def _in_first_part(iteration: int, steps: int, cycle_steps: int) -> bool:
    return (iteration - 1) % cycle_steps < steps


def token_mask(targets: Tensor, forced: Tensor, visual_range: tuple[int, int], counted: str) -> Tensor:
    """bool [T]: True where a completion token counts in the loss.

    A token that the sampler was forced to emit was no choice of the policy (its behaviour log-prob is 0) and never
    counts; of the others, all, only text ids or only visual ids, as `counted_tokens` says.
    """
    visual = (targets >= visual_range[0]) & (targets < visual_range[1])
    kinds = {"all": torch.ones_like(visual), "text": ~visual, "visual": visual}
    return kinds[counted] & ~forced
