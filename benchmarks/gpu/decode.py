"""The torch engine's rate at the published size: prompts, then one token at a time for all rows of a batch."""

import torch

from benchmarks.gpu import engine, models
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Range
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine

STEPS = 48
"""Tokens after the first."""
SAMPLES = 8


def run(context: Context) -> None:
    config = models.text_config(context.small, 2 if context.small else 32)
    model = models.policy(config, context.device, torch.bfloat16)
    for rows in (8,) if context.small else (32, 128):
        with context.attempt(f"{rows} rows"):
            _rate(context, engine.around(model, rows), models.requests(config, rows // SAMPLES, SAMPLES, context.small))


def _rate(context: Context, sampler: TorchEngine, requests: list[Request]) -> None:
    rows, completion = sampler.batch_size, models.lengths(context.small)[1]

    def sample(tokens: int) -> None:
        sampler.generate(requests, SamplingParams(temperature=1.0, max_tokens=tokens))

    sample(2)
    context.release()
    first = context.seconds(lambda: sample(1), 1, warm=False)
    step = (context.seconds(lambda: sample(1 + STEPS), 1, warm=False) - first) / STEPS
    context.measure(f"{rows} rows: prompts", first, "s", note="and the first token")
    context.measure(f"{rows} rows: a token of each", 1000 * step, "ms", Range(high=60 if rows <= 32 else 90))
    whole = first + completion * step
    note = f"{whole:.0f} s for {completion} each"
    context.measure(f"{rows} rows: rate", rows * completion / whole, "tokens/s", note=note)
    context.measure(f"{rows} rows: peak memory", context.peak(), "GB")
