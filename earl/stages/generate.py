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
from earl.stages import prompts, rounds
from earl.statistics import seeds

if TYPE_CHECKING:
    import torch
    from transformers import Emu3VQVAE

    from earl.config.schema import Config


@dataclass
class Policy:
    """What rollouts record of the policy that they are of."""

    vocabulary: Vocabulary
    policy_digest: str
    """Digest of the folder that holds the policy, or would if it were written."""

    @classmethod
    def of(cls, policy: Path) -> "Policy":
        """Read of a policy folder what needs no weights."""
        return cls(Vocabulary.from_folder(policy), manifest.digest_folder(policy))


@dataclass
class Sampler(Policy):
    """A policy in memory, ready to sample, with what turns its tokens into images."""

    engine: engines.Engine
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
        return cls(vocabulary, manifest.digest_folder(policy), engine, vision_tokenizer)

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
    config: "Config",
    iteration: int,
    shard: int,
    policy: Policy,
    out: Path,
    earlier: rounds.Earlier | None = None,
    ledger: Ledger | None = None,
) -> None:
    """Write one shard of an iteration's rollouts.

    Args:
        config: The run's resolved configuration.
        iteration: From 1 on; sets which prompts are drawn and every sample's seed.
        shard: From 0 to ``rollout_files - 1``. Groups never straddle shards.
        policy: The policy to sample from, that of the iteration before: a `Sampler`, unless `wanted` has no prompts.
        out: The Parquet file to write, schema `earl.files.tables.ROLLOUTS`.
        earlier: Of a further round of `dynamic_sampling`: what the rounds before it have come to.
        ledger: What rests in the iteration, see `earl.run.curriculum`.
    """
    indices = wanted(config, shard, earlier)
    drawn = (
        prompts.of_iteration(config, iteration, policy.vocabulary, indices, ledger) if indices else prompts.Drawn([])
    )
    plan = Plan(
        name=layout.iteration_name(iteration),
        examples=drawn.examples,
        samples=config.generations_per_sample,
        prefill=config.assistant_prefill,
        params=engines.SamplingParams(config.temperature, config.top_p, config.top_k, config.max_response_tokens),
    )
    where = {"iteration": str(iteration), "shard": str(shard), tables.LEFT_OUT: str(drawn.left_out)}
    where |= earlier.metadata() if earlier else {}
    if ledger is not None:
        where |= {tables.LEDGER: ledger.digest, tables.PASSED_OVER: str(drawn.passed_over)}
    _sample_and_write(config, plan, policy, out, where)


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


def wanted(config: "Config", shard: int, earlier: rounds.Earlier | None = None) -> range:
    """Return the indices of the prompts to sample for a shard: none where its round is not needed."""
    return range(0) if earlier is not None and earlier.is_enough else shard_of(config, shard)


def shard_of(config: "Config", shard: int) -> range:
    """Return the indices of the prompts of a shard within the iteration; a further round may have fewer than shards.

    Raises:
        EarlError: there is no such shard; when an iteration has more shards than batches.
    """
    shards, files = config.rollout_shards, config.rollout_files
    if not 0 <= shard < files:
        raise EarlError(f"shard {shard} does not exist; an iteration has {files} of them, so they are 0..{files - 1}")
    number, part = divmod(shard, shards)
    indices = config.prompts_of_round(number)
    cut = shard_slice(len(indices), shards, part, config.prompts_per_batch, may_be_empty=number > 0)
    return indices[cut.start : cut.stop]


def shard_slice(prompts: int, shards: int, shard: int, prompts_per_batch: int, may_be_empty: bool = False) -> range:
    """Return the prompts of a shard: whole engine batches, so that the cut between shards changes no batch.

    Raises:
        EarlError: when there are more shards than batches, unless some ``may_be_empty``.
    """
    batches = -(-prompts // prompts_per_batch)
    if shards > batches and not may_be_empty:
        raise EarlError(
            f"rollout_shards is {shards}, but {prompts} prompts make only {batches} batches of {prompts_per_batch}; "
            "lower rollout_shards"
        )
    start, stop = (edge * batches // shards * prompts_per_batch for edge in (shard, shard + 1))
    return range(start, min(stop, prompts))


def _sample_and_write(config: "Config", plan: Plan, policy: Policy, out: Path, where: dict[str, str]) -> None:
    vocabulary = policy.vocabulary
    columns: dict[str, list] = {name: [] for name in tables.ROLLOUTS.names}
    if plan.examples:
        assert isinstance(policy, Sampler)
        requests = [_request(config, plan, index, example, vocabulary) for index, example in plan.examples]
        completions = policy.engine.generate(requests, plan.params)
        columns = _columns(plan, requests, completions, vocabulary)
        columns |= _image_columns(plan, completions, vocabulary, policy.vision_tokenizer)
    metadata = {
        "run": config.run_name,
        **where,
        "policy_digest": policy.policy_digest,
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
