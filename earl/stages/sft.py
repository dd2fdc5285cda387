"""SFT stage: fine-tune a base model on tokenised pairs; its result is the starting policy and reference of RL."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from earl import residents, runtime, seeds
from earl.config.paths import SFT_FREE, SFT_USES, fine_tuning, policy_folder, resolve, validation_paths
from earl.data import mixing
from earl.data.example import Dataset, Example
from earl.data.tokenised import open_dataset
from earl.emu3 import sequence as grammar
from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import manifest
from earl.learner import attention, grpo, ranks, sft, sharding
from earl.learner.ranks import Ranks

if TYPE_CHECKING:
    from earl.config.schema import Config, Sft

CURVE = "sft.json"

log = logging.getLogger(__name__)


def run(config: "Config", name: str, out: Path) -> None:
    """Write the policy folder `out` of the fine-tuning `name`, with the curves of its steps in its `sft.json`:
    loss, gradient norm, learning rate and, where it is validated, held-out loss (see `sft.Progress`).

    Policies that `keep_checkpoints_every_n_steps` keeps go to `<out>.checkpoints/step-<n>`.

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
    validation = [resolve(config, path) for path in validation_paths(config, tuning)]
    opened = {"codebook_size": vocabulary.num_visual, "images": False}
    datasets = [open_dataset(path, **opened) for path in paths]
    for kind in ("learner", "reference"):
        residents.take(kind, None)  # Of what RL has left in memory nothing serves here, and it may fill the GPUs.
    policy = sharding.load(base, team, config.dtype == "bfloat16")
    mixture = mixing.mixture([len(dataset) for dataset in datasets], tuning.coefficients, tuning.random_seed)
    sequences = _Sequences(tuning, config.model_context_size, vocabulary)
    held_out = _held_out(tuning, [open_dataset(path, **opened) for path in validation], sequences)
    checkpoints, kept = (out.parent / f"{out.name}.{kind}" for kind in ("partial", "checkpoints"))
    identity = _identity(config, tuning, base, [*paths, *validation])
    settings = _settings(config, tuning, team.device)

    def sequence(index: int) -> sft.Example:
        dataset, row = mixture[index]
        return sequences.of(datasets[dataset], row)

    if team.first and not checkpoints.exists():  # What an earlier attempt kept is not this one's.
        shutil.rmtree(kept, ignore_errors=True)

    def keep(step: int) -> None:
        with ranks.folder(kept / f"step-{step:06d}", team) as folder:
            sharding.save(policy, folder, base, team)

    done = sft.fine_tune(policy, sequence, len(mixture), settings, checkpoints, identity, team, held_out, keep)
    with ranks.folder(out, team) as folder:
        if team.first:
            # Neither time nor code version: the folder's digest is that of the policy, whoever made the same weights.
            curve = json.dumps(done.curve(settings), indent=1)
            (folder / CURVE).write_text(curve + "\n", encoding="utf-8")
        digest = sharding.save(policy, folder, base, team)
    if team.first:
        shutil.rmtree(checkpoints, ignore_errors=True)
    log.info(
        "sft %s: %d steps by %d ranks, loss %.3f, policy %s in %s",
        *(name, done.step, team.size, done.losses[-1], digest[:12], out),
    )


class _Sequences:
    """Makes training sequences of examples."""

    def __init__(self, tuning: "Sft", longest: int, vocabulary: Vocabulary) -> None:
        self.reasoning, self.keys = tuning.reasoning, tuning.reasoning_keys
        self.longest = longest
        self.vocabulary = vocabulary
        self.missed: set[tuple[str, str]] = set()
        """Data sets and keys of reasoning that were missing once, and have been reported."""

    def of(self, dataset: Dataset, row: int) -> sft.Example:
        """Return the sequence of an example.

        Raises:
            EarlError: it lacks its edit or the reasoning that is wanted, or is too long.
        """
        example = dataset[row]
        where = f"{example.dataset}: example {example.example_id}"
        if example.target_tokens is None:
            raise EarlError(f"{where}: column 'target_tokens' is empty: there is no edit to learn from; leave it out")
        reasoning = self._reasoning(example, where) if self.reasoning else None
        try:
            ids, prompt_length = grammar.sft_ids(
                example.original_tokens, example.instruction, example.target_tokens, reasoning, self.vocabulary
            )
        except EarlError as error:
            raise EarlError(f"{where}: {error}") from error
        if len(ids) > self.longest:
            raise EarlError(f"{where}: {len(ids)} tokens are more than model_context_size = {self.longest}; raise it")
        prompt, completion = np.split(np.array(ids, dtype=np.int64), [prompt_length])
        return sft.Example(prompt, completion)

    def _reasoning(self, example: Example, where: str) -> list[tuple[str, str]]:
        if example.reasoning is None:
            raise EarlError(f"{where}: column 'reasoning' is empty, but reasoning is true; fine-tune without reasoning")
        if not self.keys:
            return example.reasoning
        found = dict(example.reasoning)
        chosen = [(key, found[key]) for key in self.keys if key in found]
        if not chosen:
            raise EarlError(
                f"{where}: column 'reasoning' has none of the reasoning_keys ({', '.join(self.keys)}); it has: "
                f"{', '.join(found) or 'nothing'}"
            )
        for key in self.keys:
            if key not in found and (example.dataset, key) not in self.missed:
                self.missed.add((example.dataset, key))
                log.warning("sft: %s has no reasoning %r; it and others without it are trained on the rest", where, key)
        return chosen


def _held_out(tuning: "Sft", datasets: list[Dataset], sequences: _Sequences) -> list[sft.Example]:
    """Return the sequences to validate on: as many of each data set, drawn once by the fine-tuning's seed."""
    if tuning.validation is None:
        return []
    share = max(1, tuning.validation.examples // len(datasets))
    found = []
    for index, dataset in enumerate(datasets):
        order = seeds.generator("sft-validation", tuning.random_seed, index).permutation(len(dataset))
        found += [sequences.of(dataset, int(row)) for row in order[:share]]
    return found


def _settings(config: "Config", tuning: "Sft", device: torch.device) -> sft.Settings:
    return sft.Settings(
        steps=tuning.steps,
        batch_size=tuning.batch_size,
        micro_batch=config.per_device_batch_size,
        learning_rate=tuning.learning_rate,
        final_learning_rate=tuning.final_learning_rate,
        schedule=tuning.schedule,
        warmup_steps=tuning.warmup_steps,
        adamw=grpo.AdamW((tuning.adam_beta1, tuning.adam_beta2), tuning.adam_epsilon, tuning.weight_decay),
        max_gradient_norm=tuning.max_gradient_norm,
        validate_every=tuning.validation and tuning.validation.every_n_steps,
        save_every=tuning.save_checkpoints_every_n_steps,
        keep_every=tuning.keep_checkpoints_every_n_steps,
        seed=tuning.random_seed,
        bfloat16=config.dtype == "bfloat16",
        packed=config.packing == "groups",
        attention=attention.choose(config.attention, device, config.dtype == "bfloat16"),
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _identity(config: "Config", tuning: "Sft", base: Path, paths: list[Path]) -> str:
    """Digest of what the fine-tuned weights depend on."""
    parts = {
        "sft": tuning.model_dump(mode="json", exclude={"base_model", "train_paths_file", *SFT_FREE}),
        "run": {name: getattr(config, name) for name in SFT_USES},
        "base": manifest.digest_folder(base),
        "data": [manifest.digest_folder(path) if path.is_dir() else manifest.digest_file(path) for path in paths],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
