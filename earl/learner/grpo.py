"""The learning loop of one iteration: scored episodes in, one or more optimizer steps on the policy.

Reads top to bottom: `train_iteration` is the loop, what it calls stands below it in the order of the calls. The
formulas are in `objective`, the log-probs in `head`, the rewards in `rewards`, files in `earl.stages.train`.

Left out on purpose: gradient checkpointing and several ranks. Nothing here is random: dropout is off,
mini-batches are cut in the order of the group ids (their prompts were drawn at random), and the order of the episodes
is that of their lengths and ids.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from earl.errors import EarlError
from earl.learner import head, logprobs, objective, packing

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

MAX_GRADIENT_NORM = 1.0
SHOWN = 5
"""Tokens that a failed parity check prints."""
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know of the configuration."""

    kl_coeff: float
    temperature: float
    micro_batch: int
    visual_range: tuple[int, int]
    support: logprobs.Support  # what log-probs are normalised over
    counted: str  # "all", "text" or "visual": see objective.counted_tokens
    bfloat16: bool
    options: objective.Options = objective.SPEC
    normalization: str = "tokens"  # see objective.loss_denominator
    max_completion_tokens: int = 1  # the constant of the normalization "constant"
    optimizer_steps: int = 1  # mini-batches that the episodes are cut into
    parity_tolerance: float | None = None  # see check_parity
    packed: bool = False  # see packing


@dataclass(frozen=True)
class Episode:
    """One used episode. P prompt tokens, L completion tokens."""

    episode_id: str
    group_id: str
    prompt: np.ndarray  # int64 [P]
    completion: np.ndarray  # int64 [L]
    forced: np.ndarray  # bool [L], the sampler had no choice
    behavior_logprobs: np.ndarray  # float32 [L]
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


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
    tokens: int = 0
    entropy: float = 0.0
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

    def metrics(self, settings: Settings, with_kl: bool) -> dict[str, float | int | None]:
        """Means in nats a counted token, fractions of the counted tokens; None for what the objective does not have.

        Loss and gradient norm are means over the optimizer steps; `kl` is k3, whatever the loss has. Of the mismatch,
        `logprob_mismatch_kl` is k3 of KL(sampler || learner), and `effective_sample_size` (sum w)^2 / (n sum w^2), w
        the importance ratios: 1 where all are equal, 1 / n where one token outweighs all others (Kish 1965).
        """
        tokens, steps, ratio = max(self.tokens, 1), len(self.gradient_norms), settings.options.ratio
        first = max(self.mismatch_tokens, 1)
        return {
            "loss": self.loss / steps,
            "entropy": self.entropy / tokens,
            "kl": self.kl / tokens if with_kl else None,
            "gradient_norm": sum(self.gradient_norms) / steps,
            "clip_fraction_low": self.clipped_low / tokens if ratio else None,
            "clip_fraction_high": self.clipped_high / tokens if ratio else None,
            "corrected_fraction": self.corrected / tokens if settings.options.correction != "none" else None,
            "logprob_mismatch_mean": self.mismatch / first,
            "logprob_mismatch_max": self.mismatch_max,
            "logprob_mismatch_kl": self.mismatch_kl / first,
            "effective_sample_size": self.weight**2 / (first * self.squared_weight),
            "counted_tokens": self.tokens,
            "steps": steps,
        }


def new_optimizer(policy: "Emu3ForCausalLM", learning_rate: float) -> torch.optim.AdamW:
    """AdamW over all parameters, betas (0.9, 0.999), eps 1e-8, no weight decay."""
    return torch.optim.AdamW(policy.parameters(), lr=learning_rate, **ADAMW)


