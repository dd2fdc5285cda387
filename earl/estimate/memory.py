"""Bytes that a stage takes of a GPU.

The learner and the vision tokenizer are simulated (see `earl.estimate.simulation`), engines and judges are computed
from what vLLM is told to take. None of it needs a GPU or weights. What is assumed stands in the constants below.
"""

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.estimate.cases import Bytes, Case, VisionCase, simulate
from earl.files import objects

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM, Emu3TextConfig, Emu3VQVAEConfig

    from earl.config.schema import Config
    from earl.config.sections import Lora, Sft

CONTEXT = 1_500_000_000
"""CUDA's context, cuBLAS and what else a process takes of a GPU beside its tensors."""
NCCL = 1_500_000_000
"""Buffers of NCCL, where there are several ranks."""
FRAGMENTATION = 0.15
"""Of what comes and goes in a step: what torch's allocator holds beyond the tensors that are alive."""
VLLM = 2_500_000_000
"""Of vLLM's share: context, activations of its largest batch, CUDA graphs."""
ASLEEP = 2_500_000_000
"""What a sleeping vLLM keeps: context, CUDA graphs, workspaces."""
SAMPLING_BYTES = 32
"""Bytes an id that the torch engine's sampler takes of each row: logits, log-probs, cumulative sums in float64."""
MAX_SEQUENCES = 256
"""Samples that vLLM computes at the same time."""
LAYERS = (3, 5)
"""Layers that are simulated. From the third on each adds as much as the one before it."""
JUDGES = {
    "Qwen2.5-VL-72B": (73.4e9, 327_680),
    "Qwen2.5-VL-32B": (33.5e9, 262_144),
    "Qwen2.5-VL-7B": (8.29e9, 57_344),
    "Qwen2.5-VL-3B": (3.75e9, 36_864),
}
"""Weights of judges, and bytes of cache a token in bfloat16, by what their name holds. Of another one the number before
the B in its name is taken, and the cache of Qwen2.5-VL-72B."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        parts: bytes by name, when most are in use: weights, moments, gradients, reference, activations, logits, cache,
            vision, overhead. Activations of a learner include the weights that are gathered to compute a layer or the
            head, and their gradients before these are summed over ranks.
        at_rest: what stays between two steps, overhead left out.
        peak: the most that tensors take at once: `torch.cuda.max_memory_allocated`.
    """

    parts: dict[str, int]
    at_rest: int
    peak: int

    @property
    def needed(self) -> int:
        """What the GPU must have: the peak, and what a process takes beside its tensors."""
        return self.peak + self.parts.get("overhead", 0)


@dataclass(frozen=True)
class EngineMemory(Memory):
    """Of a rollout engine, whose cache may be smaller than what it would use.

    Attributes:
        cache_tokens: tokens that fit into the cache.
        shard_tokens: tokens of a shard that are in the cache together if none is preempted: each prompt once, and all
            completions that are computed at a time.
        token_bytes: bytes of cache that a token takes.
    """

    cache_tokens: int
    shard_tokens: int
    token_bytes: int


