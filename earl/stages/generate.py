"""Generate: sample completions from a policy and decode them to images. Writes facts only, no reward."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl import code_version, engines
from earl.config import freeze
from earl.config.paths import vision_tokenizer_folder
from earl.data.tokenised import Example
from earl.emu3 import checkpoint, sequence, vision
from earl.emu3.vocabulary import Vocabulary
from earl.execution import runtime
from earl.files import images, layout, manifest, tables
from earl.messages.errors import EarlError
from earl.run.curriculum import Ledger
from earl.stages import prompts
from earl.statistics import seeds

if TYPE_CHECKING:
    import torch
    from transformers import Emu3VQVAE

    from earl.config.schema import Config


@dataclass
class Sampler:
    """A policy in memory, ready to sample, with what turns its tokens into images."""

    engine: engines.Engine
    vocabulary: Vocabulary
    policy_digest: str
    """Digest of the folder that holds the policy, or would if it were written."""
    vision_tokenizer: "Emu3VQVAE"

    @classmethod
    def load(cls, config: "Config", policy: Path) -> "Sampler":
        """Load a policy folder into the configured engine; of several ranks all do so together.

        Raises:
            EarlError: see `engines.get`, `engines.Engine.load` and `checkpoint.load_vision_tokenizer`.
        """
        device = runtime.prepare(config)
        vocabulary = Vocabulary.from_folder(policy)
        vision_tokenizer = checkpoint.load_vision_tokenizer(vision_tokenizer_folder(config), device)
        engine = engines.get(config)
        engine.load(policy)
        return cls(engine, vocabulary, manifest.digest_folder(policy), vision_tokenizer)

    def update(self, weights: "Iterable[tuple[str, torch.Tensor]]", policy_digest: str) -> None:
        """Go on with other weights of the same architecture and tokenizer; see `engines.Engine.update`."""
        self.engine.update(weights, policy_digest)
        self.policy_digest = policy_digest


@dataclass(frozen=True)
class Plan:
    """Which prompts to sample, how, and under which names."""

    name: str
    """Prefix of the group ids, and the place of the draws in the run's randomness."""
    examples: list[tuple[int, Example]]
    """Index of each prompt within the iteration, and its example."""
    samples: int
    prefill: str
    params: engines.SamplingParams


def run(
    config: "Config", iteration: int, shard: int, sampler: Sampler, out: Path, ledger: Ledger | None = None
) -> None:
    """Write one shard of an iteration's rollouts.

    Args:
        config: The run's resolved configuration.
        iteration: From 1 on; sets which prompts are drawn and every sample's seed.
        shard: From 0 to ``rollout_shards - 1``. Groups never straddle shards.
        sampler: Holds the policy to sample from, that of the iteration before.
        out: The Parquet file to write, schema `earl.files.tables.ROLLOUTS`.
        ledger: What rests in the iteration, see `earl.run.curriculum`.
    """
    drawn = prompts.of_iteration(config, iteration, sampler.vocabulary, shard_of(config, shard), ledger)
    plan = Plan(
        name=layout.iteration_name(iteration),
        examples=drawn.examples,
        samples=config.generations_per_sample,
        prefill=config.assistant_prefill,
        params=engines.SamplingParams(config.temperature, config.top_p, config.top_k, config.max_response_tokens),
    )
    where = {"iteration": str(iteration), "shard": str(shard), tables.LEFT_OUT: str(drawn.left_out)}
    if ledger is not None:
        where |= {tables.LEDGER: ledger.digest, tables.PASSED_OVER: str(drawn.passed_over)}
    _sample_and_write(config, plan, sampler, out, where)


def run_evaluation(config: "Config", name: str, iteration: int, sampler: Sampler, out: Path) -> None:
    """Write the rollouts of a held-out evaluation of the policy of ``iteration``.

    The prompts and every seed depend on the evaluation's name alone, so that policies are compared on equal draws.
    """
    drawn = prompts.of_evaluation(config, name, sampler.vocabulary)
    wanted = config.evaluations[name]
    plan = Plan(
        name=name,
        examples=drawn.examples,
        samples=wanted.samples_per_prompt,
        prefill=config.prefill(name),
        params=engines.SamplingParams(wanted.temperature, wanted.top_p, wanted.top_k, config.max_response_tokens),
    )
    sampling = json.dumps(freeze.sampling(config, name))
    where = {"evaluation": name, "iteration": str(iteration), tables.SAMPLING: sampling}
    _sample_and_write(config, plan, sampler, out, where)


