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

from earl import runtime
from earl.config.paths import resolve
from earl.data import mixing
from earl.data.example import Dataset
from earl.data.tokenised import open_dataset
from earl.emu3 import checkpoint
from earl.emu3 import sequence as grammar
from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import atomic, manifest
from earl.learner import sft

if TYPE_CHECKING:
    from earl.config.schema import Config

LOSSES = "sft.json"

log = logging.getLogger(__name__)


def run(config: "Config", out: Path) -> None:
    """Write the fine-tuned policy folder `out`, with the loss of every step in its `sft.json`.

    Checkpoints go to `<out>.partial` beside it: killed at any time and started again, the stage goes on from the last
    one and ends in the same bytes. The folder is removed once `out` is complete.

    Raises:
        EarlError: the configuration has no `sft`; model or data are missing, damaged, of another vocabulary, or too
            long for the model; the loss is not finite.
    """
    if config.sft is None:
        raise EarlError("sft is null in this configuration, so there is nothing to fine-tune; set sft or model_path")
    out, base = Path(out), resolve(config, config.sft.base_model)
    device = runtime.prepare(config)
    paths = [resolve(config, path) for path in config.sft.train_paths_file]
    vocabulary = Vocabulary.from_folder(base)
    datasets = [open_dataset(path, codebook_size=vocabulary.num_visual, images=False) for path in paths]
    policy = checkpoint.load_policy(base, torch.float32, device)
    mixture = mixing.mixture([len(dataset) for dataset in datasets], config.sft.coefficients, config.sft.random_seed)
    sequence = _sequences(config, datasets, mixture, vocabulary)
    checkpoints = out.parent / f"{out.name}.partial"
    losses = sft.fine_tune(
        policy, sequence, len(mixture), _settings(config), checkpoints, _identity(config, base, paths)
    )
    with atomic.folder(out) as folder:
        # Neither time nor code version: the folder's digest is that of the policy, whoever made the same weights.
        (folder / LOSSES).write_text(json.dumps({"loss": losses}, indent=1) + "\n", encoding="utf-8")
        digest = checkpoint.save_policy(policy, folder, base)
    shutil.rmtree(checkpoints, ignore_errors=True)
    log.info("sft: %d steps, loss %.3f, policy %s in %s", len(losses), losses[-1], digest[:12], out)


def _sequences(
    config: "Config", datasets: list[Dataset], mixture: mixing.Mixture, vocabulary: Vocabulary
) -> Callable[[int], sft.Example]:
    def sequence(index: int) -> sft.Example:
        dataset, row = mixture[index]
        example = datasets[dataset][row]
        where = f"{example.dataset}: example {example.example_id}"
        if config.sft.reasoning and example.reasoning is None:
            raise EarlError(f"{where}: column 'reasoning' is empty, but sft.reasoning is true; train without reasoning")
        try:
            ids, prompt_length = grammar.sft_ids(
                example.original_tokens,
                example.instruction,
                example.target_tokens,
                example.reasoning if config.sft.reasoning else None,
                vocabulary,
            )
        except EarlError as error:
            raise EarlError(f"{where}: {error}") from error
        if len(ids) > config.model_context_size:
            raise EarlError(
                f"{where}: {len(ids)} tokens are more than model_context_size = {config.model_context_size}"
            )
        return sft.Example(np.array(ids, dtype=np.int64), prompt_length)

    return sequence


def _settings(config: "Config") -> sft.Settings:
    return sft.Settings(
        steps=config.sft.steps,
        batch_size=config.sft.batch_size,
        micro_batch=config.per_device_batch_size,
        learning_rate=config.sft.learning_rate,
        warmup_steps=config.sft.warmup_steps,
        seed=config.sft.random_seed,
        bfloat16=config.dtype == "bfloat16",
    )


def _identity(config: "Config", base: Path, paths: list[Path]) -> str:
    """Digest of what the fine-tuned weights depend on."""
    parts = {
        "sft": config.sft.model_dump(mode="json"),
        "dtype": config.dtype,
        "cpu_threads": config.cpu_threads,
        "micro_batch": config.per_device_batch_size,
        "model_context_size": config.model_context_size,
        "base": manifest.digest_folder(base),
        "data": [manifest.digest_folder(path) if path.is_dir() else manifest.digest_file(path) for path in paths],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
