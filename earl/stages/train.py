"""Train stage: from policy i-1 and its scored rollouts to policy i."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from earl import code_version, runtime
from earl.config.freeze import config_digest
from earl.emu3 import checkpoint
from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import atomic, manifest
from earl.layout import Iteration, Run
from earl.learner import attention, episodes, grpo, objective, performance, ranks, sharding, trainer_state
from earl.learner.performance import Clock
from earl.learner.ranks import Ranks
from earl.learner.trainer_state import TrainerState

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
            policy in iteration 0 as reference, and the rollouts and scores of this iteration.
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
        source = episodes.read(current, shards, policy_digest, config.episodes_per_iteration)
        outcomes = episodes.reward_all(source, config, str(current.path))
        vocabulary = Vocabulary.from_folder(previous.policy)
        used = episodes.learner_episodes(outcomes, vocabulary, config.emu3_use_logit_processor, str(current.path))
        settings = _settings(config, iteration, vocabulary, team)
    with clock.phase("load"):
        policy = sharding.load(previous.policy, team, settings.bfloat16)
        optimizer = grpo.new_optimizer(policy, config.learning_rate)
        state = _load_state(config, previous, policy, optimizer, policy_digest, team)
        reference = _load_reference(config, files, team)
        if config.compile:
            sharding.compile_layers(policy)
    learned = grpo.train_iteration(policy, reference, optimizer, used, settings, f"train {iteration}", team, clock)

    inputs = {
        "policy": policy_digest,
        "trainer": manifest.digest_folder(previous.trainer) if state else None,
        "reference": manifest.digest_folder(files.iteration(0).policy) if reference else None,
        "rollouts": source.rollouts,
        "scores": source.scores,
    }
    steps = learned.pop("steps") + (state.optimizer_steps if state else 0)
    metrics = {
        **episodes.metrics(outcomes),
        **learned,
        "counted": settings.counted,
        "learning_rate": config.learning_rate,
        "optimizer_steps": steps,
        "ranks": team.size,
        "rubrics_digest": source.rubrics,
        "inputs": inputs,
    }
    return _write(config, current, previous, policy, optimizer, outcomes, metrics, team, clock)


def _load_state(
    config: "Config",
    previous: Iteration,
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
    policy_digest: str,
    team: Ranks,
) -> TrainerState | None:
    """Load the previous iteration's optimizer state; the first iteration has none and starts afresh."""
    if previous.index == 0:
        log.info("trainer: iteration 1 starts with a fresh optimizer from %s", previous.policy)
        return None
    return trainer_state.load(
        previous.trainer,
        policy,
        optimizer,
        team,
        iteration=previous.index,
        policy_digest=policy_digest,
        config_digest=config_digest(config),
    )


def _load_reference(config: "Config", files: Run, team: Ranks) -> "Emu3ForCausalLM | None":
    """The frozen starting policy; where no KL term is wanted it is not loaded."""
    if config.kl_coeff == 0:
        return None
    bfloat16 = config.dtype == "bfloat16"
    return sharding.load(files.iteration(0).policy, team, bfloat16, frozen=True, offload=config.reference_offload)


def _settings(config: "Config", iteration: int, vocabulary: Vocabulary, team: Ranks) -> grpo.Settings:
    text, vision = config.train_text_tokens_only, config.train_vision_tokens_only
    return grpo.Settings(
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
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
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
        policy_digest = _save_policy(policy, current.policy, previous.policy, runtime.policy_dtype(config), team)
        state = TrainerState(current.index, metrics["optimizer_steps"], policy_digest, **origin)
        with _folder_of_all(current.trainer, team) as folder:
            trainer_state.save(folder, policy, optimizer, state, team, config.policy_dtype == "bfloat16")
    metrics = {"iteration": current.index, **metrics, "policy_digest": policy_digest, **origin}
    peaks = team.gather(performance.peak_memory(team.device))
    if team.first:
        sampled_by = metrics["inputs"]["policy"]
        described = {"run": config.run_name, "iteration": str(current.index), "policy_digest": sampled_by, **origin}
        episodes.write(current.episodes, outcomes, described)
        _write_json(current.performance, _performance(clock, peaks, outcomes, team))
        _write_json(current.metrics, metrics)
    return metrics


def _save_policy(policy: "Emu3ForCausalLM", path: Path, tokenizer_from: Path, dtype: torch.dtype, team: Ranks) -> str:
    """Write the policy's folder from the first rank; return its digest on all."""
    digest = ""
    if team.first:
        with atomic.folder(path) as folder:
            digest = checkpoint.save_policy(policy, folder, tokenizer_from, dtype)
    else:
        for _ in checkpoint.whole_weights(policy, dtype):
            pass
    return team.of_first(digest)


@contextmanager
def _folder_of_all(path: Path, team: Ranks) -> Iterator[Path]:
    """Yield a temporary folder, the same on all ranks, that becomes `path` when all have left the block."""
    if team.first:
        with atomic.folder(path) as folder:
            team.of_first(folder)
            yield folder
            team.of_first(None)
    else:
        yield team.of_first(path)
        team.of_first(None)


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
