"""Train stage: from policy i-1 and its scored rollouts to policy i."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING, Any

import torch

from earl import code_version, replays, runtime
from earl.config.freeze import config_digest
from earl.emu3 import checkpoint
from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import atomic, manifest
from earl.layout import Iteration, Run
from earl.learner import episodes, grpo, objective, trainer_state
from earl.learner.trainer_state import TrainerState

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

    from earl.config.schema import Config

log = logging.getLogger(__name__)


def run(config: "Config", run_path: Path, iteration: int, shards: int | None = None) -> dict[str, Any]:
    """Train iteration `iteration` of a run and write its `trainer/`, `policy/` and `train/`; return the metrics.

    Everything cheap is checked before a model is loaded. `train/metrics.json` is written last: where it is, the
    iteration is complete. Rerunning writes the same bytes.

    Args:
        run_path: run folder holding the previous iteration's policy and (from the second on) trainer, the starting
            policy in iteration 0 as reference, and the rollouts and scores of this iteration (of a replay: its source
            does, see `earl.replays`).
        iteration: 1 is the first.
        shards: number of rollout shards on disk, `rollout_shards` by default.

    Raises:
        EarlError: an input is missing, damaged or another's; too many judgements failed; the loss is not finite.
    """
    if iteration < 1:
        raise EarlError(f"iteration is {iteration}; the first that can be trained is 1")
    files = Run(Path(run_path))
    current, previous = files.iteration(iteration), files.iteration(iteration - 1)
    device = runtime.prepare(config)
    policy_digest = manifest.digest_folder(previous.policy)
    stored = replays.stored(files, iteration, policy_digest, shards or config.rollout_shards)
    source = episodes.read(stored.files, stored.shards, stored.sampled_by, config.episodes_per_iteration)
    stored.check(source)
    outcomes = episodes.reward_all(source, config, str(current.path))
    vocabulary = Vocabulary.from_folder(previous.policy)
    used = episodes.learner_episodes(outcomes, vocabulary, config.emu3_use_logit_processor, str(current.path))

    policy = checkpoint.load_policy(previous.policy, torch.float32, device)
    optimizer = grpo.new_optimizer(policy, config.learning_rate)
    state = _load_state(config, previous, policy, optimizer, policy_digest)
    reference = _load_reference(config, files, device)
    settings = _settings(config, iteration, vocabulary)
    if stored.off_policy:
        replays.check_support(config)
        log.info("train: iteration %d is of another policy's episodes, so parity_tolerance is not applied", iteration)
        settings = replace(settings, parity_tolerance=None)
    started = time.monotonic()
    learned = grpo.train_iteration(policy, reference, optimizer, used, settings, f"train {iteration}")
    _log_speed(used, time.monotonic() - started, device)

    inputs = {
        "policy": policy_digest,
        "trainer": manifest.digest_folder(previous.trainer) if state else None,
        "reference": manifest.digest_folder(files.iteration(0).policy) if reference else None,
        "rollouts": source.rollouts,
        "scores": source.scores,
        **stored.inputs(),
    }
    steps = learned.pop("steps") + (state.optimizer_steps if state else 0)
    metrics = {
        **episodes.metrics(outcomes),
        **learned,
        "counted": settings.counted,
        "learning_rate": config.learning_rate,
        "optimizer_steps": steps,
        "rubrics_digest": source.rubrics,
        "inputs": inputs,
    }
    return _write(config, current, previous, policy, optimizer, outcomes, metrics)


def _log_speed(used: list[grpo.Episode], seconds: float, device: torch.device) -> None:
    """To the log, not to metrics.json, which holds nothing that differs between two runs over the same files."""
    tokens = sum(map(len, used))
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    log.info(
        "train: %d tokens in %.1f s, %.0f tokens/s; peak %s memory %.0f MiB",
        tokens,
        seconds,
        tokens / seconds,
        "GPU" if on_gpu else "process",
        peak / 2**20,
    )


def _load_state(
    config: "Config",
    previous: Iteration,
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
    policy_digest: str,
) -> TrainerState | None:
    """Load the previous iteration's optimizer state; the first iteration has none and starts afresh."""
    if previous.index == 0:
        log.info("trainer: iteration 1 starts with a fresh optimizer from %s", previous.policy)
        return None
    return trainer_state.load(
        previous.trainer,
        policy,
        optimizer,
        iteration=previous.index,
        policy_digest=policy_digest,
        config_digest=config_digest(config),
    )


def _load_reference(config: "Config", files: Run, device: torch.device) -> "Emu3ForCausalLM | None":
    """The frozen starting policy; where no KL term is wanted it is not loaded."""
    if config.kl_coeff == 0:
        return None
    return checkpoint.load_policy(files.iteration(0).policy, torch.float32, device).requires_grad_(False)


def _settings(config: "Config", iteration: int, vocabulary: Vocabulary) -> grpo.Settings:
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
    )


def _write(
    config: "Config",
    current: Iteration,
    previous: Iteration,
    policy: "Emu3ForCausalLM",
    optimizer: torch.optim.Optimizer,
    outcomes: list[episodes.Outcome],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    origin = {"config_digest": config_digest(config), "code_version": code_version()}
    # What stands there from before is not of the policy that is about to be written.
    current.metrics.unlink(missing_ok=True)
    with atomic.folder(current.policy) as folder:
        policy_digest = checkpoint.save_policy(policy, folder, previous.policy)
    state = TrainerState(current.index, metrics["optimizer_steps"], policy_digest, **origin)
    with atomic.folder(current.trainer) as folder:
        trainer_state.save(folder, policy, optimizer, state)
    sampled_by = metrics["inputs"].get("sampled_by", metrics["inputs"]["policy"])
    described = {"run": config.run_name, "iteration": str(current.index), "policy_digest": sampled_by, **origin}
    episodes.write(current.episodes, outcomes, described)
    metrics = {"iteration": current.index, **metrics, "policy_digest": policy_digest, **origin}
    atomic.write_text(current.metrics, json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return metrics
