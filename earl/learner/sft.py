"""Fine-tuning on examples, or with DPO on pairs: a loop that can be killed at any time and ends in the same bytes.

Reads top to bottom: `fine_tune` is the loop. A step is that of `grpo` with another loss: its micro-batches, padded or
packed, its log-probs by blocks, its clipping, its sharing out over several ranks, each of which runs this loop. What
step s sees is a function of (seed, s) alone, so a checkpoint needs weights, optimizer moments and the step.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from earl.emu3 import adapter
from earl.execution import ranks
from earl.execution.ranks import Ranks
from earl.files import manifest
from earl.learner import batches, grpo, logprobs, objective, sharding, trainer_state
from earl.learner.batches import Episode
from earl.learner.schedule import Schedule
from earl.learner.settings import AdamW
from earl.learner.settings import Settings as StepSettings
from earl.messages.errors import EarlError
from earl.statistics import seeds

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

CHECKPOINTS = 20
"""Checkpoints over a whole fine-tuning that names no steps for them: a kill costs at most one twentieth of it."""
STATE = "state.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know of the configuration."""

    steps: int
    batch_size: int  # sequences in an optimizer step
    micro_batch: int  # sequences in memory at a time, on each rank; changes no result beyond rounding
    learning_rate: float  # the peak
    warmup_steps: int
    seed: int
    bfloat16: bool
    final_learning_rate: float = 0.0
    schedule: str = "cosine"  # see schedule
    decay_steps: int | None = None  # see schedule
    instruction_loss_weight: float = 0.0  # of the instruction's tokens in the loss, where examples name them
    dpo_beta: float | None = None  # of DPO, on examples that are pairs; None: cross-entropy
    adamw: AdamW = field(default_factory=AdamW)
    max_gradient_norm: float | None = grpo.MAX_GRADIENT_NORM  # None does not clip
    validate_every: int | None = None  # steps between two validations
    save_every: int | None = None  # steps between two checkpoints to resume from; None: a twentieth of all
    keep_every: int | None = None  # steps between two policies that are kept
    packed: bool = False  # see packing; changes no result beyond rounding
    attention: str = "sdpa"  # see attention.choose
    gradient_checkpointing: bool = False  # see earl.learner.settings

    @property
    def objective(self) -> StepSettings:
        """Log-probs of all tokens of a completion, over the whole vocabulary."""
        return StepSettings(
            kl_coeff=0.0,
            temperature=1.0,
            micro_batch=self.micro_batch,
            visual_range=(0, 0),  # neither what counts nor the support ask what is visual
            support=logprobs.FULL,
            counted="all",
            bfloat16=self.bfloat16,
            packed=self.packed,
            whole_groups=self.dpo_beta is not None,
            attention=self.attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )


@dataclass(frozen=True)
class Example:
    """Ids of one training sequence, or of two that share their prompt. The loss counts those of the completion."""

    prompt: np.ndarray  # int64 [P]
    completion: np.ndarray  # int64 [L]
    instruction_tokens: int = 0  # the first ones of the completion, which count by `instruction_loss_weight`
    rejected: np.ndarray | None = None  # int64 [M], the worse completion of a pair

    @property
    def completions(self) -> list[np.ndarray]:
        return [self.completion] if self.rejected is None else [self.completion, self.rejected]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the completion that count in full."""
        return len(self.completion) - self.instruction_tokens

    def __len__(self) -> int:
        return len(self.prompt) + max(map(len, self.completions))


class Step(NamedTuple):
    """What is measured of a step: of DPO also the mean margin of its pairs, and the share whose margin is above 0."""

    loss: float  # in nats a token; of DPO, a pair
    gradient_norm: float  # before clipping
    margin: float | None = None
    accuracy: float | None = None


@dataclass
class Progress:
    """Steps done, and what `sft.json` says of each: see `Step`; held-out loss where due."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    accuracies: list[float | None] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # by number of steps done

    def curve(self, settings: Settings) -> dict[str, Any]:
        """Return the lists by step that are written as JSON; `validation` only where there is any."""
        rates = [learning_rate(step, settings) for step in range(self.step)]
        found = {"loss": self.losses, "gradient_norm": self.gradient_norms, "learning_rate": rates}
        if settings.dpo_beta is not None:
            found |= {"margin": self.margins, "accuracy": self.accuracies}
        held_out = {"step": list(self.validation), "loss": list(self.validation.values())}
        return found | ({"validation": held_out} if self.validation else {})