def train_iteration(
    policy: "Emu3ForCausalLM",
    reference: "Emu3ForCausalLM | None",
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    settings: Settings,
    description: str = "train",
) -> dict[str, float | int | None]:
    """Do the optimizer steps of an iteration; change `policy` and `optimizer`, return the metrics of `Totals`.

    Args:
        policy: float32 weights; computes in bfloat16 where the settings say so.
        reference: the frozen initial model; None when kl_coeff is 0.
        episodes: the used episodes of the whole iteration; each takes part in one step.

    Raises:
        EarlError: no token counts in a step, its loss or gradient is not finite, or the learner's log-probs are not the
            sampler's (see check_parity); nothing must be kept then.
    """
    policy.eval()  # no dropout: the learner must compute the log-probs that the sampler sampled from
    totals = Totals()
    for step, part in enumerate(mini_batches(episodes, settings.optimizer_steps)):
        optimizer.zero_grad(set_to_none=True)
        denominator = objective.loss_denominator(
            settings.normalization,
            len(part),
            sum(len(episode.completion) for episode in part),
            settings.max_completion_tokens,
        )
        before = totals.tokens
        for batch in micro_batches(part, settings, policy.device, description):
            logp, entropy, kept = completion_logprobs(policy, batch, settings)
            reference_logp = None
            if reference is not None:
                with torch.no_grad():
                    reference_logp, _, _ = completion_logprobs(reference, batch, settings, kept)
            loss = batch_loss(logp, reference_logp, batch, denominator, settings)
            loss.backward()
            add_to(totals, batch, loss.detach(), logp.detach(), entropy, reference_logp, settings)
            if step == 0:
                add_mismatch(totals, batch, logp.detach())
        if step == 0:
            check_parity(totals, settings)
        totals.gradient_norms.append(optimizer_step(policy, optimizer, totals.loss, totals.tokens - before))
    return totals.metrics(settings, with_kl=reference is not None)


