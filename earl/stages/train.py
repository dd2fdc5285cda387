"""Train stage: from policy i-1 and its scored rollouts to policy i.

By stage, `run` loads the learner from files, trains one iteration and writes its checkpoint. A program that trains many
iterations loads the learner once and calls `step` for each; the files are the same.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from earl import code_version
from earl.config.freeze import config_digest
from earl.emu3 import saving
from earl.emu3.vocabulary import Vocabulary
from earl.execution import ranks, runtime
from earl.execution.ranks import Ranks
from earl.files import manifest, objects
from earl.files.layout import Iteration, Run
from earl.learner import attention, episodes, grpo, objective, performance, trainer_state
from earl.learner.performance import Clock
from earl.learner.schedule import Schedule
from earl.learner.settings import Settings
from earl.learner.trainer_state import TrainerState
from earl.messages.errors import EarlError
from earl.run import replays, state
from earl.stages import rounds
from earl.stages.learner import Learner, digest_of, load, splits_alone

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)


def run(config: "Config", run_path: Path, iteration: int, shards: int | None = None) -> dict[str, Any]:
    """Train iteration `iteration` of a run and write its `trainer/`, `policy/` and `train/`; return the metrics.

    Everything cheap is checked before a model is loaded. `train/metrics.json` is written last: where it is, the
    iteration is complete. Rerunning writes the same bytes, `train/performance.json` apart. Under torchrun every rank
    calls this, and gets the same metrics.

    Args:
        run_path: run folder holding the previous iteration's policy and (from the second on) trainer, the policy that
            is the reference (`earl.run.state.reference_at`), and the rollouts and scores of this iteration (of a
            replay: its source does, see `earl.run.replays`).
        iteration: 1 is the first.
        shards: number of files of rollouts on disk, `rollout_files` by default.

    Raises:
        EarlError: an input is missing, damaged or another's; too many judgements failed; the loss is not finite.
    """
    if iteration < 1:
        raise EarlError(f"iteration is {iteration}; the first that can be trained is 1")
    files = Run(Path(run_path))
    with ranks.joined(runtime.prepare(config), splits_alone(config)) as team:
        clock, before = Clock(team.device), files.iteration(iteration - 1).policy
        with clock.phase("read"):
            policy_digest, vocabulary = digest_of(before, team), Vocabulary.from_folder(before)
            state.check_policy(files, iteration - 1, policy_digest)
            batch = _read(config, files, iteration, shards, policy_digest, vocabulary, team)
        with clock.phase("load"):
            learner = load(config, files, iteration - 1, team)
        return _step(config, files, learner, batch, team, clock, checkpointed=True)


def step(
    config: "Config", files: Run, learner: Learner, team: Ranks, checkpoint: bool, shards: int | None = None
) -> dict[str, Any]:
    """Train the iteration after the learner's and write its `train/`; return the metrics.

    The learner is that of the new iteration afterwards. All ranks of the team call this and get the same metrics.
    `train/metrics.json` is written last: where it is, the iteration is complete. Without a checkpoint, an iteration
    that is complete may be trained again: where that gives the policy on record, its files stay as they are. Otherwise
    it is made anew, and what came of the policy on record is forgotten (`earl.run.state.rewind`).

    Args:
        checkpoint: whether to write `policy/` and `trainer/`; `write_checkpoint` can still do it before the next step.
        shards: number of files of rollouts on disk, `rollout_files` by default.

    Raises:
        EarlError: an input is missing, damaged or another's; too many judgements failed; the loss is not finite. The
            learner is of no further use where a model has been changed by then.
    """
    clock = Clock(team.device)
    with clock.phase("read"):
        batch = _read(config, files, learner.iteration + 1, shards, learner.policy_digest, learner.vocabulary, team)
    return _step(config, files, learner, batch, team, clock, checkpoint)


@dataclass(frozen=True)
class _Batch:
    """The stored episodes of an iteration, and how to learn from them."""

    source: episodes.Source
    outcomes: list[episodes.Outcome]
    used: list[Any]
    settings: Settings
    inputs: dict[str, Any]


def _read(
    config: "Config",
    files: Run,
    iteration: int,
    shards: int | None,
    policy_digest: str,
    vocabulary: Vocabulary,
    team: Ranks,
) -> _Batch:
    """Read and check the rollouts and scores of an iteration, which the policy of this digest has sampled."""
    path = str(files.iteration(iteration).path)
    stored = replays.stored(files, iteration, policy_digest, shards or config.rollout_files)
    source = episodes.read(stored.files, stored.shards, stored.sampled_by, rounds.counts(config, config.rounds))
    stored.check(source)
    if stored.recorded is None:
        rounds.check(config, stored.files, source)
    outcomes = episodes.reward_all(source, config, path)
    used = episodes.learner_episodes(outcomes, vocabulary, config.emu3_use_logit_processor, path)
    settings = _settings(config, iteration, vocabulary, team)
    if stored.off_policy:
        replays.check_support(config)
        log.info("train: iteration %d is of another policy's episodes, so parity_tolerance is not applied", iteration)
        settings = replace(settings, parity_tolerance=None)
    inputs = {"policy": policy_digest, "rollouts": source.rollouts, "scores": source.scores, **stored.inputs()}
    return _Batch(source, outcomes, used, settings, inputs)


def _step(
    config: "Config", files: Run, learner: Learner, batch: _Batch, team: Ranks, clock: Clock, checkpointed: bool
) -> dict[str, Any]:
    current = files.iteration(learner.iteration + 1)
    learner.refresh_reference(config)
    warnings = episodes.warnings(batch.outcomes, config.dynamic_sampling and config.dynamic_sampling.usable_groups)
    for text in warnings if team.first else ():
        log.warning("train: iteration %d: %s", current.index, text)
    learned = grpo.train_iteration(
        learner.policy,
        learner.reference,
        learner.optimizer,
        batch.used,
        batch.settings,
        f"train {current.index}",
        team,
        clock,
    )
    learner.optimizer.zero_grad(set_to_none=True)  # Gradients are not part of what is kept.
    learner.iteration, learner.optimizer_steps = current.index, learner.optimizer_steps + learned.pop("steps")
    with clock.phase("save"):
        if checkpointed:
            _clear(current, team)
            learner.policy_digest = _write_policy(config, learner, current.policy, team)
            _write_trainer(config, learner, current.trainer, team)
        else:
            learner.policy_digest = _write_policy(config, learner, None, team)
            recorded = team.of_first(_recorded(current) if team.first else None)
            if recorded is not None and recorded["policy_digest"] == learner.policy_digest:
                return recorded
            if recorded is not None and team.first:
                _forget(config, files, current, recorded, learner.policy_digest, team)
            _clear(current, team, current.policy, current.trainer)
    metrics = {
        "iteration": current.index,
        **(described := episodes.metrics(batch.outcomes)),
        "rounds": rounds.sampled(config, described["groups"]),
        "warnings": warnings,
        **learned,
        "counted": batch.settings.counted,
        "learning_rate": batch.settings.learning_rate,
        "optimizer_steps": learner.optimizer_steps,
        "left_out_prompts": batch.source.left_out,
        "passed_over_prompts": batch.source.passed_over,
        "rubrics_digest": batch.source.rubrics,
        "ranks": team.size,
        "inputs": batch.inputs | {"reference": learner.reference_digest},
        "policy_digest": learner.policy_digest,
        **_origin(config),
    }
    return _write_metrics(config, current, batch.outcomes, metrics, team, clock)


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
        entropy_coeff=config.entropy_coeff,
        learning_rate=_schedule(config).rate(iteration - 1),
        options=objective.Options(
            kl_estimator=config.kl_estimator,
            ratio=config.importance_ratio != "none",
            of_sequences=config.importance_ratio == "sequence",
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
        attention=check_kernel(config, team.device),
        gradient_checkpointing=config.gradient_checkpointing,
    )


def check_kernel(config: "Config", device: torch.device) -> str:
    """Return the kernel of attention, see `attention.choose`, which raises where it cannot run."""
    return attention.choose(config.attention, device, config.dtype == "bfloat16")


def _schedule(config: "Config") -> Schedule:
    return Schedule(
        config.learning_rate,
        config.schedule_iterations,
        config.final_learning_rate,
        config.learning_rate_schedule,
        config.warmup_iterations,
        config.decay_iterations,
    )


def write_checkpoint(config: "Config", files: Run, learner: Learner, team: Ranks) -> None:
    """Write `policy/` and `trainer/` of the learner's iteration, where `step` did not; all ranks of the team do so."""
    current = files.iteration(learner.iteration)
    digest = _write_policy(config, learner, current.policy, team)
    if digest != learner.policy_digest:
        raise EarlError(f"{current.policy}: was written as {digest}, but its digest was {learner.policy_digest}")
    _write_trainer(config, learner, current.trainer, team)


