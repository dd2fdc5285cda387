"""SFT stage: fine-tune a base model on tokenised pairs, or on completions of a run; RL starts from its result."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from earl.config.paths import (
    SFT_FREE,
    SFT_USES,
    fine_tuning,
    fine_tuning_data,
    fine_tuning_inputs,
    policy_folder,
    resolve,
    validation_data,
)
from earl.data import mixing
from earl.data.example import Dataset, Example
from earl.data.tokenised import open_dataset
from earl.emu3 import adapter, saving
from earl.emu3 import sequence as grammar
from earl.emu3.vocabulary import Vocabulary
from earl.execution import ranks, runtime
from earl.execution.ranks import Ranks
from earl.files import manifest
from earl.learner import attention, sft, sharding
from earl.learner.settings import AdamW
from earl.messages.errors import EarlError
from earl.statistics import seeds

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

    from earl.config.schema import Config
    from earl.config.sections import Sft

CURVE = "sft.json"

log = logging.getLogger(__name__)


def run(config: "Config", name: str, out: Path) -> None:
    """Write the policy folder `out` of the fine-tuning `name`, with the curves of its steps in its `sft.json`:
    loss, gradient norm, learning rate and, where it is validated, held-out loss (see `sft.Progress`).

    An adapter is written as the sum with its base. Policies that `keep_checkpoints_every_n_steps` keeps go to
    `<out>.checkpoints/step-<n>`.

    Checkpoints go to `<out>.partial` beside it: killed at any time and started again, the stage goes on from the last
    one and ends in the same bytes. The folder is removed once `out` is complete. Under torchrun every rank calls this;
    another number of them changes the weights by rounding alone.

    Raises:
        EarlError: the configuration has no such fine-tuning; model or data are missing, damaged, of another
            vocabulary, or too long for the model; the loss is not finite.
    """
    tuning = fine_tuning(config, name)
    lora, bfloat16 = tuning.lora is not None, config.dtype == "bfloat16"
    # So that the frozen base of an adapter is held in bfloat16, and a reference can wait in main memory.
    splits_alone = (lora and bfloat16) or (tuning.objective == "dpo" and config.reference_offload)
    with ranks.joined(runtime.prepare(config), splits_alone) as team:
        _run(config, name, tuning, Path(out), team)


def _run(config: "Config", name: str, tuning: "Sft", out: Path, team: Ranks) -> None:
    base = policy_folder(config, tuning.base_model)
    adapter.check_full(base)
    vocabulary, beside = Vocabulary.from_folder(base), saving.companions(base)
    data = fine_tuning_data(config, name)
    build = _Builder(tuning, _opened(config, data.references, vocabulary), vocabulary)
    lora, bfloat16 = tuning.lora and tuning.lora.settings, config.dtype == "bfloat16"
    policy = (
        sharding.load_with_adapter(base, lora, tuning.random_seed, team, bfloat16)
        if lora
        else sharding.load(base, team, bfloat16)
    )
    reference = _reference(config, tuning, policy, base, team)
    with data.named():
        sizes = [len(dataset) for dataset in build.datasets]
        mixture = mixing.mixture(sizes, tuning.coefficients, tuning.random_seed)
        left_out = _too_long(config, build, mixture, team)
    sequence = _sequences(build, mixture, left_out)
    held_out, left_out_held_out = _held_out(config, name, vocabulary, team)
    checkpoints, kept = (out.parent / f"{out.name}.{kind}" for kind in ("partial", "checkpoints"))
    paths = [resolve(config, path) for path in fine_tuning_inputs(config, name)]
    identity = _identity(config, tuning, base, paths)
    settings = _settings(config, tuning, team.device)

    if team.first and sft.newest(checkpoints, identity) is None:  # What an earlier attempt kept is not this one's.
        shutil.rmtree(kept, ignore_errors=True)

    def keep(step: int) -> None:
        with ranks.folder(kept / f"step-{step:06d}", team) as folder:
            saving.save_policy(policy, folder, beside, torch.float32, team, lora)

    loop = (len(mixture), settings, checkpoints, identity, team, held_out, keep, reference)
    done = sft.fine_tune(policy, sequence, *loop)
    with ranks.folder(out, team) as folder:
        if team.first:
            # Neither time nor code version: the folder's digest is that of the policy, whoever made the same weights.
            curve = done.curve(settings) | {"left_out_examples": len(left_out)}
            if tuning.validation:
                curve["left_out_validation_examples"] = left_out_held_out
            (folder / CURVE).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
        digest = saving.save_policy(policy, folder, beside, torch.float32, team, lora)
    if team.first:
        shutil.rmtree(checkpoints, ignore_errors=True)
    log.info(
        "sft %s: %d steps by %d ranks, loss %.3f, policy %s in %s",
        *(name, done.step, team.size, done.losses[-1], digest[:12], out),
    )


def _opened(config: "Config", references: list[str], vocabulary: Vocabulary) -> list[Dataset]:
    found = [resolve(config, reference) for reference in references]
    return [open_dataset(path, vocabulary.num_visual, images=False, tokenizer=vocabulary.digest) for path in found]


def _reference(
    config: "Config", tuning: "Sft", policy: "Emu3ForCausalLM", base: Path, team: Ranks
) -> "Emu3ForCausalLM | None":
    """Return the frozen reference of DPO, the model that it starts from; None where there is none.

    Of an adapter it is `policy` itself, which computes it without the adapter.
    """
    if tuning.objective != "dpo":
        return None
    if tuning.lora is not None:
        return policy
    return sharding.load(base, team, config.dtype == "bfloat16", frozen=True, offload=config.reference_offload)


class _Builder:
    """Makes the training sequence of a row of data sets, and says what messages call the row.

    Attributes:
        missing: a row that lacked a key of `reasoning_keys`, by data set and key.
    """

    def __init__(self, tuning: "Sft", datasets: list[Dataset], vocabulary: Vocabulary) -> None:
        self.reasoning, self.keys = tuning.reasoning, tuning.reasoning_keys
        self.fraction, self.seed = tuning.reasoning_fraction, tuning.random_seed
        self.learns_instructions = tuning.instruction_loss_weight > 0
        self.pairs = tuning.objective == "dpo"
        self.datasets = datasets
        self.vocabulary = vocabulary
        self.missing: dict[tuple[str, str], str] = {}

    def __call__(self, row: mixing.Row) -> tuple[str, sft.Example]:
        """Return the name of a row and its sequence.

        Raises:
            EarlError: the example lacks its edit, the reasoning that is wanted, or the other completion of a pair.
        """
        example = self.datasets[row[0]][row[1]]
        where = f"{example.dataset}: example {example.example_id}"
        if example.target_tokens is None:
            raise EarlError(f"{where}: column 'target_tokens' is empty: there is no edit to learn from; leave it out")
        if self.pairs and example.rejected is None:
            raise EarlError(f"{where}: is no pair of completions, which dpo learns from; name stage:select/<selection>")
        reasoning = self._reasoning(example, where) if example.chosen is None and self._reasons(row) else None
        try:
            ids, prompt_length = self._ids(example, reasoning)
        except EarlError as error:
            raise EarlError(f"{where}: {error}") from error
        instruction = 0
        if self.learns_instructions:
            instruction = prompt_length - 1 - len(grammar.image_ids(example.original_tokens, self.vocabulary))
        prompt, completion = np.split(np.array(ids, dtype=np.int64), [prompt_length - instruction])
        return where, sft.Example(prompt, completion, instruction, example.rejected if self.pairs else None)

    def _ids(self, example: Example, reasoning: list[tuple[str, str]] | None) -> tuple[list[int], int]:
        """Return a sequence and the length of its prompt; a completion that was sampled stays as it is."""
        asked = example.original_tokens, example.instruction
        if example.chosen is None:
            return grammar.sft_ids(*asked, example.target_tokens, reasoning, self.vocabulary)
        prompt = grammar.prompt_ids(*asked, "", self.vocabulary)
        return [*prompt, *example.chosen], len(prompt)

    def _reasons(self, row: mixing.Row) -> bool:
        """Return whether the sequence of a row holds its reasoning; the same rows for any number of steps."""
        if not self.reasoning or self.fraction == 1:
            return self.reasoning
        return seeds.generator("sft-reasoning", self.seed, *row).random() < self.fraction

    def _reasoning(self, example: Example, where: str) -> list[tuple[str, str]]:
        if not example.reasoning:
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
            if key not in found:
                self.missing.setdefault((example.dataset, key), where)
        return chosen

    def warn(self, team: Ranks) -> None:
        """Log, once for each data set and key, which reasoning was missing in the rows that any rank has built."""
        found: dict[tuple[str, str], str] = {}
        for missing in team.gather(self.missing):
            found = missing | found
        for (_, key), where in found.items() if team.first else ():
            log.warning("sft: %s has no reasoning %r; it and others without it are trained on the rest", where, key)


def _too_long(config: "Config", build: _Builder, mixture: mixing.Mixture, team: Ranks) -> set[mixing.Row]:
    """Look at every example before the first step; return those that are longer than `model_context_size`.

    Each rank looks at a part of them.

    Raises:
        EarlError: one cannot be learned from; all are too long, or some are and `long_prompts` is `stop`.
    """
    found, first = set(), None
    for row in islice(mixture.rows(), team.rank, None, team.size):
        where, example = build(row)
        if len(example) > config.model_context_size:
            found.add(row)
            first = first or _length(config, where, example)
    build.warn(team)
    together = team.gather((found, first))
    found = set().union(*(rows for rows, _ in together))
    _check_left_out(config, len(found), mixture.distinct, next((first for _, first in together if first), ""))
    return found


def _length(config: "Config", where: str, example: sft.Example) -> str:
    return f"{where}: {len(example)} tokens where model_context_size is {config.model_context_size}"


def _check_left_out(config: "Config", count: int, looked_at: int, first: str) -> None:
    """Say how many examples are too long; EarlError where these are all, or `long_prompts` is `stop`."""
    if not count:
        return
    said = f"{count} of {looked_at} examples are too long; first {first}"
    if count == looked_at:
        raise EarlError(f"{said}. These are all of them; raise model_context_size")
    if config.long_prompts == "stop":
        raise EarlError(f"{said}; raise it, or set long_prompts, which is `stop`, to `leave_out`")
    log.warning("sft: %s; the next ones take their places", said)


def _sequences(build: _Builder, mixture: mixing.Mixture, left_out: set[mixing.Row]) -> Callable[[int], sft.Example]:
    """Return the function from an index of the mixture to its training sequence, or to that of the next one left."""

    def sequence(index: int) -> sft.Example:
        while mixture[index] in left_out:
            index = (index + 1) % len(mixture)
        return build(mixture[index])[1]

    return sequence


def _held_out(config: "Config", name: str, vocabulary: Vocabulary, team: Ranks) -> tuple[list[sft.Example], int]:
    """Return the sequences to validate on, and how many were too long: the next ones took their places.

    Of each data set come as many, in an order that is drawn once by the fine-tuning's seed.

    Raises:
        EarlError: as of `_too_long`.
    """
    tuning, data = fine_tuning(config, name), validation_data(config, name)
    if data is None or tuning.validation is None:
        return [], 0
    found: list[sft.Example] = []
    too_long: list[str] = []
    with data.named():
        if not data.references:
            raise EarlError("there is no data set to validate on; name some, or set validation to null")
        build = _Builder(tuning, _opened(config, data.references, vocabulary), vocabulary)
        share = max(1, tuning.validation.examples // len(build.datasets))
        for index, dataset in enumerate(build.datasets):
            order = seeds.generator("sft-validation", tuning.random_seed, index).permutation(len(dataset))
            wanted = len(found) + share
            for row in order:
                if len(found) == wanted:
                    break
                where, example = build((index, int(row)))
                if len(example) > config.model_context_size:
                    too_long.append(_length(config, where, example))
                else:
                    found.append(example)
        build.warn(team)
        _check_left_out(config, len(too_long), len(too_long) + len(found), too_long[0] if too_long else "")
    return found, len(too_long)


def _settings(config: "Config", tuning: "Sft", device: torch.device) -> sft.Settings:
    return sft.Settings(
        steps=tuning.steps,
        batch_size=tuning.batch_size,
        micro_batch=config.per_device_batch_size,
        learning_rate=tuning.learning_rate,
        final_learning_rate=tuning.final_learning_rate,
        schedule=tuning.schedule,
        decay_steps=tuning.decay_steps,
        instruction_loss_weight=tuning.instruction_loss_weight,
        dpo_beta=tuning.dpo_beta,
        warmup_steps=tuning.warmup_steps,
        adamw=AdamW((tuning.adam_beta1, tuning.adam_beta2), tuning.adam_epsilon, tuning.weight_decay),
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
