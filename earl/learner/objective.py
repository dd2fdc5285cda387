"""The mathematics of the learner: advantages, token log-probabilities, KL estimates and losses.

Imports torch alone, knows nothing of files, models or configuration, and keeps no state, so that every formula can be
checked on a handful of numbers. Token tensors are flat: T counts the completion tokens of any set of episodes, in any
order, which makes every function below indifferent to how episodes were batched or padded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ADVANTAGE_EPSILON = 1e-4


@dataclass(frozen=True)
class Options:
    """Variants of the loss. The defaults are the spec's objective: on-policy GRPO with k3.

    Two fields correct for tokens that another policy sampled, and each does so by pi / mu, pi the policy that learns
    and mu the one that sampled: `ratio` with a gradient through it, `correction` "truncate" without. Both at once would
    weigh by (pi / mu)^2.
    """

    kl_estimator: str = "k3"  # "k1", "k2" or "k3": see kl_estimate
    ratio: bool = False  # see ratio_loss; False: see policy_gradient_loss
    clip_low: float | None = None
    clip_high: float | None = None
    correction: str = "none"  # "truncate": see truncated_weights; "filter": see geometric_mean_filter
    correction_low: float | None = None
    correction_high: float | None = None

    def __post_init__(self) -> None:
        if self.ratio and self.correction == "truncate":
            raise ValueError("an importance ratio and truncated weights count the same correction twice")


SPEC = Options()


def group_advantages(rewards: Tensor, groups: Tensor, used: Tensor, kind: str = "mean_std") -> Tensor:
    """Advantage of each episode relative to the other samples of its prompt.

    "mean_std"       A = (r - mean) / (std + 1e-4) with the mean and *population* standard deviation of the used
                     episodes of the group (GRPO, Shao et al. 2024, arXiv:2402.03300; the epsilon and the population
                     form are those of nano-aha-moment).
    "mean"           A = r - mean (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783): a group whose rewards hardly differ
                     then weighs little instead of as much as any other.
    "leave_one_out"  A = r - mean of the *other* used episodes of the group (RLOO, Ahmadian et al. 2024,
                     arXiv:2402.14740), which is n / (n - 1) (r - mean) for a group of n: a baseline that does not
                     depend on the episode's own reward, so the policy gradient stays unbiased.

    Args:
        kind: one of the above.
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
    if kind == "mean":
        return deviation
    if kind == "leave_one_out":
        return deviation * (count / (count - 1).clamp(min=1.0))[groups]
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
    is_visual = visual_targets(targets, visual_range)
    visual, text = is_visual.nonzero().squeeze(1), (~is_visual).nonzero().squeeze(1)
    visual_logp, visual_entropy = _logprob_and_entropy(logits[visual, first:last], targets[visual] - first)
    text_logp, text_entropy = _logprob_and_entropy(logits[text, :first], targets[text])
    # index_copy keeps the autograd path of both supports and restores the order of the targets.
    zeros = logits.new_zeros(len(targets))
    logp = zeros.index_copy(0, visual, visual_logp).index_copy(0, text, text_logp)
    entropy = zeros.index_copy(0, visual, visual_entropy).index_copy(0, text, text_entropy)
    return logp, entropy


def visual_targets(targets: Tensor, visual_range: tuple[int, int]) -> Tensor:
    """bool [T]: True where `split_vocab` normalises over the visual ids, False where over those below them.

    Raises:
        ValueError: a target at or above the end of the visual range: it is in neither support.
    """
    first, last = visual_range
    if bool((targets >= last).any()):
        raise ValueError(f"target id {int(targets.max())} lies above the visual ids {first}..{last - 1}")
    return targets >= first