def _clear(current: Iteration, team: Ranks, *folders: Path) -> None:
    """Remove what stands there from before and is not of the policy that is about to be written."""
    if team.first:
        current.metrics.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _recorded(current: Iteration) -> dict[str, Any] | None:
    return objects.read(current.metrics) if current.metrics.is_file() else None


def _forget(
    config: "Config", files: Run, current: Iteration, recorded: dict[str, Any], policy_digest: str, team: Ranks
) -> None:
    gone = state.rewind(files, current.index)
    now = {"ranks": team.size, "policy_digest": policy_digest, **_origin(config)}
    log.warning(
        "%s: training iteration %d again gave another policy than the one on record. %s. What was sampled from that "
        "one is not valid any more: iterations %d to %d are made anew",
        *(current.metrics, current.index, differences(now, recorded), gone[0], gone[-1]),
    )


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """Say in what two trainings of an iteration differ, by their metrics."""
    names = {"policy_digest": "Policy", "ranks": "Ranks", "code_version": "Code", "config_digest": "Configuration"}
    return ". ".join(
        f"{title}: {now.get(name)} now, {then.get(name)} then" if now.get(name) != then.get(name) else f"{title}: same"
        for name, title in names.items()
    )


def _write_policy(config: "Config", learner: Learner, path: Path | None, team: Ranks) -> str:
    """Write the policy folder and return its digest; without a path, return the digest that it would have."""
    dtype = runtime.dtype(config.policy_dtype)
    if path is None:
        return saving.save_policy(learner.policy, None, learner.companions, dtype, team)
    with ranks.folder(path, team) as folder:
        return saving.save_policy(learner.policy, folder, learner.companions, dtype, team)


