"""The shapes world's policy: sampler and learner on the GPU against the CPU, in float32, and each against itself."""

from pathlib import Path

import numpy as np
import torch

import earl
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Range
from earl.emu3 import grid, saving, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Completion, Request, SamplingParams
from earl.engines.torch_engine import TorchEngine
from earl.execution import ranks
from earl.execution.ranks import Ranks
from earl.learner import batches, grpo, logprobs, sharding
from earl.learner.settings import Settings

FOLDER = Path(earl.__file__).parent / "shapes" / "base_policy"
SIZE = (8, 8)
SAMPLES = 8
PARITY = 1e-3
"""Nats: what float32 may leave between a GPU's log-prob and a CPU's."""


def run(context: Context) -> None:
    vocabulary = Vocabulary.from_folder(FOLDER)
    prompts = requests(vocabulary, 1 if context.small else 4)
    cpu = _sampled(context, torch.device("cpu"), torch.float32, prompts)
    with context.attempt("sampler"):
        _compare_samplers(context, prompts, cpu)
    with context.attempt("learner"):
        _compare_learners(context, episodes(prompts, cpu, vocabulary), vocabulary)
    with context.attempt("learner in bfloat16, split over one rank"):
        _bfloat16(context, prompts, vocabulary)


def requests(vocabulary: Vocabulary, prompts: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            sequence.prompt_ids(rng.integers(0, 256, SIZE), "remove the red circle", "<|image start|>", vocabulary),
            SIZE,
            range(SAMPLES * index, SAMPLES * (index + 1)),
        )
        for index in range(prompts)
    ]


def params(small: bool) -> SamplingParams:
    """Enough tokens for an image; when everything is small, for the beginning of one."""
    return SamplingParams(temperature=1.0, max_tokens=24 if small else 96)


def _sampled(
    context: Context, device: torch.device, dtype: torch.dtype, prompts: list[Request]
) -> list[list[Completion]]:
    engine = TorchEngine(device, dtype, len(prompts) * SAMPLES, 320, constrained=True)
    engine.load(FOLDER)
    return engine.generate(prompts, params(context.small))


def _compare_samplers(context: Context, prompts: list[Request], cpu: list[list[Completion]]) -> None:
    found = _sampled(context, context.device, torch.float32, prompts)
    without_index = torch.device(context.device.type)
    again = _sampled(context, without_index, torch.float32, prompts)
    context.require("sampler repeats itself", found == again, str(found == again), "equal tokens and log-probs")
    pairs = [(a, b) for one, other in zip(cpu, found, strict=True) for a, b in zip(one, other, strict=True)]
    equal = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    # A draw that lies on a boundary may fall on its other side.
    enough = len(equal) >= 0.8 * len(pairs)
    context.require("sampler: completions equal to the CPU's", enough, f"{len(equal)} of {len(pairs)}", "at least 80%")
    gap = max((abs(x - y) for a, b in equal for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=np.inf)
    context.require("sampler: log-probs from the CPU's", gap < PARITY, f"{gap:.1e} nats at most", f"< {PARITY} nats")


def episodes(
    prompts: list[Request], completions: list[list[Completion]], vocabulary: Vocabulary
) -> list[batches.Episode]:
    return [
        batches.Episode(
            episode_id=f"{index}-{sample}",
            group_id=str(index),
            prompt=np.array(request.prompt_token_ids),
            completion=np.array(completion.token_ids),
            forced=grid.kinds_of_completion(completion.token_ids, SIZE, vocabulary) >= grid.FIRST_FORCED,
            behavior_logprobs=np.array(completion.logprobs, dtype=np.float32),
            advantage=(-1.0) ** sample,
        )
        for index, (request, group) in enumerate(zip(prompts, completions, strict=True))
        for sample, completion in enumerate(group)
    ]


def settings(vocabulary: Vocabulary, packed: bool, bfloat16: bool = False) -> Settings:
    visual = (vocabulary.first_visual, vocabulary.size)
    return Settings(
        kl_coeff=0.0,
        temperature=1.0,
        micro_batch=SAMPLES,
        visual_range=visual,
        support=logprobs.split_vocab(visual),
        counted="all",
        bfloat16=bfloat16,
        packed=packed,
        gradient_checkpointing=True,
    )


def _step(team: Ranks, own: list[batches.Episode], options: Settings) -> tuple[dict, str]:
    """Do one optimizer step and return its metrics and the digest of the weights after it."""
    policy = sharding.load(FOLDER, team, options.bfloat16)
    optimizer = grpo.new_optimizer(policy, 1e-4)
    metrics = grpo.train_iteration(policy, None, optimizer, own, options, "tiny", team)
    return metrics, saving.save_policy(policy, None, {}, team=team)


def _compare_learners(context: Context, own: list[batches.Episode], vocabulary: Vocabulary) -> None:
    cpu, _ = _step(ranks.alone(torch.device("cpu")), own, settings(vocabulary, packed=False))
    for packed in (False, True):
        name = "packed" if packed else "padded"
        (found, digest), (_, again) = (
            _step(ranks.alone(context.device), own, settings(vocabulary, packed)) for _ in range(2)
        )
        context.require(f"learner, {name}: repeats itself", digest == again, digest[:12], "equal weights after a step")
        gap = found["logprob_mismatch_mean"]
        text = f"{gap:.1e} nats from the CPU sampler's"
        context.require(f"learner, {name}: log-probs", gap < PARITY, text, f"< {PARITY} nats")
        for metric in ("loss", "gradient_norm", "entropy"):
            near = abs(found[metric] - cpu[metric]) <= 1e-3 * abs(cpu[metric]) + 1e-5
            text = f"{found[metric]:.6g}, the CPU's {cpu[metric]:.6g}"
            context.require(f"learner, {name}: {metric}", near, text, "within 0.1%")


def _bfloat16(context: Context, prompts: list[Request], vocabulary: Vocabulary) -> None:
    """As on a GPU by default: weights split by FSDP, even over a single rank, and computed in bfloat16."""
    own = episodes(prompts, _sampled(context, context.device, torch.bfloat16, prompts), vocabulary)
    with ranks.joined(context.device, splits_alone=True) as team:
        options = settings(vocabulary, packed=True, bfloat16=True)
        (found, digest), (_, again) = (_step(team, own, options) for _ in range(2))
    context.require("split learner repeats itself", digest == again, digest[:12], "equal weights after a step")
    context.measure("bfloat16: sampler and learner differ by", found["logprob_mismatch_mean"], "nats", Range(high=0.05))