def _logprob_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    detached = logprobs.detach()
    # An id masked to -inf has probability 0 and adds nothing; without the clamp it would add 0 * inf = NaN.
    entropy = -(detached.exp() * detached.clamp(min=torch.finfo(detached.dtype).min)).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def kl_estimate(logp: Tensor, reference_logp: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) from tokens sampled by the policy, with d = reference - policy.

    "k1"  -d: unbiased as a value, negative for some tokens. As a loss term its expected gradient is 0 (the score
          function's mean), so it only adds noise; it is for reading, or for showing just that.
    "k2"  d^2 / 2: biased as a value; its expected gradient is that of KL(policy || reference).
    "k3"  exp(d) - 1 - d: unbiased as a value, never negative; its expected gradient is that of
          KL(reference || policy), which agrees with the others near d = 0. The loss term of GRPO.

    Values: Schulman, "Approximating KL divergence", 2020. Gradients: Tang & Munos 2025, arXiv:2506.09477.

    Returns:
        [T] in nats, differentiable in `logp`.
    """
    difference = reference_logp - logp
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(difference) - difference


def policy_gradient_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A_t * logp_t, [T]: the policy gradient for tokens that the policy itself has sampled."""
    return -advantages.to(logp.dtype) * logp


def ratio_loss(
    logp: Tensor, behavior_logprobs: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """-min(ratio_t * A_t, clip(ratio_t, 1 - low, 1 + high) * A_t), ratio = exp(logp - behaviour log-prob), [T].

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with separate bounds (DAPO, Yu et al. 2025,
    arXiv:2503.14476); None does not clip on that side. At ratio 1 its gradient is that of `policy_gradient_loss`.
    """
    ratio, advantages = _ratio(logp, behavior_logprobs), advantages.to(logp.dtype)
    clipped = ratio.clamp(*_clip_bounds(clip_low, clip_high))
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_tokens(
    logp: Tensor, behavior_logprobs: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """(low, high), bool [T] each: tokens of `ratio_loss` without a gradient, as their ratio is beyond that bound.

    A ratio too low has none where A < 0, one too high where A > 0; elsewhere the minimum is the unclipped term.
    """
    ratio = _ratio(logp, behavior_logprobs)
    low, high = _clip_bounds(clip_low, clip_high)
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def _ratio(logp: Tensor, behavior_logprobs: Tensor) -> Tensor:
    return torch.exp(logp - behavior_logprobs)


def _clip_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    return 0.0 if clip_low is None else 1 - clip_low, float("inf") if clip_high is None else 1 + clip_high


def truncated_weights(logp: Tensor, behavior_logprobs: Tensor, high: float) -> Tensor:
    """min(exp(logp - behaviour log-prob), high) token by token, detached, [T], >= 0.

    Truncated importance sampling (Ionides 2008; for samplers and learners of unequal arithmetic Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). Never the product over a sequence: a mean
    difference of 0.012 nats is a factor 3.3 after 100 tokens.
    """
    return _ratio(logp.detach(), behavior_logprobs).clamp(max=high)


def geometric_mean_filter(
    logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor, low: float, high: float
) -> Tensor:
    """bool [T]: True where the geometric mean of the token's sequence's ratios lies in low..high.

    exp(mean_t (logp_t - behaviour log-prob_t)) does not grow with the length of a sequence, unlike the product (the
    sequence ratio of GSPO, Zheng et al. 2025, arXiv:2507.18071, here to leave a sequence out and not to weigh it).

    Args:
        sequences: int64 [T], sequence of each token; all counted tokens of a sequence must be there.
    """
    difference = (logp.detach() - behavior_logprobs).double()
    zeros = torch.zeros(int(sequences.max()) + 1, dtype=torch.float64, device=logp.device)
    count = zeros.index_add(0, sequences, torch.ones_like(difference)).clamp(min=1.0)
    mean = (zeros.index_add(0, sequences, difference) / count).exp()
    return ((mean >= low) & (mean <= high))[sequences]


def corrected_tokens(logp: Tensor, behavior_logprobs: Tensor, sequences: Tensor, options: Options) -> Tensor:
    """bool [T]: tokens whose weight `correction` has truncated, or whose sequence it has left out."""
    if options.correction == "truncate":
        return _ratio(logp.detach(), behavior_logprobs) > options.correction_high
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
    options: Options = SPEC,
) -> Tensor:
    """sum_t mask_t / length_t * (policy_t + kl_coeff * kl_t) / denominator.

    By default policy_t = -A_t * logp_t, kl_t = k3 and no lengths: the on-policy GRPO loss of nano-aha-moment. `options`
    choose the others; a correction weighs or masks policy_t alone and leaves the denominator as it is.

    The denominator is of *all* episodes of the optimizer step, not of this batch (see `loss_denominator`), so that the
    sum over any split into micro-batches, shards or ranks is the same loss with the same gradient.

    Args:
        logp: [T] differentiable log-probabilities of the sampled tokens.
        advantages: [T], the advantage of the token's episode.
        reference_logp: [T] under the frozen reference, or None when kl_coeff is 0.
        mask: [T], 1 where the token counts; None where tokens that do not were left out beforehand.
        behavior_logprobs: [T] under the policy that sampled, needed by `ratio` and `correction`.
        sequences: int64 [T], needed by the correction "filter".
        lengths: [T], completion tokens of the token's episode, to weigh episodes equally; None weighs tokens equally.

    Returns:
        scalar.
    """
    if options.ratio:
        per_token = ratio_loss(logp, behavior_logprobs, advantages, options.clip_low, options.clip_high)
    else:
        per_token = policy_gradient_loss(logp, advantages)
    if options.correction == "truncate":
        per_token = per_token * truncated_weights(logp, behavior_logprobs, options.correction_high)
    elif options.correction == "filter":
        bounds = options.correction_low, options.correction_high
        per_token = per_token * geometric_mean_filter(logp, behavior_logprobs, sequences, *bounds)
    if reference_logp is not None and kl_coeff != 0.0:
        per_token = per_token + kl_coeff * kl_estimate(logp, reference_logp, options.kl_estimator)
    if lengths is not None:
        per_token = per_token / lengths
    return (per_token if mask is None else per_token * mask).sum() / denominator


def loss_denominator(normalization: str, episodes: int, completion_tokens: int, max_tokens: int) -> int:
    """What the summed loss of an optimizer step is divided by; all arguments are of the whole step.

    "tokens"     its completion tokens: every token weighs the same (the spec; DAPO's token-level loss).
    "sequences"  its episodes, the loss of each divided by its length: every episode weighs the same (the GRPO paper).
    "constant"   episodes * max_tokens, the longest completion allowed: no weight depends on a length (Dr. GRPO, Liu et
                 al. 2025, arXiv:2503.20783).
    """
    return {"tokens": completion_tokens, "sequences": episodes, "constant": episodes * max_tokens}[normalization]


def sft_loss(logp: Tensor, denominator: int) -> Tensor:
    """Cross-entropy: minus the log-probs [T] of the targets, summed and divided by `denominator`. Scalar."""
    return -logp.sum() / denominator


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