def _write_trainer(config: "Config", learner: Learner, path: Path, team: Ranks) -> None:
    trained = TrainerState(learner.iteration, learner.optimizer_steps, learner.policy_digest, **_origin(config))
    with_weights = runtime.dtype(config.policy_dtype) == torch.bfloat16
    with ranks.folder(path, team) as folder:
        trainer_state.save(folder, learner.policy, learner.optimizer, trained, team, with_weights)


def _origin(config: "Config") -> dict[str, str]:
    return {"config_digest": config_digest(config), "code_version": code_version()}


def _write_metrics(
    config: "Config",
    current: Iteration,
    outcomes: list[episodes.Outcome],
    metrics: dict[str, Any],
    team: Ranks,
    clock: Clock,
) -> dict[str, Any]:
    """Write `train/` by the first rank, `metrics.json` last; return the metrics on every rank."""
    peaks = team.gather(clock.peaks)
    if team.first:
        sampled_by = metrics["inputs"].get("sampled_by", metrics["inputs"]["policy"])
        described = {"run": config.run_name, "iteration": str(current.index), "policy_digest": sampled_by}
        episodes.write(current.episodes, outcomes, described | _origin(config))
        objects.write(current.performance, _performance(clock.seconds, peaks, outcomes, team))
        metrics["episodes_digest"] = manifest.digest_file(current.episodes)
        _drop_older_shards(current, len(metrics["inputs"]["rollouts"]))
        objects.write(current.metrics, metrics)
    return team.of_first(metrics)


def _drop_older_shards(current: Iteration, shards: int) -> None:
    """Remove files of when `rollout_shards` was larger: their episodes are in the others now."""
    for folder in (current.rollouts(0).parent, current.scores(0).parent):
        for path in folder.glob("*.parquet"):
            if path.stem.isdigit() and int(path.stem) >= shards:
                path.unlink()


def _performance(
    seconds: dict[str, float], peaks: list[dict[str, int]], outcomes: list[episodes.Outcome], team: Ranks
) -> dict[str, Any]:
    columns = ("prompt_token_ids", "completion_token_ids")
    tokens = sum(len(outcome.row[column]) for outcome in outcomes if outcome.used for column in columns)
    found = performance.summary(seconds, peaks, tokens, team.device)
    log.info(
        "train: %d tokens at %.0f a second; peak memory of a rank %.0f MiB; seconds: %s",
        tokens,
        found["tokens_per_second"],
        max(found["peak_memory_bytes"]) / 2**20,
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items()),
    )
    return found
