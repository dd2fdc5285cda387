"""Whether the stages of a run fit on their GPUs; where one does not, a field and a value with which it does.

A rank of a segment holds, one after another:

* while it samples, what the learner keeps between two steps, the engine awake, and the vision tokenizer with a batch;
* while it trains, the learner at its peak, what a sleeping engine keeps, and the vision tokenizer.

By stage each job has one of these to itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from earl.config import paths
from earl.estimate import cases, memory, models
from earl.estimate.gpus import Asked, Gpu
from earl.estimate.memory import EngineMemory, Memory
from earl.messages.errors import EarlError
from earl.run import resources

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.config.schema import Config

UPDATE = 1_500_000_000
"""What vLLM takes beyond its share while it is given new weights."""
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of ranks that are proposed."""
STEP = 0.05
"""Between proposed shares of memory."""


@dataclass(frozen=True)
class Load:
    """What a GPU holds in one phase of a job.

    Attributes:
        what: the phase.
        parts: bytes by name.
    """

    what: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


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


def rules(config: "Config", by_segment: bool) -> list[str]:
    """Return the rules that compute on GPUs, in the order in which they run."""
    shared = {stage.stage for output, stage in paths.shared_stages(config).items() if not _made(output)}
    found = [rule for rule, stage in (("tokenise", "tokenise"), ("sft", "sft")) if stage in shared]
    own = ["score"] if config.judge == "vllm" else []
    if config.num_iterations == 0:
        return found + (["generate", *own] if config.evaluations else [])
    return found + (["iterate"] if by_segment else ["generate", *own, "train"])


def _made(output: Any) -> bool:
    return output.exists()


def loads(config: "Config", rule: str, gpu: Gpu) -> list[Load]:
    """Return what the fullest GPU of a job holds, phase by phase.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    match rule:
        case "tokenise":
            return [_load("tokenise", memory.vision(config, models.vision(config), models.image_side(config)))]
        case "sft":
            return [_load(f"sft.{name}", _fine_tuning(config, name)) for name in fine_tunings(config)]
        case "train" | "restore":
            return [_load("learner", _learner(config))]
        case "generate":
            return [_sampling(config, gpu, {})]
        case "score":
            return _judge(config, gpu)
        case "iterate":
            return [*_segment(config, gpu), *_judge(config, gpu)]
    raise ValueError(f"{rule} is no rule that computes on GPUs")


def _load(what: str, found: Memory) -> Load:
    return Load(what, found.parts)


def _learner(config: "Config") -> Memory:
    return memory.learner(config, *_step(config))


def _step(config: "Config") -> tuple["Emu3TextConfig", int, int, int]:
    length = models.lengths(config)
    return models.text(config), config.train_processes, length.prompt, length.longest


def fine_tunings(config: "Config") -> list[str]:
    stages = paths.shared_stages(config).items()
    return [stage.name for output, stage in stages if stage.stage == "sft" and not _made(output)]


def _fine_tuning(config: "Config", name: str) -> Memory:
    return memory.learner(config, *_tuning_step(config, name), reference=False)


def _tuning_step(config: "Config", name: str) -> tuple["Emu3TextConfig", int, int, int]:
    length, tuning = models.lengths(config), config.sft[name]
    image = length.prompt - models.WORDS
    longest = min(image + (models.REASONING if tuning.reasoning else 0), config.model_context_size - length.prompt)
    return models.text(config, tuning.base_model), config.train_processes, length.prompt, longest


def prepare(config: "Config", planned: Iterable[str]) -> None:
    """Simulate all that `loads` of these rules asks for, in one process.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    wanted: list[cases.Case | cases.VisionCase] = []
    for rule in planned:
        if rule in ("iterate", "train", "restore"):
            wanted += memory.learner_cases(config, *_step(config))
        if rule == "sft":
            for name in fine_tunings(config):
                wanted += memory.learner_cases(config, *_tuning_step(config, name), reference=False)
        if rule in ("iterate", "generate", "tokenise"):
            wanted.append(memory.vision_case(models.vision(config), models.image_side(config)))
    cases.simulate(wanted)


def _engine(config: "Config", gpu: Gpu) -> EngineMemory:
    return memory.engine(config, models.text(config), gpu.memory)


def _sampling(config: "Config", gpu: Gpu, beside: dict[str, int], update: int = 0) -> Load:
    engine = _engine(config, gpu)
    vision = memory.vision(config, models.vision(config), models.image_side(config))
    weights = vision.parts["vision"]
    # A batch of images, or an update of the engine's weights; not both at once.
    moment = max(vision.peak - weights, update)
    parts = {"engine": engine.parts["weights"], "cache": engine.parts["cache"], "logits": engine.parts.get("logits", 0)}
    return Load("sampling", beside | parts | {"vision": weights + moment, "overhead": engine.parts["overhead"]})


def _segment(config: "Config", gpu: Gpu) -> list[Load]:
    learner, engine, text = _learner(config), _engine(config, gpu), models.text(config)
    vision = memory.vision(config, models.vision(config), models.image_side(config)).parts["vision"]
    resting = {name: learner.parts.get(name, 0) for name in ("weights", "moments", "reference")}
    update = UPDATE + 6 * text.vocab_size * text.hidden_size  # its largest weight, whole in float32 and in bfloat16
    training = learner.parts | {"engine": engine.at_rest, "vision": vision}
    return [_sampling(config, gpu, resting, update), Load("training", training)]


