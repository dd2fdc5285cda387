"""The learner's step at the published width, with as many layers as fit: memory against the estimate, and speed.

A rank of one GPU, split by FSDP as in the experiments, with a frozen reference; two prompts of eight completions.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks.gpu import environment, models
from benchmarks.gpu.context import Context, SkipSection, described
from benchmarks.gpu.results import Range
from earl.emu3.adapter import Lora
from earl.emu3.models import Emu3TextConfig
from earl.estimate import memory
from earl.execution import ranks
from earl.learner import attention, batches, grpo, logprobs, sharding
from earl.learner.performance import Clock
from earl.learner.settings import Settings
from earl.messages.errors import EarlError

PROMPTS, SAMPLES = 2, 8
LAYERS = 32
"""Of the published policy."""
SPARE = 0.05
"""Share of the GPU's memory that is left free when layers are counted."""
KL = 3e-4


@dataclass(frozen=True)
class Case:
    """How a step is done."""

    packed: bool
    checkpointing: bool = True
    attention: str = "sdpa"
    lora: Lora | None = None


def padded(context: Context) -> None:
    _measure(context, Case(packed=False))


def packed(context: Context) -> None:
    _measure(context, Case(packed=True))


def activations_kept(context: Context) -> None:
    _measure(context, Case(packed=True, checkpointing=False), again=False)


def lora(context: Context) -> None:
    _measure(context, Case(packed=True, lora=Lora(rank=64, alpha=128)), again=False)


def flash(context: Context) -> None:
    try:
        attention.choose("flash", context.device, True)
    except EarlError as error:
        raise SkipSection(str(error)) from error
    _measure(context, Case(packed=True, attention="flash"), again=False)


def _measure(context: Context, case: Case, again: bool = True) -> None:
    """Do a step and say what it took; `again`: and another one in which algorithms need not be deterministic.

    Where memory does not suffice for as many layers as the estimate has room for, this fails and fewer are tried.
    """
    most = 2 if context.small else LAYERS
    while most > 0:
        config, predicted = _fitting(context, case, most)
        layers, needed = config.num_hidden_layers, f"{predicted.needed / 1e9:.1f} GB by the estimate"
        try:
            with ranks.joined(context.device, splits_alone=True) as team:
                _steps(context, case, config, predicted, team, again)
            return
        except torch.OutOfMemoryError as error:
            context.require("memory", False, f"{layers} layers: {described(error)}", needed)
            most = layers - 1 - layers // 4
        context.release()


def _steps(
    context: Context, case: Case, config: Emu3TextConfig, predicted: memory.Memory, team: ranks.Ranks, again: bool
) -> None:
    policy = models.filled(sharding.allocate(sharding.empty(config, team, True, lora=case.lora), team))
    reference = policy  # without its adapter
    if case.lora is None:
        reference = models.filled(sharding.allocate(sharding.empty(config, team, True, frozen=True), team))
    optimizer = grpo.new_optimizer(policy, 1e-6)
    episodes = models.episodes(config, PROMPTS, SAMPLES, context.small)
    step = functools.partial(_step, context, case, policy, reference, optimizer, episodes, team)
    step()  # moments are made, kernels chosen
    context.release()
    clock = step()
    note = f"of {LAYERS}, {predicted.needed / 1e9:.1f} GB by the estimate"
    context.measure("layers", config.num_hidden_layers, "", note=note)
    _report(context, case, config, predicted, clock)
    if again:
        _without_determinism(context, step, sum(clock.seconds.values()))


