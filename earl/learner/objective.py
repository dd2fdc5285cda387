"""The mathematics of the loss: KL estimates, policy gradient, ratios, corrections, and which tokens count.

Imports torch alone, knows nothing of files, models or configuration, and keeps no state, so that every formula can be
checked on a handful of numbers; so do its neighbours `advantage` and `logprobs`. Token tensors are flat: T counts the
completion tokens of any set of episodes, in any order, which makes every function below indifferent to how episodes
were batched or padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Variants of the loss. The defaults are the spec's objective: on-policy GRPO with k3.

    Two fields correct for tokens that another policy sampled, and each does so by pi / mu, pi the policy that learns
    and mu the one that sampled: `ratio` with a gradient through it, `correction` "truncate" without. Both at once would
    weigh by (pi / mu)^2. The estimator "weighted_k3" weighs the KL term by that ratio, without a bound, and a
    correction is there to bound it or to leave it out.
    """

    kl_estimator: str = "k3"  # see kl_estimate
    ratio: bool = False  # see ratio_loss; False: see policy_gradient_loss
    of_sequences: bool = False  # the ratio is that of whole sequences, see sequence_ratio, and no token's own
    clip_low: float | None = None
    clip_high: float | None = None
    correction: str = "none"  # "truncate": see truncated_weights; "filter": see geometric_mean_filter
    correction_low: float | None = None
    correction_high: float | None = None

    def __post_init__(self) -> None:
        if self.ratio and self.correction == "truncate":
            raise ValueError("an importance ratio and truncated weights count the same correction twice")
        if self.kl_estimator == "weighted_k3" and self.correction != "none":
            raise ValueError(f"weighted_k3 takes the ratios as they are, which the correction {self.correction} bounds")


SPEC = Options()


def kl_estimate(
    logp: Tensor, reference_logp: Tensor, estimator: str, behavior_logprobs: Tensor | None = None
) -> Tensor:
    """Estimate of KL(policy || reference) from sampled tokens, with d = reference - policy.

    Tokens that the policy itself has sampled:

    "k1"   -d: unbiased as a value, negative for some tokens. As a loss term its expected gradient is 0 (the score
           function's mean), so it only adds noise; it is for reading, or for showing just that.
    "k2"   d^2 / 2: biased as a value; its expected gradient is that of KL(policy || reference).
    "k3"   exp(d) - 1 - d: unbiased as a value, never negative; its expected gradient is that of
           KL(reference || policy), which agrees with the others near d = 0. The loss term of GRPO.
    "k3+"  the value of k3 with the gradient of k2, both unbiased (verl's estimator of that name: a straight-through
           term).

    Tokens that another policy has sampled, `behavior_logprobs` being its log-probs:

    "weighted_k3"  w k3 with w = exp(policy - behaviour), the gradient flowing through both: value and gradient are
                   unbiased whoever sampled, since the mean of w f under the sampler is that of f under the policy
                   (DeepSeek-V3.2, 2025, arXiv:2512.02556; TRL's `use_bias_correction_kl`). Its gradient is -w d
                   times that of the log-prob: k2's, weighed.

    Values: Schulman, "Approximating KL divergence", 2020. Gradients: Tang & Munos 2025, arXiv:2506.09477.

    Returns:
        [T] in nats, differentiable in `logp`.
    """
    difference = reference_logp - logp
    if estimator == "k1":
        return -difference
    k2 = difference.square() / 2
    if estimator == "k2":
        return k2
    k3 = torch.expm1(difference) - difference
    if estimator == "k3+":
        return k2 + (k3 - k2).detach()
    return token_ratio(logp, behavior_logprobs) * k3 if estimator == "weighted_k3" else k3


