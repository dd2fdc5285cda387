"""SFT stage: fine-tune a base model on tokenised pairs; its result is the starting policy and reference of RL."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from earl import residents, runtime
from earl.config.paths import SFT_USES, fine_tuning, policy_folder, resolve
from earl.data import mixing
from earl.data.example import Dataset
from earl.data.tokenised import open_dataset
from earl.emu3 import sequence as grammar
from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import manifest
from earl.learner import attention, ranks, sft, sharding
from earl.learner.ranks import Ranks

if TYPE_CHECKING:
    from earl.config.schema import Config, Sft

LOSSES = "sft.json"

log = logging.getLogger(__name__)


def run(config: "Config", name: str, out: Path) -> None:
    """Write the policy folder `out` of the fine-tuning `name`, with the loss of every step in its `sft.json`.

    Checkpoints go to `<out>.partial` beside it: killed at any time and started again, the stage goes on from the last
    one and ends in the same bytes. The folder is removed once `out` is complete. Under torchrun every rank calls this;
    another number of them changes the weights by rounding alone.

    Raises:
        EarlError: the configuration has no such fine-tuning; model or data are missing, damaged, of another
            vocabulary, or too long for the model; the loss is not finite.
    """
    tuning = fine_tuning(config, name)
    with ranks.joined(runtime.prepare(config)) as team:
        _run(config, name, tuning, Path(out), team)


def _run(config: "Config", name: str, tuning: "Sft", out: Path, team: Ranks) -> None:
    base = policy_folder(config, tuning.base_model)
    paths = [resolve(config, path) for path in tuning.train_paths_file]
    vocabulary = Vocabulary.from_folder(base)
    datasets = [open_dataset(path, codebook_size=vocabulary.num_visual, images=False) for path in paths]
    for kind in ("learner", "reference"):
        residents.take(kind, None)  # Of what RL has left in memory nothing serves here, and it may fill the GPUs.
    policy = sharding.load(base, team, config.dtype == "bfloat16")
    mixture = mixing.mixture([len(dataset) for dataset in datasets], tuning.coefficients, tuning.random_seed)
    sequence = _sequences(tuning.reasoning, config.model_context_size, datasets, mixture, vocabulary)
    checkpoints = out.parent / f"{out.name}.partial"
    identity = _identity(config, tuning, base, paths)
    settings = _settings(config, tuning, team.device)
    losses = sft.fine_tune(policy, sequence, len(mixture), settings, checkpoints, identity, team)
    with ranks.folder(out, team) as folder:
        if team.first:
            # Neither time nor code version: the folder's digest is that of the policy, whoever made the same weights.
            (folder / LOSSES).write_text(json.dumps({"loss": losses}, indent=1) + "\n", encoding="utf-8")
        digest = sharding.save(policy, folder, base, team)
    if team.first:
        shutil.rmtree(checkpoints, ignore_errors=True)
    log.info(
        "sft %s: %d steps by %d ranks, loss %.3f, policy %s in %s",
        *(name, len(losses), team.size, losses[-1], digest[:12], out),
    )


def _sequences(
    reasoning: bool, longest: int, datasets: list[Dataset], mixture: mixing.Mixture, vocabulary: Vocabulary
) -> Callable[[int], sft.Example]:
    """Return the function from a place in the mixture to its training sequence."""

    def sequence(index: int) -> sft.Example:
        dataset, row = mixture[index]
        example = datasets[dataset][row]
        where = f"{example.dataset}: example {example.example_id}"
        if reasoning and not example.reasoning:
            raise EarlError(f"{where}: column 'reasoning' is empty, but reasoning is true; fine-tune without reasoning")
        if example.target_tokens is None:
            raise EarlError(f"{where}: column 'target_tokens' is empty: there is no edit to learn from; leave it out")
        try:
            ids, prompt_length = grammar.sft_ids(
                example.original_tokens,
                example.instruction,
                example.target_tokens,
                example.reasoning if reasoning else None,
                vocabulary,
            )
        except EarlError as error:
            raise EarlError(f"{where}: {error}") from error
        if len(ids) > longest:
            raise EarlError(f"{where}: {len(ids)} tokens are more than model_context_size = {longest}; raise it")
        prompt, completion = np.split(np.array(ids, dtype=np.int64), [prompt_length])
        return sft.Example(prompt, completion)

    return sequence


def _settings(config: "Config", tuning: "Sft", device: torch.device) -> sft.Settings:
    return sft.Settings(
        steps=tuning.steps,
        batch_size=tuning.batch_size,
        micro_batch=config.per_device_batch_size,
        learning_rate=tuning.learning_rate,
        warmup_steps=tuning.warmup_steps,
        seed=tuning.random_seed,
        bfloat16=config.dtype == "bfloat16",
        packed=config.packing == "groups",
        attention=attention.choose(config.attention, device, config.dtype == "bfloat16"),
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _identity(config: "Config", tuning: "Sft", base: Path, paths: list[Path]) -> str:
    """Digest of what the fine-tuned weights depend on."""
    parts = {
        "sft": tuning.model_dump(mode="json", exclude={"base_model", "train_paths_file"}),
        "run": {name: getattr(config, name) for name in SFT_USES},
        "base": manifest.digest_folder(base),
        "data": [manifest.digest_folder(path) if path.is_dir() else manifest.digest_file(path) for path in paths],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
