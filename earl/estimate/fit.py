"""Whether the stages of a run fit on their GPUs; where one does not, a field and a value with which it does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from earl.config.sections import Lora
from earl.estimate import loads, memory
from earl.estimate.gpus import PROFILE, Asked, Gpu
from earl.messages.errors import EarlError
from earl.run import resources

if TYPE_CHECKING:
    from earl.config.schema import Config

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of ranks that are proposed."""
LORA_RANK = 64
"""Of an adapter that is proposed."""
STEP = 0.05
"""Between proposed shares of memory."""


@dataclass(frozen=True)
class Problem:
    """Why a stage cannot run on its GPUs.

    Attributes:
        field: whose value does not fit.
        text: how much is needed, and what fits.
    """

    rule: str
    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.field} {self.text}"


def problems(config: "Config", rule: str, asked: Asked) -> list[Problem]:
    """Return why a rule's jobs cannot run on the GPUs that they ask for; none where nobody knows what these hold.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    found = counts(config, rule, asked)
    gpu = asked.gpu
    if gpu is None:
        return found
    if rule in ("sft", "train", "restore", "iterate"):
        found += _learner_problems(config, rule, gpu)
    if rule in ("generate", "iterate"):
        found += _engine_problems(config, rule, gpu)
    if rule in ("score", "iterate"):
        found += _judge_problems(config, rule, gpu)
    if found or rule in ("score", "train", "sft", "restore"):
        return found
    return [_too_much(config, rule, load, gpu) for load in loads.of(config, rule, gpu) if load.bytes > gpu.memory]


def _too_much(config: "Config", rule: str, load: loads.Load, gpu: Gpu) -> Problem:
    text = f"= {config.image_area}: {load.what} needs {_gb(load.bytes)} of {gpu.text}; lower it, or use larger GPUs"
    return Problem(rule, "image_area", text)


def counts(config: "Config", rule: str, asked: Asked) -> list[Problem]:
    """Return whether a job asks for fewer GPUs than the configuration makes it use."""
    needed = resources.gpus(config, rule)
    fields = {
        "iterate": "segment_processes" if config.segment_processes else "train_processes",
        "generate": "vllm_tensor_parallel_size",
        "score": "judge_tensor_parallel_size",
    }
    field = fields.get(rule, "train_processes")
    job = f"= {getattr(config, field)}: makes a job of {needed} GPUs, but"
    if asked.gpu and asked.gpu.is_part and needed > asked.nodes:
        text = f"{job} a process can use one MIG device alone ({asked.gpu.name}); lower {field}, or use whole GPUs"
        return [Problem(rule, field, text)]
    if asked.count is None or asked.count * asked.nodes >= needed or not needed:
        return []
    have = f"{asked.nodes} nodes with {asked.count} each" if asked.nodes > 1 else f"{asked.count}"
    remedy = f"set gpu to {-(-needed // asked.nodes)}, or leave it out"
    if asked.source != PROFILE:
        remedy = f"lower {field}, or run where there are {needed}"
    return [Problem(rule, field, f"{job} {asked.source} {have}; {remedy}")]


def _learner_problems(config: "Config", rule: str, gpu: Gpu) -> list[Problem]:
    """Compare the learner with the GPU, in a segment beside what a sleeping engine keeps."""

    def needed(changed: "Config") -> int:
        if rule == "sft":
            return max((loads.fine_tuning(changed, name).needed for name in loads.fine_tunings(changed)), default=0)
        if rule == "iterate":
            return loads.segment(changed, gpu)[1].bytes
        return loads.learner(changed).needed

    taken = needed(config)
    if taken <= gpu.memory:
        return []
    [first, *_] = loads.of(config, "train" if rule == "iterate" else rule, gpu)
    kept = {name: first.parts[name] for name in ("weights", "moments", "gradients", "reference")}

    def fits(change: dict[str, Any]) -> bool:
        # What a rank keeps of models and optimizer is known without a simulation.
        least = sum(kept.values()) - (kept["reference"] if change.get("reference_offload") else 0)
        least = least * config.train_processes // change.get("train_processes", config.train_processes)
        return ("lora" in change or least < gpu.memory) and needed(config.model_copy(update=change)) <= gpu.memory

    changes = _savings(config) if rule == "sft" else [*_savings(config), *_savings_of_rl(config)]
    cheapest = next((change for change in changes if fits(change)), None)
    more = next((change for change in _more_ranks(config) if fits(change)), None)
    fitting = " or ".join(_said(change) for change in (cheapest, more) if change)
    remedy = f"fits with {fitting}" if fitting else "no field makes it fit; use larger GPUs"
    text = f"= {config.train_processes}: a rank that trains needs {_gb(taken)} of {gpu.text}; {remedy}"
    return [Problem(rule, "train_processes", text)]


def _savings(config: "Config") -> list[dict[str, Any]]:
    """Changes that save memory on the GPUs that there are, the cheapest first; each holds those before it."""
    steps: list[dict[str, Any]] = []
    if not config.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    if config.packing == "none":
        steps.append({"packing": "groups"})
    if config.per_device_batch_size > 1:
        steps.append({"per_device_batch_size": -(-config.per_device_batch_size // 4)})
    return [dict(item for step in steps[: count + 1] for item in step.items()) for count in range(len(steps))]


def _savings_of_rl(config: "Config") -> list[dict[str, Any]]:
    """More that a step of RL can save: where the reference lies, and then what is trained."""
    if config.lora is not None:
        return []
    offloads = [{"reference_offload": True}] if config.kl_coeff > 0 and not config.reference_offload else []
    return [*offloads, {"lora": Lora(rank=LORA_RANK)}]


def _more_ranks(config: "Config") -> Iterator[dict[str, Any]]:
    for count in (count for count in RANKS if count > config.train_processes):
        ranks = {"train_processes": count}
        if config.segment_processes is not None:
            ranks["segment_processes"] = max(count, config.segment_processes)
        yield ranks


def _said(change: dict[str, Any]) -> str:
    values = {"lora.rank" if name == "lora" else name: value for name, value in change.items()}
    shown = {name: value.rank if isinstance(value, Lora) else str(value).lower() for name, value in values.items()}
    return " and ".join(f"{name} {value}" for name, value in shown.items())


def _engine_problems(config: "Config", rule: str, gpu: Gpu) -> list[Problem]:
    """Compare the engine's share of memory with a sequence, and with what else its GPU holds."""
    load = loads.segment(config, gpu)[0] if rule == "iterate" else loads.sampling(config, gpu, {})
    if config.engine == "torch":
        if load.bytes <= gpu.memory:
            return []
        beside = load.bytes - sum(load.parts[name] for name in ("cache", "logits"))
        row = (load.parts["cache"] + load.parts["logits"]) / config.engine_batch_size
        size = int((gpu.memory - beside) // row)
        size -= size % config.generations_per_sample
        remedy = f"{size} fits" if size > 0 else "no batch fits; have more ranks (train_processes), or larger GPUs"
        text = f"= {config.engine_batch_size}: sampling needs {_gb(load.bytes)} of {gpu.text}; {remedy}"
        return [Problem(rule, "engine_batch_size", text)]
    engine, share = loads.engine(config, gpu), config.vllm_gpu_memory_utilization
    beside = load.bytes - int(share * gpu.memory) if engine.cache_tokens else load.bytes - engine.needed
    most = math.floor((gpu.memory - beside) / gpu.memory / STEP + 1e-9) * STEP
    sequence = engine.parts["weights"] + memory.VLLM + config.model_context_size * engine.token_bytes
    least = math.ceil(sequence / gpu.memory / STEP - 1e-9) * STEP
    if engine.cache_tokens >= config.model_context_size and load.bytes <= gpu.memory:
        return []
    if engine.cache_tokens < config.model_context_size:
        why = (
            f"leaves {engine.cache_tokens} tokens of cache beside {_gb(engine.parts['weights'])} of weights, fewer "
            f"than one sequence has (model_context_size {config.model_context_size})"
        )
    else:
        why = f"needs {_gb(load.bytes)} of {gpu.text} together with what else is there while it samples"
    if least <= most + 1e-9 and least <= 1:
        remedy = f"{least:.2f} to {most:.2f} fits" if most > least + 1e-9 else f"{least:.2f} fits"
    elif rule == "iterate":
        remedy = "no share fits beside the learner; have more ranks (train_processes), or run by stage"
    else:
        remedy = "no share fits; raise vllm_tensor_parallel_size, or use larger GPUs"
    return [Problem(rule, "vllm_gpu_memory_utilization", f"= {share}: {why}; {remedy}")]


def _judge_problems(config: "Config", rule: str, gpu: Gpu) -> list[Problem]:
    found = memory.judge(config, gpu.memory)
    if found is None or found.cache_tokens >= config.judge_context_size:
        return []
    sequence = found.parts["weights"] + memory.VLLM + config.judge_context_size * found.token_bytes
    least = math.ceil(sequence / gpu.memory / STEP - 1e-9) * STEP
    larger = [f"judge_gpu_memory_utilization {least:.2f}"] if least < 1 else []
    field, size = "judge_tensor_parallel_size", config.judge_tensor_parallel_size
    for count in (size * 2, size * 4, size * 8):
        more = memory.judge(config.model_copy(update={field: count}), gpu.memory)
        if more is not None and more.cache_tokens >= config.judge_context_size:
            larger.append(f"{count} GPUs" if larger else str(count))
            break
    remedy = f"{' or '.join(larger)} fits" if larger else "use larger GPUs, or another judge"
    text = (
        f"= {size}: {config.reward_function_api_model_name} takes {_gb(found.parts['weights'])} of {gpu.text} for its "
        f"weights, and judge_gpu_memory_utilization {config.judge_gpu_memory_utilization} leaves "
        f"{found.cache_tokens} tokens of cache, fewer than judge_context_size ({config.judge_context_size}); {remedy}"
    )
    return [Problem(rule, field, text)]


def notes(config: "Config", rule: str, gpu: Gpu) -> list[str]:
    """Return what works, but slower than it might."""
    unknown = config.judge == "vllm" and memory.judge(config, gpu.memory) is None
    if unknown and rule in ("score", "iterate"):
        model = config.reward_function_api_model_name
        return [f"{rule}: what the judge {model} takes of a GPU is not known and left out", *_cache(config, rule, gpu)]
    return _cache(config, rule, gpu)


def _cache(config: "Config", rule: str, gpu: Gpu) -> list[str]:
    if rule not in ("generate", "iterate") or config.engine != "vllm":
        return []
    engine = loads.engine(config, gpu)
    if engine.cache_tokens >= engine.shard_tokens or engine.cache_tokens < config.model_context_size:
        return []
    wanted = (engine.parts["weights"] + memory.VLLM + engine.shard_tokens * engine.token_bytes) / gpu.memory
    remedy = f"; all of them take vllm_gpu_memory_utilization {wanted:.2f}" if wanted <= 1 else ""
    return [
        f"{rule}: the cache holds {engine.cache_tokens:,} of the {engine.shard_tokens:,} tokens that a shard's samples "
        f"have at once, so that vLLM computes fewer of them together{remedy}, or more rollout_shards"
    ]


def check(config: "Config", by_segment: bool, asked: Callable[[str], Asked]) -> list[Problem]:
    """Return why the stages of a run would not fit on their GPUs. Costs nothing where none is wanted or known.

    Args:
        asked: from a rule to the GPUs that its jobs ask for.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    if config.device == "cpu":
        return []
    planned = loads.rules(config, by_segment)
    loads.prepare(config, [rule for rule in planned if asked(rule).gpu is not None])
    return [problem for rule in planned for problem in problems(config, rule, asked(rule))]


def refuse(config: "Config", found: list[Problem], origin: Callable[[str], str] | None = None) -> None:
    """Raise where there are problems, naming field, origin and remedy.

    Raises:
        EarlError: there are.
    """
    if found:
        where = {one.field: f" (in {origin(one.field)})" if origin else "" for one in found}
        lines = [f"\n  {one.rule}: field {one.field}{where[one.field]} {one.text}" for one in found]
        raise EarlError(
            f"the run {config.run_name!r} does not fit on its GPUs, by estimate (`earl plan`):{''.join(lines)}\n"
            "  --config check_memory=false runs it all the same"
        )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