def fine_tune(
    policy: "Emu3ForCausalLM",
    sequence: Callable[[int], Example],
    count: int,
    settings: Settings,
    checkpoints: Path,
    identity: str,
    team: Ranks | None = None,
    held_out: Sequence[Example] = (),
    keep: Callable[[int], None] = lambda step: None,
    reference: "Emu3ForCausalLM | None" = None,
) -> Progress:
    """Change `policy` in place; return the loss of every step, and what else was measured.

    Args:
        sequence: returns training sequence i, 0 <= i < count.
        checkpoints: folder for what a killed process leaves to its successor; the caller removes it in the end.
        identity: digest of everything the result depends on; checkpoints of another identity are not resumed.
        team: the ranks, over which `policy` is split, and each of which calls this with the same arguments; None: this
            process alone.
        held_out: sequences of `settings.validate_every`; the weights do not depend on them.
        keep: called by all ranks with the number of steps done where `settings.keep_every` keeps the policy.
        reference: the frozen model of DPO.

    Raises:
        EarlError: loss or gradient is not finite, a checkpoint is damaged or cannot be written.
    """
    team = team or ranks.alone(policy.device)
    optimizer = grpo.new_optimizer(policy, settings.learning_rate, settings.adamw)
    progress = resume(checkpoints, policy, optimizer, identity, team)
    save_every = settings.save_every or math.ceil(settings.steps / CHECKPOINTS)
    shown = {"desc": "sft", "unit": "step", "total": settings.steps, "initial": progress.step}
    with (
        grpo.ready_to_learn(policy, settings.objective),
        tqdm(**shown, mininterval=1, disable=not team.first) as bar,
    ):
        started, tokens = time.monotonic(), 0
        while progress.step < settings.steps:
            indices = batch_indices(settings.seed, progress.step, settings.batch_size, count)
            batch = [sequence(index) for index in indices]
            done = train_step(policy, optimizer, batch, settings, progress.step, team, reference)
            progress.losses.append(done.loss)
            progress.gradient_norms.append(done.gradient_norm)
            progress.margins.append(done.margin)
            progress.accuracies.append(done.accuracy)
            progress.step += 1
            tokens += sum(map(len, batch))
            rate = tokens / (time.monotonic() - started)
            bar.set_postfix(loss=f"{done.loss:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
            bar.update()
            last = progress.step == settings.steps
            if settings.validate_every and (last or progress.step % settings.validate_every == 0):
                held_out_loss = validation_loss(policy, held_out, settings, team, reference)
                progress.validation[progress.step] = held_out_loss
                log.info("sft: step %d, validation loss %.4f", progress.step, held_out_loss)
            if settings.keep_every and progress.step % settings.keep_every == 0 and not last:
                keep(progress.step)
            if progress.step % save_every == 0 and not last:
                save_checkpoint(checkpoints, policy, optimizer, progress, identity, team)
    return progress


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """Examples of a step: the next `batch_size` places in an endless row of shuffled epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(seed, place // count, count)[place % count]) for place in places]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return seeds.generator("sft", seed, epoch).permutation(count)


def train_step(
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    settings: Settings,
    step: int,
    team: Ranks | None = None,
    reference: "Emu3ForCausalLM | None" = None,
) -> Step:
    """One optimizer step on the mean cross-entropy of the batch's counted tokens, or the mean DPO loss of its pairs.

    Instructions add the cross-entropy of their tokens times `instruction_loss_weight`, divided by the same number.

    Of several ranks each computes its share of the batch, divided by the tokens, or pairs, of all of it.
    """
    team = team or ranks.alone(policy.device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimizer.zero_grad(set_to_none=True)
    own, margins = 0.0, []
    for part, counts in batches.micro_batches(as_episodes(batch), settings.objective, team):
        loss, of_pairs = _part_loss(policy, reference, part, batch, settings)
        (loss if counts else 0 * loss).backward()
        if counts:
            own += loss.item()
            margins += of_pairs
    total = sum(team.gather(own))
    margins = [margin for part in team.gather(margins) for margin in part]
    try:
        totals = grpo.Totals(loss=total, tokens=sum(example.answer_tokens for example in batch))
        norm = grpo.optimizer_step(policy, optimizer, totals, settings.max_gradient_norm)
    except EarlError as error:
        raise EarlError(f"sft step {step}: {error}") from error
    if not margins:
        return Step(total, norm)
    return Step(total, norm, sum(margins) / len(margins), sum(margin > 0 for margin in margins) / len(margins))


def validation_loss(
    policy: "Emu3ForCausalLM",
    examples: Sequence[Example],
    settings: Settings,
    team: Ranks | None = None,
    reference: "Emu3ForCausalLM | None" = None,
) -> float:
    """The loss of a step on all of these examples, without instructions; of several ranks each computes its share."""
    team = team or ranks.alone(policy.device)
    settings = replace(settings, instruction_loss_weight=0.0)
    own = 0.0
    with torch.no_grad():
        for part, counts in batches.micro_batches(as_episodes(examples), settings.objective, team):
            loss, _ = _part_loss(policy, reference, part, examples, settings)
            own += loss.item() if counts else 0.0
    sharding.split_again(policy)
    return sum(team.gather(own))


def _part_loss(
    policy: "Emu3ForCausalLM",
    reference: "Emu3ForCausalLM | None",
    part: batches.MicroBatch,
    batch: Sequence[Example],
    settings: Settings,
) -> tuple[torch.Tensor, list[float]]:
    """Return what a micro-batch adds to the loss of its batch, and the margins of its pairs, none without DPO."""
    logp, _, _ = grpo.completion_logprobs(policy, part, settings.objective)
    if settings.dpo_beta is None:
        denominator = sum(example.answer_tokens for example in batch)
        return objective.sft_loss(logp * _weights(batch, part, settings.instruction_loss_weight), denominator), []
    with torch.no_grad(), adapter.disabled(reference):
        reference_logp, _, _ = grpo.completion_logprobs(reference, part, settings.objective)
    margins = objective.dpo_margins(logp, reference_logp, part.sequences, settings.dpo_beta)
    return objective.dpo_loss(margins, len(batch)), margins.tolist()


def _weights(examples: Sequence[Example], part: batches.MicroBatch, of_instructions: float) -> torch.Tensor:
    """Weight of each counted token in the loss, float32 [T]: 1, or that of instructions."""
    answers = torch.tensor([examples[int(name)].instruction_tokens for name in part.episode_ids])
    begins = answers.to(part.positions.device)[part.sequences]
    return torch.where(part.positions < begins, of_instructions, 1.0)


def learning_rate(step: int, settings: Settings) -> float:
    """Rate of a step, counted from 0; see `Schedule`."""
    return Schedule(
        settings.learning_rate,
        settings.steps,
        settings.final_learning_rate,
        settings.schedule,
        settings.warmup_steps,
        settings.decay_steps,
    ).rate(step)


def as_episodes(batch: Sequence[Example]) -> list[Episode]:
    """Training sequences as the learner of RL takes them: episodes that nobody sampled, of which every token counts.

    A pair is a group of two, the better one first.
    """
    return [
        Episode(
            episode_id=f"{place:06d}" if example.rejected is None else f"{place:06d}-{side}",
            group_id=f"{place:06d}",
            prompt=example.prompt,
            completion=completion,
            forced=np.zeros(len(completion), dtype=bool),
            behavior_logprobs=np.zeros(len(completion), dtype=np.float32),
            advantage=1.0,
        )
        for place, example in enumerate(batch)
        for side, completion in enumerate(example.completions)
    ]


def save_checkpoint(
    checkpoints: Path,
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: str,
    team: Ranks,
) -> None:
    """Write `step-000200/`, sealed, each rank what it holds; then drop the one before."""
    current = checkpoints / f"step-{progress.step:06d}"
    with ranks.folder(current, team) as folder:
        parts = trainer_state.write_parts(folder, policy, optimizer, team, with_weights=True)
        if team.first:
            state = {"identity": identity, "progress": asdict(progress)}
            (folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
            manifest.seal(folder, parts)
    if team.first:
        for old in checkpoints.glob("step-*"):
            if old != current:
                shutil.rmtree(old)


def resume(
    checkpoints: Path, policy: "Emu3ForCausalLM", optimizer: torch.optim.Optimizer, identity: str, team: Ranks
) -> Progress:
    """Load the newest checkpoint, if there is one of this identity, and say so; any number of ranks may have left it.

    Raises:
        EarlError: it is damaged.
    """
    found = team.of_first(newest(checkpoints, identity) if team.first else None)
    if found is None:
        return Progress()
    folder, state = found
    remedy = _remedy(checkpoints)
    trainer_state.has_weights(folder, policy, remedy)
    progress = Progress(**state["progress"])
    progress.validation = {int(step): loss for step, loss in progress.validation.items()}
    with manifest.reading(folder, remedy=remedy, rank=team.rank, ranks=team.size):
        trainer_state.read_parts(folder, policy, optimizer, progress.step, team, with_weights=True, remedy=remedy)
    log.info("sft: resumed at step %d from %s", progress.step, folder)
    return progress


def _remedy(checkpoints: Path) -> str:
    return f"remove {checkpoints} to begin anew"


def newest(checkpoints: Path, identity: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint and its `state.json`; those of another identity are removed."""
    found = sorted(folder for folder in checkpoints.glob("step-*") if (folder / manifest.NAME).is_file())
    if not found:
        return None
    remedy = _remedy(checkpoints)
    manifest.check(found[-1], remedy=remedy)
    with manifest.reading(found[-1], [STATE], remedy):
        content = (found[-1] / STATE).read_bytes()
    state = json.loads(content)
    if state["identity"] == identity:
        return found[-1], state
    log.warning("sft: %s is of another configuration, model or data; starting from step 0", checkpoints)
    shutil.rmtree(checkpoints)
    return None