def _judge(config: "Config", gpu: Gpu) -> list[Load]:
    found = memory.judge(config, gpu.memory)
    return (
        [] if found is None else [Load("judge", {"judge" if n == "weights" else n: b for n, b in found.parts.items()})]
    )


def problems(config: "Config", rule: str, asked: Asked) -> list[Problem]:
    """Return why a rule's jobs cannot run on the GPUs that they ask for; none where nobody knows what these hold.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    found = _counts(config, rule, asked)
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
    return [_too_much(rule, load, gpu) for load in loads(config, rule, gpu) if load.bytes > gpu.memory]


def _too_much(rule: str, load: Load, gpu: Gpu) -> Problem:
    return Problem(rule, "image_area", f"takes {_gb(load.bytes)} for {load.what}, of {gpu.text}; use larger GPUs")


def _counts(config: "Config", rule: str, asked: Asked) -> list[Problem]:
    needed = resources.gpus(config, rule)
    if asked.count is None or asked.count * asked.nodes >= needed or not needed:
        return []
    fields = {
        "iterate": "segment_processes" if config.segment_processes else "train_processes",
        "generate": "vllm_tensor_parallel_size",
        "score": "judge_tensor_parallel_size",
    }
    have = f"{asked.nodes} nodes with {asked.count} each" if asked.nodes > 1 else f"{asked.count}"
    text = f"makes a job of {needed} GPUs, but the profile asks for {have}; set gpu to {needed}, or leave it out"
    return [Problem(rule, fields.get(rule, "train_processes"), text)]


def _learner_problems(config: "Config", rule: str, gpu: Gpu) -> list[Problem]:
    """Compare the learner with the GPU, in a segment beside what a sleeping engine keeps."""

    def needed(changed: "Config") -> int:
        if rule == "sft":
            return max((_fine_tuning(changed, name).needed for name in fine_tunings(changed)), default=0)
        if rule == "iterate":
            return _segment(changed, gpu)[1].bytes
        return _learner(changed).needed

    taken = needed(config)
    if taken <= gpu.memory:
        return []
    fitting = _fitting(config, lambda changed: needed(changed) <= gpu.memory)
    remedy = f"fits with {' or '.join(fitting)}" if fitting else "nothing that the configuration can say makes it fit"
    text = f"= {config.train_processes}: a rank that trains needs {_gb(taken)} of {gpu.text}; {remedy}"
    return [Problem(rule, "train_processes", text)]


def _fitting(config: "Config", fits: Callable[["Config"], bool]) -> list[str]:
    """Return single changes with which a learner fits, as field=value: those that need no more GPUs first."""
    found = []
    for change in _savings(config):
        if fits(config.model_copy(update=change)):
            found.append(_said(change))
            break
    more = [count for count in RANKS if count > config.train_processes]
    for count in more:
        change: dict[str, Any] = {"train_processes": count}
        if config.segment_processes is not None and config.segment_processes < count:
            change["segment_processes"] = count
        if fits(config.model_copy(update=change)):
            found.append(_said(change))
            break
    return found


def _savings(config: "Config") -> Iterator[dict[str, Any]]:
    """Changes that save memory on the GPUs that there are, the cheapest first; each holds those before it."""
    change: dict[str, Any] = {}
    size = config.per_device_batch_size
    if not config.gradient_checkpointing:
        change["gradient_checkpointing"] = True
        yield dict(change)
    if size > 1:
        change["per_device_batch_size"] = max(1, size // 4)
        yield dict(change)
    if config.kl_coeff > 0 and not config.reference_offload:
        change["reference_offload"] = True
        yield dict(change)


def _said(change: dict[str, Any]) -> str:
    return " and ".join(f"{name} {str(value).lower()}" for name, value in change.items())


def _engine_problems(config: "Config", rule: str, gpu: Gpu) -> list[Problem]:
    """Compare the engine's share of memory with a sequence, and with what else its GPU holds."""
    load = _segment(config, gpu)[0] if rule == "iterate" else _sampling(config, gpu, {})
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
    engine, share = _engine(config, gpu), config.vllm_gpu_memory_utilization
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
    field, size = "judge_tensor_parallel_size", config.judge_tensor_parallel_size
    for count in (size * 2, size * 4, size * 8):
        more = memory.judge(config.model_copy(update={field: count}), gpu.memory)
        if more is not None and more.cache_tokens >= config.judge_context_size:
            remedy = f"{count} fits"
            break
    else:
        remedy = "use larger GPUs, or another judge"
    text = (
        f"= {size}: {config.reward_function_api_model_name} takes {_gb(found.parts['weights'])} of {gpu.text} for its "
        f"weights, and judge_gpu_memory_utilization {config.judge_gpu_memory_utilization} leaves "
        f"{found.cache_tokens} tokens of cache, fewer than judge_context_size ({config.judge_context_size}); {remedy}"
    )
    return [Problem(rule, field, text)]


def notes(config: "Config", rule: str, gpu: Gpu) -> list[str]:
    """Return what works, but slower than it might."""
    if rule not in ("generate", "iterate") or config.engine != "vllm":
        return []
    engine = _engine(config, gpu)
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
    planned = rules(config, by_segment)
    prepare(config, [rule for rule in planned if asked(rule).gpu is not None])
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