def mini_batches(episodes: Sequence[Episode], steps: int) -> list[list[Episode]]:
    """Cut the episodes into `steps` parts of whole groups, as even as can be; fewer where there are fewer groups."""
    groups: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda episode: episode.episode_id):
        groups.setdefault(episode.group_id, []).append(episode)
    names, steps = sorted(groups), min(steps, len(groups))
    bounds = [len(names) * step // steps for step in range(steps + 1)]
    return [
        [episode for name in names[start:end] for episode in groups[name]] for start, end in itertools.pairwise(bounds)
    ]


@dataclass(frozen=True)
class MicroBatch:
    """Some episodes, and their T counted completion tokens as flat tensors.

    Their ids are B right-padded rows of S, or with `groups` one packed row.
    """

    episode_ids: list[str]
    groups: list[packing.Group] | None
    input_ids: Tensor  # int64 [B, S]
    position_ids: Tensor  # int64 [B, S]
    sequences: Tensor  # int64 [T], episode of each counted token
    places: Tensor  # int64 [T], place among the B * S whose logits predict it
    positions: Tensor  # int64 [T], place in its completion
    targets: Tensor  # int64 [T]
    advantages: Tensor  # float32 [T]
    lengths: Tensor  # float32 [T], completion tokens of the token's episode
    behavior_logprobs: Tensor  # float32 [T]


def micro_batches(
    episodes: Sequence[Episode], settings: Settings, device: torch.device, description: str | None = None
) -> Iterator[MicroBatch]:
    """Yield the episodes `settings.micro_batch` at a time: those of a group together where they are packed, else those
    of like length, to pad little.

    A micro-batch in which no token counts is skipped: its loss and gradient are 0. Without a description no progress is
    shown.
    """
    by_group = settings.packed
    ordered = sorted(episodes, key=lambda e: (e.group_id if by_group else -len(e), e.episode_id))
    starts = range(0, len(ordered), settings.micro_batch)
    for start in tqdm(starts, desc=description, unit="batch", leave=False, disable=description is None):
        batch = collate(ordered[start : start + settings.micro_batch], settings, device)
        if len(batch.targets):
            yield batch


def collate(episodes: Sequence[Episode], settings: Settings, device: torch.device) -> MicroBatch:
    input_ids, position_ids, groups, starts = (packed_rows if settings.packed else padded_rows)(episodes)
    parts = []
    for index, (episode, (prompt_end, completion_start)) in enumerate(zip(episodes, starts, strict=True)):
        counts = counted_positions(episode, settings)
        parts.append(
            (
                np.full(len(counts), index),
                # The prompt's last token predicts the completion's first, each other one its successor.
                np.where(counts == 0, prompt_end, completion_start + counts) - 1,
                counts,
                episode.completion[counts],
                np.full(len(counts), episode.advantage, dtype=np.float32),
                np.full(len(counts), len(episode.completion), dtype=np.float32),
                episode.behavior_logprobs[counts],
            )
        )
    flat = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    tensors = (torch.from_numpy(array).to(device) for array in (input_ids, position_ids, *flat))
    return MicroBatch([episode.episode_id for episode in episodes], groups, *tensors)


Rows = tuple[np.ndarray, np.ndarray, list[packing.Group] | None, list[tuple[int, int]]]
"""input_ids and position_ids [B, S], the groups, and for each episode where, among the B * S places, its prompt ends
and its completion starts."""


def padded_rows(episodes: Sequence[Episode]) -> Rows:
    # Any id pads: under the causal mask nothing to the left sees the right end, and no logits are taken there.
    length = max(len(episode) for episode in episodes)
    input_ids = np.zeros((len(episodes), length), dtype=np.int64)
    ends = []
    for row, episode in enumerate(episodes):
        input_ids[row, : len(episode)] = np.concatenate([episode.prompt, episode.completion])
        ends.append(row * length + len(episode.prompt))
    return input_ids, np.arange(length)[None], None, [(end, end) for end in ends]


def packed_rows(episodes: Sequence[Episode]) -> Rows:
    packed = packing.pack([(episode.prompt, episode.completion) for episode in episodes])
    starts = [(group.prompt.stop, own.start) for group in packed.groups for own in group.completions]
    return packed.input_ids[None], packed.position_ids[None], packed.groups, starts


def counted_positions(episode: Episode, settings: Settings) -> np.ndarray:
    """int64: the positions of the completion whose tokens count in the loss."""
    mask = objective.token_mask(
        torch.from_numpy(episode.completion), torch.from_numpy(episode.forced), settings.visual_range, settings.counted
    )
    return mask.nonzero().squeeze(1).numpy()


def completion_logprobs(
    model: "Emu3ForCausalLM", batch: MicroBatch, settings: Settings, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Log-probability and entropy, float32 [T] each in nats, of the counted tokens under `model`, and the ids they are
    over (`head.kept_ids`).

    Args:
        kept: the ids to normalise over, of the policy: its reference has to be seen on the same ones; None finds them
            by `model` itself.
    """
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
        if batch.groups is None:
            hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        else:
            hidden = packing.hidden_states(model, batch.input_ids, batch.position_ids, batch.groups)
    # The head runs on counted tokens only: with a large vocabulary it is most of the work.
    hidden, weight = hidden.flatten(0, 1)[batch.places], model.lm_head.weight
    tokens = batch.targets, settings.temperature, settings.support, settings.bfloat16
    if kept is None:
        kept = head.kept_ids(hidden, weight, *tokens)
    return *head.token_logprobs(hidden, weight, *tokens, kept, accumulate=True), kept


def batch_loss(
    logp: Tensor, reference_logp: Tensor | None, batch: MicroBatch, denominator: int, settings: Settings
) -> Tensor:
    return objective.grpo_loss(
        logp,
        batch.advantages,
        denominator,
        reference_logp,
        settings.kl_coeff,
        behavior_logprobs=batch.behavior_logprobs,
        sequences=batch.sequences,
        lengths=batch.lengths if settings.normalization == "sequences" else None,
        options=settings.options,
    )


def add_to(
    totals: Totals,
    batch: MicroBatch,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    reference_logp: Tensor | None,
    settings: Settings,
) -> None:
    options = settings.options
    totals.loss += loss.item()
    totals.tokens += len(logp)
    totals.entropy += entropy.double().sum().item()
    if reference_logp is not None:
        # Whatever the loss has, k3 is the better value: unbiased, and never negative.
        totals.kl += objective.kl_estimate(logp, reference_logp, "k3").double().sum().item()
    if options.ratio:
        bounds = options.clip_low, options.clip_high
        low, high = objective.clipped_tokens(logp, batch.behavior_logprobs, batch.advantages, *bounds)
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


def optimizer_step(policy: "Emu3ForCausalLM", optimizer: torch.optim.Optimizer, loss: float, tokens: int) -> float:
    """Clip the gradient to norm 1 and step; return the norm before clipping."""
    if not tokens:
        raise EarlError(
            "no completion token counts in the loss; check train_text_tokens_only, train_vision_tokens_only"
        )
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRADIENT_NORM).item()
    if not np.isfinite(norm) or not np.isfinite(loss):
        raise EarlError(
            f"loss {loss} or gradient norm {norm} is not finite, so no step was done; "
            "look for scores or log-probs out of range, or lower learning_rate"
        )
    optimizer.step()
    return norm