def learner(
    config: "Config",
    text: "Emu3TextConfig",
    ranks: int,
    prompt_tokens: int,
    completion_tokens: int,
    tuning: "Sft | None" = None,
) -> Memory:
    """Return what a step of the learner takes of each rank's GPU.

    Args:
        ranks: that train together.
        prompt_tokens, completion_tokens: of every episode of a micro-batch.
        tuning: a fine-tuning, whose step it is; None: of RL.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    few, more = simulate(learner_cases(config, text, ranks, prompt_tokens, completion_tokens, tuning))
    found = extrapolated(few, more, text.num_hidden_layers)
    rest = found.at_rest
    gradients = rest["moments"] // 2  # float32, as one of two moments is
    at_rest, peak = sum(rest.values()), max(found.peaks.values())
    activations = max(0, peak - at_rest - gradients)
    overhead = CONTEXT + (NCCL if ranks > 1 else 0) + int(FRAGMENTATION * (peak - at_rest))
    parts = rest | {"gradients": gradients, "activations": activations, "overhead": overhead}
    return Memory(parts, at_rest, peak)


def learner_cases(
    config: "Config",
    text: "Emu3TextConfig",
    ranks: int,
    prompt_tokens: int,
    completion_tokens: int,
    tuning: "Sft | None" = None,
) -> list[Case]:
    """Return what `learner` simulates: the step with few layers, and with some more."""
    truncated = config.resolved_logprob_support == "sampled" and tuning is None
    lora, reference, bfloat16 = (tuning or config).lora, has_reference(config, tuning), config.dtype == "bfloat16"
    splits_alone, group = bfloat16 or config.reference_offload, config.generations_per_sample
    if tuning is not None:  # As in `earl.stages.sft`; pairs share their prompt, examples none.
        splits_alone = (lora is not None and bfloat16) or (reference and config.reference_offload)
        group = 2 if reference else 1
    return [
        Case(
            text=_json(text.to_dict() | {"num_hidden_layers": layers}),
            ranks=ranks,
            splits=ranks > 1 or splits_alone,
            episodes=config.per_device_batch_size,
            group=group,
            prompt=prompt_tokens,
            completion=completion_tokens,
            top_k=config.top_k if truncated else -1,
            top_p=config.top_p if truncated else 1.0,
            bfloat16=bfloat16,
            packed=config.packing == "groups",
            checkpointing=config.gradient_checkpointing,
            reference=reference,
            offload=config.reference_offload,
            lora=lora and dataclasses.astuple(lora.settings),
        )
        for layers in LAYERS
    ]


def has_reference(config: "Config", tuning: "Sft | None" = None) -> bool:
    """Return whether a step of RL, or of a fine-tuning, looks at a frozen reference."""
    return config.kl_coeff > 0 if tuning is None else tuning.objective == "dpo"


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, default=str, sort_keys=True)


def extrapolated(few: Bytes, more: Bytes, layers: int) -> Bytes:
    """What `layers` layers take, by what `LAYERS` take; each phase by itself, since another one may be the highest."""
    share = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])

    def between(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {name: int(first[name] + share * (second[name] - first[name])) for name in first}

    return Bytes(between(few.at_rest, more.at_rest), between(few.peaks, more.peaks))


def engine(
    config: "Config",
    text: "Emu3TextConfig",
    gpu_bytes: int,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
) -> EngineMemory:
    """Return what the rollout engine takes of one GPU. `at_rest` is what it keeps asleep.

    Args:
        gpu_bytes: memory of the GPU, of which vLLM takes a share.
        prompt_tokens, completion_tokens: of an episode; None: those of `models.lengths`.
    """
    from earl.estimate import models  # which reads configurations; the rest does without their packages

    usual = models.lengths(config)
    prompt, completion = prompt_tokens or usual.prompt, completion_tokens or usual.completion
    value = 2 if config.dtype == "bfloat16" else 4
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head * value
    weights = value * (weights_of(text) + (trained_of(text, config.lora) if config.lora else 0))
    if config.engine == "torch":
        rows = max(1, config.engine_batch_size)
        cache = rows * (prompt + config.max_response_tokens)
        logits = rows * text.vocab_size * SAMPLING_BYTES
        parts = {"weights": weights, "cache": cache * token_bytes, "logits": logits, "overhead": CONTEXT}
        return EngineMemory(parts, 0, weights + cache * token_bytes + logits, cache, cache, token_bytes)
    split = config.vllm_tensor_parallel_size
    weights, token_bytes = math.ceil(weights / split), math.ceil(token_bytes / split)
    taken = int(config.vllm_gpu_memory_utilization * gpu_bytes)
    cache = max(0, taken - weights - VLLM)
    most = max(len(config.prompts_of_round(number)) for number in range(config.rounds))
    shard = -(-most * config.generations_per_sample // config.rollout_shards)
    prompts = -(-shard // config.generations_per_sample)
    together = min(shard, MAX_SEQUENCES)
    parts = {"weights": weights, "cache": cache, "overhead": VLLM}
    needed = prompts * prompt + together * completion
    return EngineMemory(parts, ASLEEP, weights + cache, cache // token_bytes, needed, token_bytes)


def vision(config: "Config", vision_config: "Emu3VQVAEConfig", side: int) -> Memory:
    """Return what the vision tokenizer takes to turn a batch of square images into tokens, or back.

    Args:
        side: pixels of an image's side.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    [found] = simulate([vision_case(vision_config, side)])
    weights, peak = found.at_rest["weights"], max(found.peaks.values())
    overhead = CONTEXT + int(FRAGMENTATION * (peak - weights))
    return Memory({"vision": weights, "activations": peak - weights, "overhead": overhead}, weights, peak)


