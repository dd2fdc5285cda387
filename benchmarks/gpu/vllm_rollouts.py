"""vLLM with the shapes world's policy, where it is installed: start, samples, sleep, new weights, the end."""

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from benchmarks.gpu import tiny
from benchmarks.gpu.context import Context, SkipSection
from benchmarks.gpu.results import Range
from earl.emu3 import checkpoint
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Completion
from earl.execution.ranks import alone
from earl.learner import batches, grpo

if TYPE_CHECKING:
    from earl.engines.vllm_engine import VllmEngine

Result = TypeVar("Result")


def run(context: Context) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise SkipSection("vllm is not installed here")
    from earl.engines import vllm_engine, vllm_process

    dtype = "float32" if context.small else "bfloat16"
    vllm_process.check_device(context.device, 1, "vllm_tensor_parallel_size")
    settings = vllm_engine.Settings(context.kind, dtype, context=256, memory_share=0.05 if context.small else 0.3)
    engine = vllm_engine.VllmEngine(settings)
    vocabulary = Vocabulary.from_folder(tiny.FOLDER)
    requests = tiny.requests(vocabulary, 2 if context.small else 4)

    def sample() -> list[list[Completion]]:
        return engine.generate(requests, tiny.params(context.small))

    _timed(context, "start", lambda: engine.load(tiny.FOLDER), Range(high=90))
    first = _timed(context, "first samples", sample)
    second = _timed(context, "samples again", sample)
    _compare(context, "completions equal when repeated", first, second)
    _parity(context, tiny.episodes(requests, second, vocabulary), vocabulary, dtype)
    _sleeps(context, engine)
    _compare(context, "completions equal after sleep and wake", second, sample())
    _updates(context, engine, sample, second)
    _timed(context, "end", engine.close)


def _timed(context: Context, name: str, function: Callable[[], Result], expected: Range | None = None) -> Result:
    start = time.perf_counter()
    result = function()
    context.synchronize()
    context.measure(name, time.perf_counter() - start, "s", expected)
    return result


def _compare(context: Context, name: str, one: list[list[Completion]], other: list[list[Completion]]) -> None:
    """Say how many completions are equal: a batch of another size may round a draw to its other side."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    equal = sum(a.token_ids == b.token_ids for a, b in pairs)
    context.require(name, equal >= 0.9 * len(pairs), f"{equal} of {len(pairs)}", "at least 90%")


def _parity(context: Context, episodes: list[batches.Episode], vocabulary: Vocabulary, dtype: str) -> None:
    settings = tiny.settings(vocabulary, packed=False, bfloat16=dtype == "bfloat16")
    model = checkpoint.load_policy(tiny.FOLDER, torch.float32, context.device)
    with torch.no_grad():
        gaps = [
            (grpo.completion_logprobs(model, batch, settings)[0] - batch.behavior_logprobs).abs()
            for batch, _ in batches.micro_batches(episodes, settings, alone(context.device))
        ]
    gap = torch.cat(gaps)
    note = f"{gap.max().item():.2g} at most"
    context.measure("vLLM and learner differ by", gap.mean().item(), "nats", Range(high=0.05), note)


def _sleeps(context: Context, engine: "VllmEngine") -> None:
    before = _used(context)
    _timed(context, "sleep", engine.sleep)
    asleep = _used(context)
    _timed(context, "wake", engine.wake)
    if context.device.type == "cuda":
        text = f"{before:.1f} to {asleep:.1f} GB"
        context.require("sleep gives memory back", asleep < before / 2, text, "less than half is left")


def _used(context: Context) -> float:
    if context.device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(context.device)
    return (total - free) / 1e9


def _updates(
    context: Context,
    engine: "VllmEngine",
    sample: Callable[[], list[list[Completion]]],
    before: list[list[Completion]],
) -> None:
    """Weights in memory, as a segment hands them over: others change the samples, the old ones bring them back."""
    weights = dict(checkpoint.load_policy(tiny.FOLDER, torch.float32, context.device).named_parameters())
    others = {name: weight.detach() * (1.5 if name == "lm_head.weight" else 1) for name, weight in weights.items()}
    _timed(context, "update", lambda: engine.update(others.items(), "others"))
    changed = sample() != before
    context.require("samples after an update", changed, "others" if changed else "as before", "others")
    engine.update(((name, weight.detach()) for name, weight in weights.items()), "first")
    _compare(context, "completions equal after the first weights' return", before, sample())
