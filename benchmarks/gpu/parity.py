"""Sampler and learner in bfloat16 at the published size: the torch engine token by token, the learner in one pass."""

import numpy as np
import torch

from benchmarks.gpu import engine, models
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Range
from earl.emu3 import grid
from earl.engines import SamplingParams
from earl.execution.ranks import alone
from earl.learner import batches, grpo, logprobs
from earl.learner.settings import Settings

TOLERANCE = 0.05
"""Nats: `parity_tolerance` of the experiments, by which the mean difference stops a run."""
PROMPTS, SAMPLES = 2, 4


def run(context: Context) -> None:
    config = models.text_config(context.small, 2 if context.small else 32)
    tokens, ids = 16 if context.small else 128, models.vocabulary(config)
    model = models.policy(config, context.device, torch.bfloat16)
    sampler = engine.around(model, PROMPTS * SAMPLES)
    requests = models.requests(config, PROMPTS, SAMPLES, context.small)
    completions = sampler.generate(requests, SamplingParams(temperature=1.0, max_tokens=tokens))
    episodes = [
        batches.Episode(
            episode_id=f"{index}-{sample}",
            group_id=str(index),
            prompt=np.array(request.prompt_token_ids),
            completion=np.array(completion.token_ids),
            forced=grid.kinds_of_completion(completion.token_ids, request.grid, ids) >= grid.FIRST_FORCED,
            behavior_logprobs=np.array(completion.logprobs, dtype=np.float32),
            advantage=0.0,
        )
        for index, (request, group) in enumerate(zip(requests, completions, strict=True))
        for sample, completion in enumerate(group)
    ]
    for packed in (False, True):
        name = "packed" if packed else "padded"
        with context.attempt(name):
            _compare(context, model, episodes, name, packed)


def _compare(context: Context, model, episodes: list[batches.Episode], name: str, packed: bool) -> None:
    ids = models.vocabulary(model.config)
    visual = (ids.first_visual, ids.size)
    settings = Settings(
        kl_coeff=0.0,
        temperature=1.0,
        micro_batch=SAMPLES,
        visual_range=visual,
        support=logprobs.split_vocab(visual),
        counted="visual",
        bfloat16=True,
        packed=packed,
    )
    gaps, entropies = [], []
    with torch.no_grad():
        for batch, _ in batches.micro_batches(episodes, settings, alone(context.device)):
            found, entropy, _ = grpo.completion_logprobs(model, batch, settings)
            gaps.append((found - batch.behavior_logprobs).abs())
            entropies.append(entropy)
    gap = torch.cat(gaps)
    note = f"{len(gap)} tokens, entropy {torch.cat(entropies).mean().item():.2f} nats"
    context.measure(f"{name}: mean difference", gap.mean().item(), "nats", Range(high=TOLERANCE), note)
    context.measure(f"{name}: largest difference", gap.max().item(), "nats")
