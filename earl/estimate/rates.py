"""How fast things are, by assumption, and how long an iteration takes by them."""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from earl.estimate import memory, models
from earl.estimate.gpus import Gpu
from earl.messages import names
from earl.messages.errors import EarlError
from earl.run import segments

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.config.schema import Config
    from earl.config.sections import Sft


@dataclass(frozen=True)
class Rates:
    """Assumptions. None of them has been measured on a GPU."""

    learner_utilization: float = 0.4
    """Of a GPU's FLOP/s in bfloat16, by its data sheet, that the learner reaches."""
    decode_utilization: float = 0.5
    """Of a GPU's memory bandwidth, by its data sheet, that sampling reaches."""
    judge_questions_per_second: float = 10.0
    """Of all ranks together."""
    disk_bytes_per_second: float = 1e9
    """Of all ranks together, writing or reading checkpoints."""
    update_seconds: float = 10.0
    """To give an engine in memory the learner's weights, wake it and put it to sleep again."""
    start_seconds: float = 90.0
    """Until a job works, beside reading weights: Python, CUDA, vLLM's graphs."""


def assumed(items: list[str]) -> Rates:
    """Return the assumptions with those of `name=value` texts.

    Raises:
        EarlError: an unknown name, or a value that is not a positive number.
    """
    known = [field.name for field in fields(Rates)]
    values: dict[str, float] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in known:
            raise EarlError(f"--assume {item}: is no assumption; {names.hint(name, known, '')}")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = 0.0
        if not 0 < values[name] < math.inf:
            raise EarlError(f"--assume {item}: give a number above 0")
    return replace(Rates(), **values)


@dataclass(frozen=True)
class Work:
    """What an iteration does, with `dynamic_sampling` at most.

    Attributes:
        generated: tokens that are sampled.
        read: tokens of prompts that the engines read.
        trained: tokens that go through the learner, padding included.
        flops: of the learner.
        questions: to the judge; each may be answered several times.
    """

    generated: int
    read: int
    trained: int
    flops: float
    questions: int


def work(config: "Config", text: "Emu3TextConfig") -> Work:
    """Return what an iteration does with episodes of usual length."""
    length = models.lengths(config)
    episodes = config.most_trained_groups * config.generations_per_sample
    # Packed, a micro-batch has the prompt of its group once.
    shared = min(config.generations_per_sample, config.per_device_batch_size) if config.packing == "groups" else 1
    trained = episodes * length.completion + -(-episodes // shared) * length.prompt
    return Work(
        config.most_episodes * length.completion,
        config.most_prompts * length.prompt,
        trained,
        trained * flops_per_token(config, text),
        config.most_episodes * questions(config),
    )


def flops_per_token(config: "Config", text: "Emu3TextConfig", tuning: "Sft | None" = None) -> float:
    """FLOPs of the learner for a token: two a weight of the layers in each pass; the head's ids are few.

    Passes are the policy's forward, the backward for inputs and the one for weights, which a frozen base does without,
    a forward again with checkpointing, and the reference.

    Args:
        tuning: a fine-tuning, whose step it is; None: of RL.
    """
    layers = memory.weights_of(text) - 2 * text.vocab_size * text.hidden_size
    passes = 2 + ((tuning or config).lora is None) + config.gradient_checkpointing
    return 2.0 * layers * (passes + memory.has_reference(config, tuning))


def questions(config: "Config") -> int:
    """Questions to a model judge about an episode."""
    if config.judge == "program":
        return 0
    return 2 * config.reward_compute_viescore + config.reward_compute_ground_score


def sample_seconds(config: "Config", text: "Emu3TextConfig", engines: int, gpu: Gpu, rates: Rates) -> float:
    """Seconds in which engines sample an iteration: at each step an engine reads its weights and its cache once."""
    length = models.lengths(config)
    engine = memory.engine(config, text, gpu.memory)
    room = max(1, engine.cache_tokens // (length.completion + length.prompt // config.generations_per_sample))
    read = 0
    for number in range(config.rounds):  # one after another
        wanted = -(-len(config.prompts_of_round(number)) * config.generations_per_sample // engines)
        together = min(wanted, room, memory.MAX_SEQUENCES)
        half_full = together * (length.prompt // config.generations_per_sample + length.completion // 2)
        steps = -(-wanted // together) * length.completion
        read += steps * (engine.parts["weights"] + half_full * engine.token_bytes)
    return read / (gpu.bandwidth * rates.decode_utilization)


def train_seconds(config: "Config", text: "Emu3TextConfig", gpu: Gpu, rates: Rates) -> float:
    return work(config, text).flops / (config.train_processes * gpu.flops * rates.learner_utilization)


def score_seconds(config: "Config", rates: Rates) -> float:
    return config.most_episodes * questions(config) / rates.judge_questions_per_second


def checkpoint_seconds(size: int, rates: Rates) -> float:
    return size / rates.disk_bytes_per_second


def segment_iteration(config: "Config", text: "Emu3TextConfig", gpu: Gpu, size: int, rates: Rates) -> dict[str, float]:
    """Seconds of an iteration of a segment, by phase; checkpoints and start are spread over the iterations."""
    engines = min(segments.processes(config), config.rollout_shards)
    every = min(config.segment_checkpoint_every_n_iterations, config.segment_length)
    read = 2 * memory.weights_of(text) + size
    start = rates.start_seconds + checkpoint_seconds(read, rates)
    return {
        "generate": sample_seconds(config, text, engines, gpu, rates) + rates.update_seconds,
        "score": score_seconds(config, rates),
        "train": train_seconds(config, text, gpu, rates),
        "checkpoint": checkpoint_seconds(size, rates) / every,
        "start": start / config.segment_length,
    }


def stage_iteration(config: "Config", text: "Emu3TextConfig", gpu: Gpu, size: int, rates: Rates) -> dict[str, float]:
    """Seconds of the jobs of an iteration by stage, shards of a stage side by side."""
    policy = (4 if config.policy_dtype == "float32" else 2) * memory.weights_of(text)  # an adapter's base, too
    reads_policy = rates.start_seconds + checkpoint_seconds(policy, rates)
    judged = rates.start_seconds if config.judge == "vllm" else 0.0
    return {
        "generate": sample_seconds(config, text, config.rollout_shards, gpu, rates) + reads_policy,
        "score": score_seconds(config, rates) + judged,
        "train": train_seconds(config, text, gpu, rates)
        + rates.start_seconds
        + checkpoint_seconds(2 * size + (policy if config.kl_coeff else 0), rates),
    }


def described(rates: Rates) -> dict[str, Any]:
    return {field.name: getattr(rates, field.name) for field in fields(rates)}