def _fitting(context: Context, case: Case, most: int) -> tuple[Emu3TextConfig, memory.Memory]:
    """Return the configuration with the most layers that the estimate finds room for, and the estimate."""
    options = SimpleNamespace(
        dtype="bfloat16",
        reference_offload=False,
        per_device_batch_size=SAMPLES,
        generations_per_sample=SAMPLES,
        packing="groups" if case.packed else "none",
        gradient_checkpointing=case.checkpointing,
        kl_coeff=KL,
        resolved_logprob_support="split_vocab",
        lora=case.lora and SimpleNamespace(settings=case.lora),
    )
    room = 1e12 if context.small else (1 - SPARE) * torch.cuda.mem_get_info(context.device)[0]
    for layers in range(most, 0, -1):
        config = models.text_config(context.small, layers)
        predicted = memory.learner(options, config, 1, *models.lengths(context.small))
        if predicted.needed <= room:
            return config, predicted
    raise SkipSection(f"by the estimate not even one layer fits into {room / 1e9:.0f} GB")


def _step(
    context: Context,
    case: Case,
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[batches.Episode],
    team: ranks.Ranks,
) -> Clock:
    ids, clock = models.vocabulary(policy.config), Clock(context.device)
    visual = (ids.first_visual, ids.size)
    settings = Settings(
        kl_coeff=KL,
        temperature=1.0,
        micro_batch=SAMPLES,
        visual_range=visual,
        support=logprobs.split_vocab(visual),
        counted="all",
        bfloat16=True,
        packed=case.packed,
        attention=case.attention,
        gradient_checkpointing=case.checkpointing,
    )
    grpo.train_iteration(policy, reference, optimizer, episodes, settings, "step", team, clock)
    return clock


def _report(context: Context, case: Case, config: Emu3TextConfig, predicted: memory.Memory, clock: Clock) -> None:
    expected = predicted.peak / 1e9
    context.measure(
        "peak memory", max(clock.peaks.values()) / 1e9, "GB", Range(0.9 * expected, 1.1 * expected), "by tensors"
    )
    seconds = sum(clock.seconds.values())
    parts = ", ".join(f"{name} {value:.2f}" for name, value in clock.seconds.items())
    context.measure("seconds a step", seconds, "s", note=parts)
    tokens, flops = PROMPTS * SAMPLES * sum(models.lengths(context.small)), _flops(context, config, case)
    whole = _flops(context, models.text_config(context.small, LAYERS), case)
    note = f"{tokens / seconds * flops / whole:.0f} with {LAYERS} layers"
    context.measure("rate", tokens / seconds, "tokens/s", note=note)
    known = None if context.small else environment.specification(torch.cuda.get_device_name(context.device))
    context.measure("rate of useful FLOPs", flops / seconds / 1e12, "TFLOP/s")
    if known:
        context.measure("MFU", 100 * flops / seconds / known / 1e12, "%", Range(low=30), f"of {known} TFLOP/s")


def _flops(context: Context, config: Emu3TextConfig, case: Case) -> float:
    """Return the FLOPs of a step: three times the policy's forward pass and once the reference's.

    Frozen weights have no gradient, which saves one of them. What is computed again for lack of memory is not counted,
    nor what attention does beyond the causal half, nor an adapter.
    """
    prompt, completion = models.lengths(context.small)
    if case.packed:
        tokens = prompt + SAMPLES * completion
        pairs = prompt**2 / 2 + SAMPLES * (prompt * completion + completion**2 / 2)
    else:
        tokens, pairs = SAMPLES * (prompt + completion), SAMPLES * (prompt + completion) ** 2 / 2
    layers = config.num_hidden_layers * 2 * models.layer_weights(config) * tokens
    head = 2 * config.hidden_size * models.vocabulary(config).num_visual * SAMPLES * completion
    attend = config.num_hidden_layers * 4 * config.hidden_size * pairs
    return PROMPTS * ((3 if case.lora else 4) * (layers + head) + 4 * attend)


def _without_determinism(context: Context, step: functools.partial, seconds: float) -> None:
    torch.use_deterministic_algorithms(False)
    try:
        step()
        faster = sum(step().seconds.values())
    finally:
        torch.use_deterministic_algorithms(True)
    note = f"{faster:.2f} s without"
    context.measure("price of determinism", 100 * (seconds / faster - 1), "%", Range(high=15), note)
