"""The learning loop of one iteration: scored episodes in, one or more optimizer steps on the policy.

Reads top to bottom: `train_iteration` is the loop, what it calls stands below it in the order of the calls. The
formulas are in `objective`, the log-probs in `head`, the rewards in `rewards`, files in `earl.stages.train`.

Each of several ranks (see `ranks`) runs this loop over its share of the micro-batches. The denominator of the loss is
that of all of them, gradients are summed, and so are the totals: the step is the same for any number of ranks.

Nothing here is random: dropout is off, mini-batches are cut in the order of the group ids (their prompts were drawn at
random), and the order of the episodes is that of their lengths and ids.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from earl.emu3 import adapter
from earl.execution.ranks import Ranks, alone
from earl.learner import attention, head, objective, sharding, signal
from earl.learner.batches import Episode, MicroBatch, length, micro_batches, mini_batches, rounds_of
from earl.learner.performance import Clock
from earl.learner.settings import AdamW, Settings
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

MAX_GRADIENT_NORM = 1.0
SHOWN = 5
"""Tokens that a failed parity check prints."""


class TokenPair(NamedTuple):
    """A token as the sampler and as the learner see it, before any step; ordered by how much they differ."""

    difference: float  # absolute, in nats
    episode_id: str
    position: int  # in the completion
    sampler: float  # behaviour log-prob
    learner: float


@dataclass
class Totals:
    """Sums over the counted tokens of an iteration, each under the policy before the step that the token takes part in.

    The mismatch is of the first step's tokens alone: later ones meet a policy that no longer is the one that sampled.
    It is of the log-probs as they are, before anything is clipped, truncated or left out.
    """

    loss: float = 0.0
    policy_loss: float = 0.0
    kl_loss: float = 0.0
    entropy_loss: float = 0.0
    tokens: int = 0
    active: int = 0  # tokens of the kind that trains, forced ones included
    entropy: float = 0.0
    logp: float = 0.0
    reference_logp: float = 0.0
    kl: float = 0.0
    clipped_low: int = 0
    clipped_high: int = 0
    corrected: int = 0
    mismatch_tokens: int = 0
    mismatch: float = 0.0
    mismatch_max: float = 0.0
    mismatch_kl: float = 0.0
    weight: float = 0.0
    squared_weight: float = 0.0
    widest: list[TokenPair] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    gradient_cosines: list[float] = field(default_factory=list)  # of steps whose halves have one; see signal

    def metrics(self, settings: Settings, with_kl: bool) -> dict[str, float | int | None]:
        """Means in nats a counted token, fractions of the counted tokens; None for what the objective does not have.

        Losses, gradient norm and cosine are means over the optimizer steps: `loss` = `policy_loss` + `kl_loss` +
        `entropy_loss`, the latter two with their coefficients. `kl` is k3 and `kl_k1` k1, whatever the loss has.
        `active_tokens` are what the normalization "tokens" divides by: those that count and those that were forced.
        `gradient_cosine` is that of `signal.Halves`. Of the mismatch, `logprob_mismatch_kl` is k3 of KL(sampler ||
        learner), and `effective_sample_size` (sum w)^2 / (n sum w^2), w the importance ratios: 1 where all are equal, 1
        / n where one token outweighs all others (Kish 1965). Where no step was done, nothing is known.
        """
        tokens, first, steps = self.tokens, self.mismatch_tokens, len(self.gradient_norms)
        ratio, corrects = settings.options.ratio, settings.options.correction != "none"
        return {
            "loss": _mean(self.loss, steps),
            "policy_loss": _mean(self.policy_loss, steps),
            "kl_loss": _mean(self.kl_loss, steps if with_kl else 0),
            "entropy_loss": _mean(self.entropy_loss, steps if settings.entropy_coeff else 0),
            "entropy": _mean(self.entropy, tokens),
            "logprob_mean": _mean(self.logp, tokens),
            "reference_logprob_mean": _mean(self.reference_logp, tokens if with_kl else 0),
            "kl": _mean(self.kl, tokens if with_kl else 0),
            "kl_k1": _mean(self.logp - self.reference_logp, tokens if with_kl else 0),
            "gradient_norm": _mean(sum(self.gradient_norms), steps),
            "gradient_cosine": _mean(sum(self.gradient_cosines), len(self.gradient_cosines)),
            "clip_fraction_low": _mean(self.clipped_low, tokens if ratio else 0),
            "clip_fraction_high": _mean(self.clipped_high, tokens if ratio else 0),
            "corrected_fraction": _mean(self.corrected, tokens if corrects else 0),
            "logprob_mismatch_mean": _mean(self.mismatch, first),
            "logprob_mismatch_max": self.mismatch_max if first else None,
            "logprob_mismatch_kl": _mean(self.mismatch_kl, first),
            "effective_sample_size": _mean(self.weight**2, first * self.squared_weight),
            "counted_tokens": tokens,
            "active_tokens": self.active,
            "steps": steps,
        }


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def total_of(parts: Sequence[Totals]) -> Totals:
    """Return the sums over the tokens of all parts, of ranks or of optimizer steps."""
    total = Totals()
    for part in parts:
        for name, value in vars(part).items():
            setattr(total, name, getattr(total, name) + value)  # numbers add up, lists follow one another
    total.mismatch_max = max(part.mismatch_max for part in parts)
    total.widest = sorted(total.widest, reverse=True)[:SHOWN]
    return total


def new_optimizer(policy: "Emu3ForCausalLM", learning_rate: float, adamw: AdamW | None = None) -> torch.optim.AdamW:
    """AdamW over all weights that are trained; those with one dimension, norms and biases, do not decay."""
    adamw = adamw or AdamW()
    weights = sharding.trained(policy).values()
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": adamw.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # In one pass over each weight: the other two make copies of all of them, or take their time where ranks share them.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=adamw.betas, eps=adamw.eps, fused=True)


def train_iteration(
    policy: "Emu3ForCausalLM",
    reference: "Emu3ForCausalLM | None",
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    settings: Settings,
    description: str = "train",
    team: Ranks | None = None,
    clock: Clock | None = None,
) -> dict[str, float | int | None]:
    """Do the optimizer steps of an iteration; change `policy` and `optimizer`, return the metrics of `Totals`.

    Args:
        policy: float32 weights; computes in bfloat16 where the settings say so.
        reference: the frozen initial model, or `policy` itself where an adapter is trained, without which it is the
            initial model; None when kl_coeff is 0.
        episodes: the used episodes of the whole iteration, the same on all ranks; each takes part in one step. Where
            there are none, no step is done and nothing changes.
        team: the ranks, each of which calls this and gets the same metrics; None: this process alone.
        clock: takes the seconds of each phase.

    Raises:
        EarlError: no token counts in a step, its loss or gradient is not finite, or the learner's log-probs are not the
            sampler's (see check_parity); nothing must be kept then.
    """
    team, clock = team or alone(policy.device), clock or Clock(policy.device)
    totals = Totals()
    if settings.learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate
    with ready_to_learn(policy, settings):
        for step, part in enumerate(mini_batches(episodes, settings.optimizer_steps)):
            optimizer.zero_grad(set_to_none=True)
            lengths = [length(episode, settings) for episode in part]
            denominator = objective.loss_denominator(settings.normalization, lengths, settings.max_completion_tokens)
            seen = Totals()
            # Of padded micro-batches, which are cut by length, every half would have a part of each group.
            halves = signal.Halves(policy, rounds_of(part, settings, team) if settings.packed else 0)
            for batch, counts in micro_batches(part, settings, team, description):
                with clock.phase("forward"):
                    logp, entropy, kept = completion_logprobs(policy, batch, settings)
                reference_logp = None
                if reference is not None:
                    with clock.phase("reference"), torch.no_grad(), adapter.disabled(reference):
                        reference_logp, _, _ = completion_logprobs(reference, batch, settings, kept)
                loss = batch_loss(logp, entropy, reference_logp, batch, denominator, settings)
                with clock.phase("backward"):
                    (loss if counts else 0 * loss).backward()
                    halves.accumulated()
                if counts:
                    values = loss.detach(), logp.detach(), entropy.detach()
                    add_to(seen, batch, *values, reference_logp, denominator, settings)
                    if step == 0:
                        add_mismatch(seen, batch, logp.detach())
            step_totals = total_of(team.gather(seen))
            step_totals.active = sum(lengths)
            if step == 0:
                check_parity(step_totals, settings)
            with clock.phase("step"):
                if (cosine := halves.cosine(team)) is not None:
                    step_totals.gradient_cosines.append(cosine)
                step_totals.gradient_norms.append(optimizer_step(policy, optimizer, step_totals, MAX_GRADIENT_NORM))
            totals = total_of([totals, step_totals])
    return totals.metrics(settings, with_kl=reference is not None)


@contextmanager
def ready_to_learn(policy: "Emu3ForCausalLM", settings: Settings) -> Iterator[None]:
    """Have the policy compute what the sampler sampled from, without dropout, and as the settings say.

    The kernel must stay in place between forward and backward pass, in which layers may be computed again.
    """
    policy.eval()
    if settings.gradient_checkpointing:
        sharding.recompute_layers(policy)
    with attention.used_by(policy, settings.attention):
        yield
    policy.eval()


Logprobs = tuple[Tensor, Tensor, list[Tensor] | None]
"""Log-probability and entropy, float32 [T] each in nats, of the counted tokens, and the ids that they are over
(`head.kept_ids`). The entropy is differentiable where the loss has it."""


def completion_logprobs(
    model: "Emu3ForCausalLM", batch: MicroBatch, settings: Settings, kept: list[Tensor] | None = None
) -> Logprobs:
    """What `model` makes of the counted tokens.

    Args:
        kept: the ids to normalise over, of the policy: its reference has to be seen on the same ones; None finds them
            by `model` itself.
    """
    with attention.used_by(model, settings.attention):
        return sharding.forward(model, _completion_logprobs, batch, settings, kept)


def _completion_logprobs(
    model: "Emu3ForCausalLM", batch: MicroBatch, settings: Settings, kept: list[Tensor] | None
) -> Logprobs:
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
        hidden = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, earl_groups=batch.groups
        ).last_hidden_state
    # The head runs on counted tokens only: with a large vocabulary it is most of the work.
    hidden, weight = hidden.flatten(0, 1)[batch.places], model.lm_head.weight
    tokens = batch.targets, settings.temperature, settings.support, settings.bfloat16
    if kept is None:
        kept = head.kept_ids(hidden, weight, *tokens)
    logp, entropy = head.token_logprobs(hidden, weight, *tokens, kept, accumulate=True)
    return logp, entropy if settings.entropy_coeff else entropy.detach(), kept


def batch_loss(
    logp: Tensor,
    entropy: Tensor,
    reference_logp: Tensor | None,
    batch: MicroBatch,
    denominator: int,
    settings: Settings,
) -> Tensor:
    return objective.grpo_loss(
        logp,
        batch.advantages,
        denominator,
        reference_logp,
        settings.kl_coeff,
        behavior_logprobs=batch.behavior_logprobs,
        sequences=batch.sequences,
        lengths=divided_by(batch, settings),
        entropy=entropy,
        entropy_coeff=settings.entropy_coeff,
        options=settings.options,
    )


def divided_by(batch: MicroBatch, settings: Settings) -> Tensor | None:
    return batch.lengths if settings.normalization == "sequences" else None


def add_to(
    totals: Totals,
    batch: MicroBatch,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    reference_logp: Tensor | None,
    denominator: int,
    settings: Settings,
) -> None:
    options = settings.options
    totals.loss += loss.item()
    policy = objective.policy_term(logp, batch.advantages, batch.behavior_logprobs, batch.sequences, options)
    totals.policy_loss += objective.normalized(policy, denominator, divided_by(batch, settings)).item()
    totals.tokens += len(logp)
    totals.entropy += entropy.double().sum().item()
    if settings.entropy_coeff:
        entropy_loss = objective.normalized(entropy, denominator, divided_by(batch, settings))
        totals.entropy_loss -= settings.entropy_coeff * entropy_loss.item()
    totals.logp += logp.double().sum().item()
    if reference_logp is not None:
        totals.reference_logp += reference_logp.double().sum().item()
        estimate = objective.kl_estimate(logp, reference_logp, options.kl_estimator, batch.behavior_logprobs)
        kl_loss = objective.normalized(estimate, denominator, divided_by(batch, settings))
        totals.kl_loss += settings.kl_coeff * kl_loss.item()
        # Whatever the loss has, this is the better value: never negative, and unbiased after earlier steps, too.
        value = objective.kl_estimate(logp, reference_logp, "weighted_k3", batch.behavior_logprobs)
        totals.kl += value.double().sum().item()
    if options.ratio:
        ratio = objective.importance_ratio(logp, batch.behavior_logprobs, batch.sequences, options)
        low, high = objective.clipped_tokens(ratio, batch.advantages, options.clip_low, options.clip_high)
        totals.clipped_low += int(low.sum())
        totals.clipped_high += int(high.sum())
    if options.correction != "none":
        totals.corrected += int(
            objective.corrected_tokens(logp, batch.behavior_logprobs, batch.sequences, options).sum()
        )


def add_mismatch(totals: Totals, batch: MicroBatch, logp: Tensor) -> None:
    difference = (logp - batch.behavior_logprobs).double()
    mismatch, weights = difference.abs(), difference.clamp(-300, 300).exp()  # whose square is finite and not 0
    totals.mismatch_tokens += len(logp)
    totals.mismatch += mismatch.sum().item()
    totals.mismatch_max = max(totals.mismatch_max, mismatch.max().item())
    # The sampler in the place of the policy: its tokens, and what the learner makes of them.
    totals.mismatch_kl += objective.kl_estimate(batch.behavior_logprobs, logp, "k3").double().sum().item()
    totals.weight += weights.sum().item()
    totals.squared_weight += weights.square().sum().item()
    for place in mismatch.topk(min(SHOWN, len(logp))).indices.tolist():
        totals.widest.append(
            TokenPair(
                mismatch[place].item(),
                batch.episode_ids[batch.sequences[place]],
                batch.positions[place].item(),
                batch.behavior_logprobs[place].item(),
                logp[place].item(),
            )
        )
    totals.widest = sorted(totals.widest, reverse=True)[:SHOWN]


def check_parity(totals: Totals, settings: Settings) -> None:
    """Stop before the first step where the learner computes other log-probs than the sampler did.

    The policy is still the one that sampled, so each ratio must be 1 but for rounding: the mean of the absolute
    differences of log-probs must not exceed `parity_tolerance` nats. None turns the check off.

    Raises:
        EarlError: it does; both sides of the tokens that differ most are printed.
    """
    tolerance = settings.parity_tolerance
    if tolerance is None or not totals.mismatch_tokens:
        return
    mean = totals.mismatch / totals.mismatch_tokens
    if mean <= tolerance:
        return
    rows = "\n".join(
        f"  {pair.episode_id}  {pair.position:8d}  {pair.sampler:10.4f}  {pair.learner:10.4f}" for pair in totals.widest
    )
    raise EarlError(
        f"before the first step the learner's log-probs differ from the sampler's by {mean:.4g} nats on average over "
        f"{totals.mismatch_tokens} counted tokens, more than parity_tolerance = {tolerance}; no step was done.\n"
        f"  episode, token of its completion, log-prob of sampler and of learner, where they differ most:\n{rows}\n"
        "Check that both use the same weights and temperature. Set logprob_support to `sampled` for the support that "
        "the sampler drew from (emu3_use_logit_processor, top_k, top_p); or raise parity_tolerance (null: off)"
    )


def optimizer_step(
    policy: "Emu3ForCausalLM", optimizer: torch.optim.Optimizer, totals: Totals, max_norm: float | None
) -> float:
    """Clip the gradient to `max_norm` (None: not at all) and step; return the norm before clipping.

    Args:
        totals: those of this step.
    """
    if not totals.tokens:
        raise EarlError(
            "no completion token counts in the loss; check train_text_tokens_only, train_vision_tokens_only"
        )
    limit = float("inf") if max_norm is None else max_norm
    total_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit, foreach=True)
    # A DTensor, where weights are split over ranks: what each knows of it is its own part.
    norm = (total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm).item()
    if not np.isfinite(norm) or not np.isfinite(totals.loss):
        raise EarlError(
            f"loss {totals.loss} or gradient norm {norm} is not finite, so no step was done; "
            "look for scores or log-probs out of range, or lower learning_rate"
        )
    optimizer.step()
    return norm