def policy_gradient_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A_t * logp_t, [T]: the policy gradient for tokens that the policy itself has sampled."""
    return -advantages.to(logp.dtype) * logp


def ratio_loss(ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """-min(ratio_t * A_t, clip(ratio_t, 1 - low, 1 + high) * A_t), [T]; see `token_ratio` and `sequence_ratio`.

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with separate bounds (DAPO, Yu et al. 2025,
    arXiv:2503.14476); None does not clip on that side. At ratio 1 its gradient is that of `policy_gradient_loss`.
    """
    advantages = advantages.to(ratio.dtype)
    clipped = ratio.clamp(*_clip_bounds(clip_low, clip_high))
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """(low, high), bool [T] each: tokens of `ratio_loss` without a gradient, as their ratio is beyond that bound.

    A ratio too low has none where A < 0, one too high where A > 0; elsewhere the minimum is the unclipped term.
    """
    low, high = _clip_bounds(clip_low, clip_high)
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def importance_ratio(logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor | None, options: Options) -> Tensor:
    """The ratio of policy to sampler that `options` choose, of each token or of its sequence, [T]."""
    if options.of_sequences:
        return sequence_ratio(logp, behavior_logprobs, sequences)
    return token_ratio(logp, behavior_logprobs)


def token_ratio(logp: Tensor, behavior_logprobs: Tensor) -> Tensor:
    """exp(logp_t - behaviour log-prob_t), [T]."""
    return torch.exp(logp - behavior_logprobs)


def sequence_ratio(logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor) -> Tensor:
    """exp(mean over the token's sequence of (logp - behaviour log-prob)), [T]: the ratio of GSPO.

    (Zheng et al. 2025, arXiv:2507.18071.) The geometric mean of the tokens' ratios, which does not grow with the length
    of a sequence, unlike the product. All tokens of a sequence are clipped together. Its gradient is shared out evenly
    over them, so with `loss_normalization` "sequences" the loss is GSPO's.

    Args:
        sequences: int64 [T], sequence of each token; all counted tokens of a sequence must be there.
    """
    difference = logp - behavior_logprobs
    zeros = difference.new_zeros(int(sequences.max()) + 1)
    count = zeros.index_add(0, sequences, torch.ones_like(difference)).clamp(min=1.0)
    return (zeros.index_add(0, sequences, difference) / count).exp()[sequences]


def _clip_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    return 0.0 if clip_low is None else 1 - clip_low, float("inf") if clip_high is None else 1 + clip_high


def truncated_weights(logp: Tensor, behavior_logprobs: Tensor, high: float) -> Tensor:
    """min(exp(logp - behaviour log-prob), high) token by token, detached, [T], >= 0.

    Truncated importance sampling (Ionides 2008; for samplers and learners of unequal arithmetic Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). Never the product over a sequence: a mean
    difference of 0.012 nats is a factor 3.3 after 100 tokens.
    """
    return token_ratio(logp.detach(), behavior_logprobs).clamp(max=high)


def geometric_mean_filter(
    logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor, low: float, high: float
) -> Tensor:
    """bool [T]: True where the geometric mean of the token's sequence's ratios lies in low..high.

    That is `sequence_ratio`, here to leave a sequence out and not to weigh it.

    Args:
        sequences: as there.
    """
    mean = sequence_ratio(logp.detach().double(), behavior_logprobs.double(), sequences)
    return (mean >= low) & (mean <= high)


def corrected_tokens(logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor, options: Options) -> Tensor:
    """bool [T]: tokens whose weight `correction` has truncated, or whose sequence it has left out."""
    if options.correction == "truncate":
        return token_ratio(logp.detach(), behavior_logprobs) > options.correction_high
    bounds = options.correction_low, options.correction_high
    return ~geometric_mean_filter(logp, behavior_logprobs, sequences, *bounds)


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    denominator: int,
    reference_logp: Tensor | None = None,
    kl_coeff: float = 0.0,
    mask: Tensor | None = None,
    *,
    behavior_logprobs: Tensor | None = None,
    sequences: Tensor | None = None,
    lengths: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coeff: float = 0.0,
    options: Options = SPEC,
) -> Tensor:
    """sum_t mask_t / length_t * (policy_t + kl_coeff * kl_t - entropy_coeff * entropy_t) / denominator.

    By default policy_t = -A_t * logp_t, kl_t = k3 and no lengths: the on-policy GRPO loss of nano-aha-moment. `options`
    choose the others; a correction weighs or masks policy_t alone and leaves the denominator as it is.

    The denominator is of *all* episodes of the optimizer step, not of this batch (see `loss_denominator`), so that the
    sum over any split into micro-batches, shards or ranks is the same loss with the same gradient.

    Args:
        logp: [T] differentiable log-probabilities of the sampled tokens.
        advantages: [T], the advantage of the token's episode.
        reference_logp: [T] under the frozen reference, or None when kl_coeff is 0.
        mask: [T], 1 where the token counts; None where tokens that do not were left out beforehand.
        behavior_logprobs: [T] under the policy that sampled, needed by `ratio`, `correction` and "weighted_k3".
        sequences: int64 [T], needed by the correction "filter" and by ratios `of_sequences`.
        lengths: [T], length of the token's episode (as of `loss_denominator`), to weigh episodes equally; None weighs
            tokens equally.
        entropy: [T] differentiable entropies of the policy where the tokens were sampled, or None when entropy_coeff is
            0. A bonus for whoever explores (Williams & Peng 1991; A3C, Mnih et al. 2016).

    Returns:
        scalar.
    """
    per_token = policy_term(logp, advantages, behavior_logprobs, sequences, options)
    if reference_logp is not None and kl_coeff != 0.0:
        per_token = per_token + kl_coeff * kl_estimate(logp, reference_logp, options.kl_estimator, behavior_logprobs)
    if entropy is not None and entropy_coeff != 0.0:
        per_token = per_token - entropy_coeff * entropy
    return normalized(per_token, denominator, lengths, mask)


def policy_term(
    logp: Tensor,
    advantages: Tensor,
    behavior_logprobs: Tensor | None = None,
    sequences: Tensor | None = None,
    options: Options = SPEC,
) -> Tensor:
    """policy_t of `grpo_loss`, [T]: the loss without its KL term, weighed or masked by the correction."""
    if options.ratio:
        ratio = importance_ratio(logp, behavior_logprobs, sequences, options)
        per_token = ratio_loss(ratio, advantages, options.clip_low, options.clip_high)
    else:
        per_token = policy_gradient_loss(logp, advantages)
    if options.correction == "truncate":
        return per_token * truncated_weights(logp, behavior_logprobs, options.correction_high)
    if options.correction == "filter":
        bounds = options.correction_low, options.correction_high
        return per_token * geometric_mean_filter(logp, behavior_logprobs, sequences, *bounds)
    return per_token


def normalized(
    per_token: Tensor, denominator: int, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """sum_t mask_t / length_t * per_token_t / denominator, with the arguments of `grpo_loss`. Scalar."""
    if lengths is not None:
        per_token = per_token / lengths
    return (per_token if mask is None else per_token * mask).sum() / denominator


def loss_denominator(normalization: str, lengths: Sequence[int], max_tokens: int) -> int:
    """What the summed loss of an optimizer step is divided by.

    "tokens"     the tokens in `lengths`: every token weighs the same (the spec; DAPO's token-level loss).
    "sequences"  the episodes with any, the loss of each divided by its length: every episode weighs the same (the GRPO
                 paper).
    "constant"   episodes * max_tokens, the longest completion allowed: no weight depends on a length (Dr. GRPO, Liu et
                 al. 2025, arXiv:2503.20783), nor on which tokens train.

    Args:
        lengths: of every episode of the whole step, its tokens of the kind that trains (`kind_mask`), forced ones
            included: all of its completion unless the iteration trains text or visual tokens only.
        max_tokens: longest completion that the sampler may write.
    """
    if normalization == "constant":
        return len(lengths) * max_tokens
    return sum(lengths) if normalization == "tokens" else sum(length > 0 for length in lengths)


def sft_loss(logp: Tensor, denominator: int) -> Tensor:
    """Cross-entropy: minus the log-probs [T] of the targets, summed and divided by `denominator`. Scalar."""
    return -logp.sum() / denominator


def dpo_margins(logp: Tensor, reference_logp: Tensor, sequences: Tensor, beta: float) -> Tensor:
    """beta * (log-ratio of a pair's better completion - that of its worse one), [P], each summed over its tokens.

    The log-ratio is log policy - log reference, beta times it the implicit reward of DPO (Rafailov et al. 2023,
    arXiv:2305.18290).

    Args:
        logp: [T] differentiable log-probabilities of all tokens of P pairs.
        reference_logp: [T] under the frozen reference.
        sequences: int64 [T], completion of each token: 2p the better one of pair p, 2p + 1 the worse one.
    """
    completions = torch.arange(int(sequences.max()) + 1, device=logp.device)
    ratios = ((logp - reference_logp) * (sequences == completions[:, None])).sum(1)
    return beta * (ratios[0::2] - ratios[1::2])


def dpo_loss(margins: Tensor, denominator: int) -> Tensor:
    """-log sigmoid of the margins [P], summed and divided by `denominator`, the pairs of the whole step. Scalar."""
    return -F.logsigmoid(margins).sum() / denominator


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


def kind_mask(targets: Tensor, visual_range: tuple[int, int], counted: str) -> Tensor:
    """bool [T]: True where a completion token is of the kind that trains, as `counted_tokens` says.

    A token is visual or text by its id: ends of rows and of the image are text, as is the reasoning.
    """
    visual = (targets >= visual_range[0]) & (targets < visual_range[1])
    return {"all": torch.ones_like(visual), "text": ~visual, "visual": visual}[counted]


def token_mask(targets: Tensor, forced: Tensor, visual_range: tuple[int, int], counted: str) -> Tensor:
    """bool [T]: True where a completion token counts in the sum of the loss.

    A token that the sampler was forced to emit was no choice of the policy (its behaviour log-prob is 0) and never
    counts; of the others, those of the kind that trains (`kind_mask`).
    """
    return kind_mask(targets, visual_range, counted) & ~forced