def vision_case(vision_config: "Emu3VQVAEConfig", side: int) -> VisionCase:
    """Return what `vision` simulates."""
    return VisionCase(_json(vision_config.to_dict()), side)


def judge(config: "Config", gpu_bytes: int) -> EngineMemory | None:
    """Return what the judge `vllm` takes of each of its GPUs; None for another judge, or a model of unknown size."""
    if config.judge != "vllm" or (count := judge_weights(config.reward_function_api_model_name)) is None:
        return None
    weights = int(2 * count / config.judge_tensor_parallel_size)
    taken = int(config.judge_gpu_memory_utilization * gpu_bytes)
    cache = max(0, taken - weights - VLLM)
    token_bytes = (_known_judge(config.reward_function_api_model_name) or JUDGES["Qwen2.5-VL-72B"])[1]
    token_bytes = math.ceil(token_bytes / config.judge_tensor_parallel_size)
    parts = {"weights": weights, "cache": cache, "overhead": VLLM}
    needed = config.judge_context_size
    return EngineMemory(parts, weights + cache, weights + cache, cache // token_bytes, needed, token_bytes)


def judge_weights(model: str) -> float | None:
    """Return how many weights a judge has: by its folder's index, or by its name; None where neither tells."""
    index = Path(model) / "model.safetensors.index.json"
    if index.is_file():
        return objects.read(index)["metadata"]["total_size"] / 2
    if (Path(model) / "model.safetensors").is_file():
        return (Path(model) / "model.safetensors").stat().st_size / 2
    if (known := _known_judge(model)) is not None:
        return known[0]
    found = re.search(r"(\d+(?:\.\d+)?)[Bb](?![A-Za-z])", model)
    return float(found[1]) * 1e9 if found else None


def _known_judge(model: str) -> tuple[float, int] | None:
    return next((found for name, found in JUDGES.items() if name in model), None)


def weights_of(text: "Emu3TextConfig") -> int:
    """Return how many weights a policy has."""
    return _counted(_json(text.to_dict()))


def trained_of(text: "Emu3TextConfig", lora: "Lora | None") -> int:
    """Return how many weights are trained: all of them, or those of an adapter."""
    if lora is None:
        return weights_of(text)
    shapes = _linear_layers(_json(text.to_dict()))
    return sum(count * lora.rank * sum(shape) for name, (count, shape) in shapes.items() if name in lora.targets)


@functools.cache
def _counted(fields: str) -> int:
    return sum(weight.numel() for weight in _empty(fields).parameters())


@functools.cache
def _linear_layers(fields: str) -> dict[str, tuple[int, tuple[int, int]]]:
    """Number and shape of the policy's linear layers, by the last part of their name."""
    import torch

    found: dict[str, tuple[int, tuple[int, int]]] = {}
    for name, module in _empty(fields).named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = name.rpartition(".")[2]
            found[kind] = (found.get(kind, (0, (0, 0)))[0] + 1, (module.out_features, module.in_features))
    return found


def _empty(fields: str) -> "Emu3ForCausalLM":
    import torch

    from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig

    with torch.device("meta"):
        return Emu3ForCausalLM(Emu3TextConfig.from_dict(json.loads(fields)))