def shard_of(config: "Config", shard: int) -> range:
    """Return the indices of the prompts of a shard within the iteration."""
    return shard_slice(config.prompts_per_iteration, config.rollout_shards, shard, config.prompts_per_batch)


def shard_slice(prompts: int, shards: int, shard: int, prompts_per_batch: int) -> range:
    """Return the prompts of a shard: whole engine batches, so that the cut between shards changes no batch.

    Raises:
        EarlError: when there are more shards than batches.
    """
    batches = -(-prompts // prompts_per_batch)
    if shards > batches:
        raise EarlError(
            f"rollout_shards is {shards}, but {prompts} prompts make only {batches} batches of {prompts_per_batch}; "
            "lower rollout_shards"
        )
    if not 0 <= shard < shards:
        raise EarlError(f"shard {shard} does not exist; rollout_shards is {shards}, so shards are 0..{shards - 1}")
    start, stop = (edge * batches // shards * prompts_per_batch for edge in (shard, shard + 1))
    return range(start, min(stop, prompts))


def _sample_and_write(config: "Config", plan: Plan, sampler: Sampler, out: Path, where: dict[str, str]) -> None:
    vocabulary = sampler.vocabulary
    requests = [_request(config, plan, index, example, vocabulary) for index, example in plan.examples]
    completions = sampler.engine.generate(requests, plan.params)
    columns = _columns(plan, requests, completions, vocabulary)
    columns |= _image_columns(plan, completions, vocabulary, sampler.vision_tokenizer)
    metadata = {
        "run": config.run_name,
        **where,
        "policy_digest": sampler.policy_digest,
        "config_digest": freeze.config_digest(config),
        "code_version": code_version(),
    }
    tables.write_table(out, tables.ROLLOUTS, columns, metadata, largest_token=vocabulary.size - 1)


def _request(config: "Config", plan: Plan, index: int, example: Example, vocabulary: Vocabulary) -> engines.Request:
    prompt = sequence.prompt_ids(example.original_tokens, example.instruction, plan.prefill, vocabulary)
    place = ("rollout", config.random_seed, plan.name, index)
    return engines.Request(
        prompt_token_ids=prompt,
        grid=example.original_tokens.shape,
        seeds=[seeds.seed(*place, sample) for sample in range(plan.samples)],
    )


def _columns(
    plan: Plan,
    requests: Sequence[engines.Request],
    completions: Sequence[Sequence[engines.Completion]],
    vocabulary: Vocabulary,
) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in tables.ROLLOUTS.names}
    for (index, example), request, samples in zip(plan.examples, requests, completions, strict=True):
        for sample, completion in enumerate(samples):
            group = f"{plan.name}-{index:04d}"
            columns["episode_id"].append(f"{group}-{sample:02d}")
            columns["group_id"].append(group)
            columns["sample_index"].append(sample)
            columns["prompt_token_ids"].append(request.prompt_token_ids)
            columns["completion_token_ids"].append(completion.token_ids)
            columns["behavior_logprobs"].append(completion.logprobs)
            columns["finish_reason"].append(completion.finish_reason)
            columns["completion_text"].append(sequence.completion_text(completion.token_ids, vocabulary))
            for name in ("dataset", "example_id", "task", "instruction"):
                columns[name].append(getattr(example, name))
    return columns


def _image_columns(
    plan: Plan,
    completions: Sequence[Sequence[engines.Completion]],
    vocabulary: Vocabulary,
    vision_tokenizer: "Emu3VQVAE",
) -> dict[str, list]:
    """Return the columns original, target and edited; images that the data do not hold are decoded from tokens."""

    def decoded(grids: list) -> list[bytes | None]:
        known = [index for index, grid in enumerate(grids) if grid is not None]
        pixels = vision.decode(vision_tokenizer, [grids[index] for index in known])
        found: list[bytes | None] = [None] * len(grids)  # a target may be unknown, an edit may hold no image
        for index, image in zip(known, pixels, strict=True):
            found[index] = images.encode(image)
        return found

    examples = [example for _, example in plan.examples]
    originals = decoded([e.original_tokens if e.original is None else None for e in examples])
    targets = decoded([e.target_tokens if e.target is None else None for e in examples])
    edited = decoded([sequence.parse_completion(c.token_ids, vocabulary) for samples in completions for c in samples])
    by_prompt = [
        (images.struct(e.original or original), images.struct(e.target or target))
        for e, original, target in zip(examples, originals, targets, strict=True)
    ]
    return {
        "original": [pair[0] for pair in by_prompt for _ in range(plan.samples)],
        "target": [pair[1] for pair in by_prompt for _ in range(plan.samples)],
        "edited": [images.struct(data) for data in edited],
    }
