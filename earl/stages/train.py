"""Train stage: from policy i-1 and its scored rollouts to policy i."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from earl import code_version, residents
from earl.config.freeze import config_digest
from earl.emu3 import checkpoint
from earl.emu3.vocabulary import Vocabulary
from earl.execution import ranks, runtime
from earl.execution.ranks import Ranks
from earl.files import manifest, objects
from earl.learner import attention, episodes, grpo, objective, performance, sharding, trainer_state
from earl.learner.performance import Clock
from earl.learner.settings import Settings
from earl.learner.trainer_state import TrainerState
from earl.messages.errors import EarlError
from earl.run import replays
from earl.run.layout import Iteration, Run

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

    from earl.config.schema import Config

log = logging.getLogger(__name__)


def run(config: "Config", run_path: Path, iteration: int, shards: int | None = None) -> dict[str, Any]:
    """Train iteration `iteration` of a run and write its `trainer/`, `policy/` and `train/`; return the metrics.

    Everything cheap is checked before a model is loaded. `train/metrics.json` is written last: where it is, the
    iteration is complete. Rerunning writes the same bytes, `train/performance.json` apart. Under torchrun every rank
    calls this, and gets the same metrics.

    Args:
        run_path: run folder holding the previous iteration's policy and (from the second on) trainer, the starting
            policy in iteration 0 as reference, and the rollouts and scores of this iteration (of a replay: its source
            does, see `earl.run.replays`).
        iteration: 1 is the first.
        shards: number of rollout shards on disk, `rollout_shards` by default.

    Raises:
        EarlError: an input is missing, damaged or another's; too many judgements failed; the loss is not finite.
    """
    if iteration < 1:
        raise EarlError(f"iteration is {iteration}; the first that can be trained is 1")
    splits_alone = config.dtype == "bfloat16" or config.reference_offload
    with ranks.joined(runtime.prepare(config), splits_alone) as team:
        return _run(config, Run(Path(run_path)), iteration, shards or config.rollout_shards, team)


def _run(config: "Config", files: Run, iteration: int, shards: int, team: Ranks) -> dict[str, Any]:
    clock = Clock(team.device)
    current, previous = files.iteration(iteration), files.iteration(iteration - 1)
    with clock.phase("read"):
        policy_digest = manifest.digest_folder(previous.policy)
        stored = replays.stored(files, iteration, policy_digest, shards)
        source = episodes.read(stored.files, stored.shards, stored.sampled_by, config.episodes_per_iteration)
        stored.check(source)
        outcomes = episodes.reward_all(source, config, str(current.path))
        vocabulary = Vocabulary.from_folder(previous.policy)
        used = episodes.learner_episodes(outcomes, vocabulary, config.emu3_use_logit_processor, str(current.path))
        settings = _settings(config, iteration, vocabulary, team)
    if stored.off_policy:
        replays.check_support(config)
        log.info("train: iteration %d is of another policy's episodes, so parity_tolerance is not applied", iteration)
        settings = replace(settings, parity_tolerance=None)
    warnings = episodes.warnings(outcomes)
    for text in warnings if team.first else ():
        log.warning("train: iteration %d: %s", iteration, text)
    with clock.phase("load"):
        learner, steps = _learner(config, previous, policy_digest, team)
        reference_digest, reference = _reference(config, files.iteration(0).policy, team)
    learned = grpo.train_iteration(
        learner.policy, reference, learner.optimizer, used, settings, f"train {iteration}", team, clock
    )
    learner.optimizer.zero_grad(set_to_none=True)  # Gradients are not part of what is kept.

    done = learned.pop("steps")
    inputs = {
        "policy": policy_digest,
        "trainer": _trainer_digest(previous),
        "reference": reference_digest,
        "rollouts": source.rollouts,
        "scores": source.scores,
        **stored.inputs(),
    }
    metrics = {
        **episodes.metrics(outcomes),
        "warnings": warnings,
        **learned,
        "counted": settings.counted,
        "learning_rate": config.learning_rate,
        "optimizer_steps": steps + done,
        "left_out_prompts": source.left_out,
        "rubrics_digest": source.rubrics,
        "ranks": team.size,
        "inputs": inputs,
    }
    metrics = _write(config, current, previous, learner, outcomes, metrics, team, clock)
    if team.lasting:
        residents.put("learner", _key(config, current, metrics["policy_digest"], team), learner)
    return metrics


@dataclass
class _Learner:
    """What one iteration leaves to the next, on disk and, in a process that stays, in memory."""

    policy: "Emu3ForCausalLM"
    optimizer: torch.optim.Optimizer


def _learner(config: "Config", previous: Iteration, policy_digest: str, team: Ranks) -> tuple[_Learner, int]:
    """The learner as an iteration left it, and its optimizer steps: taken from memory if it is there, else loaded."""
    binding = {"iteration": previous.index, "policy_digest": policy_digest, "config_digest": config_digest(config)}
    checkpoint.check_files(previous.policy)
    state = trainer_state.check(previous.trainer, **binding) if previous.index else None
    steps = state.optimizer_steps if state else 0
    kept: _Learner | None = _kept("learner", _key(config, previous, policy_digest, team), team)
    if kept is not None:
        log.info("trainer: iteration %d (%d optimizer steps) is in memory", previous.index, steps)
        return kept, steps
    policy = sharding.load(previous.policy, team, config.dtype == "bfloat16")
    learner = _Learner(policy, grpo.new_optimizer(policy, config.learning_rate))
    if state is None:
        log.info("trainer: iteration 1 starts with a fresh optimizer from %s", previous.policy)
    else:
        trainer_state.load(previous.trainer, policy, learner.optimizer, team, **binding)
    if config.compile:
        sharding.compile_layers(policy)
    return learner, steps


def _key(config: "Config", iteration: Iteration, policy_digest: str, team: Ranks) -> tuple[object, ...]:
    """What a learner in memory depends on."""
    chosen = config.learning_rate, config.compile, *_placement(config, team)
    return iteration.index, policy_digest, _trainer_digest(iteration), *chosen


def _placement(config: "Config", team: Ranks) -> tuple[object, ...]:
    """How a model lies in memory, here and on the other ranks."""
    return config.dtype, str(team.device), team.splits, team.size


def _kept(kind: str, key: tuple[object, ...], team: Ranks) -> Any:
    """Take what all ranks have in memory under a key. None where one has not: they load together, or not at all."""
    found = residents.take(kind, key)
    return found if all(team.gather(found is not None)) else None


def _trainer_digest(iteration: Iteration) -> str | None:
    return manifest.digest_folder(iteration.trainer) if iteration.index else None


def _reference(config: "Config", folder: Path, team: Ranks) -> "tuple[str, Emu3ForCausalLM] | tuple[None, None]":
    """Digest and weights of the frozen starting policy; where no KL term is wanted it is not loaded."""
    if config.kl_coeff == 0:
        return None, None
    digest, bfloat16 = manifest.digest_folder(checkpoint.check_files(folder)), config.dtype == "bfloat16"
    key = digest, config.reference_offload, *_placement(config, team)
    reference = _kept("reference", key, team)
    if reference is None:
        reference = sharding.load(folder, team, bfloat16, frozen=True, offload=config.reference_offload)
    if team.lasting:
        residents.put("reference", key, reference)
    return digest, reference


def _settings(config: "Config", iteration: int, vocabulary: Vocabulary, team: Ranks) -> Settings:
    text, vision = config.train_text_tokens_only, config.train_vision_tokens_only
    return Settings(
        kl_coeff=config.kl_coeff,
        temperature=config.temperature,
        micro_batch=config.per_device_batch_size,
        visual_range=(vocabulary.first_visual, vocabulary.size),
        support=episodes.support(config, vocabulary),
        counted=objective.counted_tokens(
            iteration,
            (config.text_only_steps, config.text_only_cycle_steps) if text else None,
            (config.vision_only_steps, config.vision_only_cycle_steps) if vision else None,
        ),
        bfloat16=config.dtype == "bfloat16",
        options=objective.Options(
            kl_estimator=config.kl_estimator,
            ratio=config.importance_ratio == "behavior",
            clip_low=config.clip_ratio_low,
            clip_high=config.clip_ratio_high,
            correction=config.sampler_correction,
            correction_low=config.sampler_correction_low,
            correction_high=config.sampler_correction_high,
        ),
        normalization=config.loss_normalization,
        max_completion_tokens=config.max_response_tokens,
        optimizer_steps=config.optimizer_steps_per_iteration,
        parity_tolerance=config.parity_tolerance,
        packed=config.packing == "groups",
        attention=attention.choose(config.attention, team.device, config.dtype == "bfloat16"),
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _write(
    config: "Config",
    current: Iteration,
    previous: Iteration,
    learner: _Learner,
    outcomes: list[episodes.Outcome],
    metrics: dict[str, Any],
    team: Ranks,
    clock: Clock,
) -> dict[str, Any]:
    """Write everything; weights and moments by all ranks, the rest by the first. `train/metrics.json` comes last."""
    origin = {"config_digest": config_digest(config), "code_version": code_version()}
    if team.first:
        # What stands there from before is not of the policy that is about to be written.
        current.metrics.unlink(missing_ok=True)
    with clock.phase("save"):
        dtype = runtime.policy_dtype(config)
        with ranks.folder(current.policy, team) as folder:
            policy_digest = sharding.save(learner.policy, folder, previous.policy, team, dtype)
        state = TrainerState(current.index, metrics["optimizer_steps"], policy_digest, **origin)
        with ranks.folder(current.trainer, team) as folder:
            trainer_state.save(folder, learner.policy, learner.optimizer, state, team, dtype == torch.bfloat16)
    metrics = {"iteration": current.index, **metrics, "policy_digest": policy_digest, **origin}
    peaks = team.gather(performance.peak_memory(team.device))
    if team.first:
        sampled_by = metrics["inputs"].get("sampled_by", metrics["inputs"]["policy"])
        described = {"run": config.run_name, "iteration": str(current.index), "policy_digest": sampled_by, **origin}
        episodes.write(current.episodes, outcomes, described)
        objects.write(current.performance, _performance(clock, peaks, outcomes, team))
        metrics["episodes_digest"] = manifest.digest_file(current.episodes)
        objects.write(current.metrics, metrics)
    return team.of_first(metrics)


def _performance(clock: Clock, peaks: list[int], outcomes: list[episodes.Outcome], team: Ranks) -> dict[str, Any]:
    columns = ("prompt_token_ids", "completion_token_ids")
    tokens = sum(len(outcome.row[column]) for outcome in outcomes if outcome.used for column in columns)
    found = performance.summary(clock.seconds, peaks, tokens, team.device)
    log.info(
        "train: %d tokens at %.0f a second; peak memory of a rank %.0f MiB; seconds: %s",
        tokens,
        found["tokens_per_second"],
        max(peaks) / 2**20,
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items()),
    )
    return found
