"""The learner's models in memory: whole on one process, split over several by FSDP (`torch.distributed.fsdp`).

Each decoder layer is a unit whose weights are gathered when it computes and let go afterwards; embedding, last norm and
head are one more. Of everything else, the master weights, their gradients and Adam's moments, a rank holds its part
alone. Gradients are summed over ranks, not averaged: the loss is divided by the whole step's denominator already.

To compute in bfloat16 one process uses it too: a layer's weights are gathered as bfloat16 copies of the float32 ones,
gradients are summed in float32; a frozen model is held in bfloat16. Then everything is bfloat16 that is in the engines,
hidden states between layers too, which autocast would keep in float32: sampler and learner differ less, and ranks not
at all.
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from earl.emu3 import adapter, checkpoint
from earl.execution.ranks import Ranks
from earl.files import tensors
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM, Emu3TextConfig

Result = TypeVar("Result")


def load(
    folder: Path, team: Ranks, bfloat16: bool, *, frozen: bool = False, offload: bool = False
) -> "Emu3ForCausalLM":
    """Return the policy of a folder, in evaluation mode, split where `team` says so.

    Its weights are float32, which small updates need; those of a model that is never updated have the type that it
    computes in.

    Args:
        bfloat16: whether it will compute in bfloat16.
        frozen: it will not be trained.
        offload: keep its weights in main memory, and take each layer's to the GPU when it computes.

    Raises:
        EarlError: see `checkpoint.check_policy`.
    """
    if not team.splits:
        dtype = _frozen_dtype(bfloat16) if frozen else torch.float32
        return checkpoint.load_policy(folder, dtype, team.device).requires_grad_(not frozen)
    model = allocate(empty(_config(folder), team, bfloat16, frozen, offload), team, offload)
    return _read(model, folder, team)


def load_with_adapter(folder: Path, lora: adapter.Lora, seed: int, team: Ranks, bfloat16: bool) -> "Emu3ForCausalLM":
    """Return the policy of a folder in evaluation mode, split where `team` says so, with an adapter to be trained.

    The folder holds the adapter, or full weights, to which a new one is added. The adapter is float32; its frozen base
    is too, or bfloat16 where that is what it computes in.

    Args:
        seed: of a new adapter.

    Raises:
        EarlError: see `checkpoint.check_policy`.
    """
    if team.splits:
        base = adapter.base_of(folder)
        model = _read(allocate(empty(_config(base), team, bfloat16, lora=lora), team), base, team)
        if adapter.is_adapter(folder):
            checkpoint.read_adapter(folder, model)
    else:
        model = checkpoint.load_policy(folder, torch.float32, team.device, lora)
    if not adapter.is_adapter(folder):
        adapter.fill(model, adapter.drawn(model, seed))
    return model


def trained(model: "torch.nn.Module") -> dict[str, torch.nn.Parameter]:
    """Return the weights that are trained, by name: all of them, or those of an adapter."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def empty(
    config: "Emu3TextConfig",
    team: Ranks,
    bfloat16: bool,
    frozen: bool = False,
    offload: bool = False,
    lora: adapter.Lora | None = None,
) -> "Emu3ForCausalLM":
    """Return a model that is split over the ranks, and whose weights take no memory yet; `allocate` gives them some.

    Args:
        lora: of an adapter that is trained in the place of the model's own weights.
    """
    from earl.emu3.models import Emu3ForCausalLM

    dtype = _frozen_dtype(bfloat16) if frozen or lora else torch.float32
    with torch.device("meta"):
        model = Emu3ForCausalLM(config).to(dtype).requires_grad_(not frozen)
    if lora is not None:
        adapter.add(model, lora, torch.float32)
    split(model, team, bfloat16, frozen, offload)
    return model


def _frozen_dtype(bfloat16: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat16 else torch.float32


def allocate(model: "Emu3ForCausalLM", team: Ranks, offload: bool = False) -> "Emu3ForCausalLM":
    """Give the weights of an empty model their memory, in which anything may stand; return the model."""
    model.to_empty(device="cpu" if offload else team.device)
    # Its buffers are no weights: they are computed where the module is made.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(team.device)
    return model


def _read(model: "Emu3ForCausalLM", folder: Path, team: Ranks) -> "Emu3ForCausalLM":
    """Fill a model, but for an adapter, which is 0, from a folder of full weights; return it in evaluation mode."""
    with torch.no_grad():
        checkpoint.read_weights(folder, adapter.base_weights(model), team)
        for weight in adapter.weights(model).values():
            weight.zero_()
    return model.eval()


@torch.no_grad()
def copy_weights(source: "Emu3ForCausalLM", target: "Emu3ForCausalLM") -> None:
    """Copy the weights of a model to another that is split over the same ranks, in the other's type and memory."""
    for (name, weight), (other, copy) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        if name != other:
            raise ValueError(f"{name} is not {other}: the models are not alike")
        tensors.own_part(copy).copy_(tensors.own_part(weight))


def _config(folder: Path) -> "Emu3TextConfig":
    config = checkpoint.text_config(folder)
    if config.tie_word_embeddings:
        raise EarlError(
            f"{folder}: embedding and head share their weight (tie_word_embeddings), which cannot be split; "
            "train in one process, with dtype float32, train_processes 1 and reference_offload false"
        )
    return config


def split(model: "Emu3ForCausalLM", team: Ranks, bfloat16: bool, frozen: bool = False, offload: bool = False) -> None:
    """Split the weights of a model, which may be empty yet, over the ranks; its functions then run by `forward`."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    options: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(team.group or dist.group.WORLD, team.device.type),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=team.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    # Of a frozen model no backward pass follows, in which the head would be needed again.
    fully_shard(model, **options, reshard_after_forward=frozen)
    for unit in (*model.model.layers, model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.call = MethodType(_call, model)
    register_fsdp_forward_method(model, "call")


def _call(model: "Emu3ForCausalLM", function: Callable[..., Result], *arguments: Any) -> Result:
    return function(model, *arguments)


def forward(model: "Emu3ForCausalLM", function: Callable[..., Result], *arguments: Any) -> Result:
    """Return `function(model, *arguments)`, a forward pass, for which the weights of a split model are gathered.

    Of a split model, weights that belong to no layer are whole inside `function` alone: the head's among them.
    """
    call = getattr(model, "call", None)
    return function(model, *arguments) if call is None else call(function, *arguments)


def split_again(model: "Emu3ForCausalLM") -> None:
    """Split what forward passes gathered and no backward pass follows: weights that belong to no layer."""
    if hasattr(model, "call"):
        model.reshard()


def recompute_layers(model: "Emu3ForCausalLM") -> None:
    """Let layers keep their input alone, and compute again in the backward pass what else it needs."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.training = True  # which it asks for; what is inside, dropout among it, stays in evaluation mode


def compile_layers(model: "Emu3ForCausalLM") -> None:
    """Compile those parts of the layers that take a tensor alone; attention is a kernel already."""
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)
