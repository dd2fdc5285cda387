"""LoRA by peft: a policy as a few weights that are added to those of a frozen base (Hu et al. 2021, arXiv:2106.09685).

The product with a weight W [O, I] of the base becomes x W^T + alpha / rank (x A^T) B^T, of which A [rank, I] and
B [O, rank] are trained. The folder of such a policy holds, instead of full weights::

    adapter_config.json          rank, alpha and targets, as peft and vLLM read them
    adapter_model.safetensors    A and B of each target, by peft's names
    base.json                    where the base lies, relative to this folder, and its digest

So the folder's manifest, and with it the policy's digest, binds the base, which is a folder of full weights.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.execution import torch_extensions
from earl.files import manifest, objects
from earl.messages.errors import EarlError
from earl.statistics import seeds

if TYPE_CHECKING:
    import torch
    from transformers import Emu3ForCausalLM

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of attention and MLP."""
LARGEST_RANK = 512
"""What vLLM computes at most."""
_PREFIX = "base_model.model."
"""What peft's names of weights in files begin with."""


@dataclass(frozen=True)
class Lora:
    """Settings of an adapter."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def files(lora: Lora, base: str, base_digest: str) -> dict[str, bytes]:
    """Return the files of an adapter's folder, beside the weights, that training does not change.

    Args:
        base: Path of the base's folder, relative to that of the adapter.
    """
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    record = {"path": base, "policy_digest": base_digest}
    return {
        name: (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        for name, content in ((CONFIG, fields), (BASE, record))
    }


def is_adapter(folder: Path | str) -> bool:
    """Return whether a policy's folder holds an adapter instead of full weights."""
    return (Path(folder) / CONFIG).is_file()


def check_full(folder: Path | str) -> None:
    """Refuse an adapter where a run, a fine-tuning or another adapter starts from a policy.

    Raises:
        EarlError: the folder holds one.
    """
    if is_adapter(folder):
        raise EarlError(
            f"{folder}: is a LoRA adapter, and what starts from a policy needs full weights; write them by "
            f"`earl export --policy {folder} --config EXPERIMENT --out FOLDER`, and name that folder"
        )


def settings(folder: Path | str) -> Lora | None:
    """Return the settings of the adapter in a folder; None where the folder holds full weights.

    Raises:
        EarlError: it is no adapter of this package's.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    found, base = objects.read(path), record(folder)
    try:
        lora = Lora(int(found["r"]), int(found["lora_alpha"]), tuple(found["target_modules"]))
    except (KeyError, TypeError, ValueError) as error:
        raise EarlError(f"{path}: lacks rank, alpha or targets ({error!r}); copy the folder again") from error
    if files(lora, base["path"], base["policy_digest"])[CONFIG] != path.read_bytes():
        raise EarlError(
            f"{path}: was not written by this package, which knows rank, alpha and targets alone; merge adapter and "
            "base by peft, and give the folder of the full weights"
        )
    return lora


def base_of(folder: Path | str) -> Path:
    """Return the folder of full weights that the policy of a folder computes with: the adapter's base, or itself.

    Raises:
        EarlError: the base is missing, or is sealed and another one. Who reads one that nobody sealed compares it.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return folder
    base = folder / record(folder)["path"]
    if not base.is_dir():
        raise EarlError(
            f"{folder / BASE}: names the base {base}, where no folder is; put the base there. To take the policy of an "
            "iteration out of its run, write adapter and base as one: earl export --run RUN --iteration N --out FOLDER"
        )
    check_full(base)
    if (base / manifest.NAME).is_file():
        check_base(folder)
    return base


def check_base(folder: Path | str) -> None:
    """Compare the base of the adapter in a folder with the one that it was trained on; one that nobody sealed is read.

    Raises:
        EarlError: it is another one.
    """
    folder, base = Path(folder), record(folder)
    found = manifest.digest_folder(folder / base["path"])
    if found != base["policy_digest"]:
        raise EarlError(
            f"{folder / base['path']}: is policy {found[:12]}, but the adapter {folder} was trained on "
            f"{base['policy_digest'][:12]}; put that one back"
        )


def record(folder: Path | str) -> dict[str, str]:
    """Return what the folder of an adapter says of its base: `path`, relative to the folder, and `policy_digest`.

    Raises:
        EarlError: it says nothing.
    """
    path = Path(folder) / BASE
    if not path.is_file():
        raise EarlError(
            f"{path}: is missing, so nobody knows which base the adapter beside it belongs to; merge the two by peft, "
            "and give the folder of the full weights"
        )
    found = objects.read(path)
    if not all(isinstance(found.get(key), str) for key in ("path", "policy_digest")):
        raise EarlError(f"{path}: lacks path or policy_digest; copy the folder again")
    return {key: found[key] for key in ("path", "policy_digest")}


def add(model: "Emu3ForCausalLM", lora: Lora, dtype: "torch.dtype | None" = None) -> None:
    """Give a model an adapter of zeros and freeze everything else.

    Args:
        model: Computes as before; it may be on the device `meta`.
        dtype: Of the adapter's weights; by default that of the model.
    """
    import torch

    torch_extensions.work_around()
    from peft import LoraConfig, inject_adapter_in_model

    dtype = dtype or model.dtype
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for weight in weights(model).values():
            weight.data = weight.data.to(dtype).zero_()


def weights(model: "Emu3ForCausalLM") -> "dict[str, torch.nn.Parameter]":
    """Return the weights of a model's adapter by their names in a file; none where it has no adapter."""
    named = model.named_parameters() if hasattr(model, "peft_config") else ()
    return {_PREFIX + name.replace(".default.", "."): weight for name, weight in named if ".lora_" in name}


def weight_name(name: str, part: str) -> str:
    """Return the name in a file of the part, "A" or "B", of an adapter that belongs to a weight of the base."""
    return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"


def base_weights(model: "Emu3ForCausalLM") -> "dict[str, torch.nn.Parameter]":
    """Return the other weights of a model by their names in `Emu3ForCausalLM`."""
    named = model.named_parameters()
    return {name.replace(".base_layer.", "."): weight for name, weight in named if ".lora_" not in name}


def drawn(model: "Emu3ForCausalLM", seed: int) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield what training starts from: A uniform in +-1 / sqrt(I), as peft draws it, and B zero, so that A B is zero.

    Each weight is a function of the seed and its name.
    """
    import torch

    for name, weight in weights(model).items():
        if ".lora_A." in name:
            uniform = seeds.generator("lora", seed, name).uniform(-1, 1, tuple(weight.shape))
            yield name, torch.from_numpy(uniform / weight.shape[1] ** 0.5).float()


def fill(model: "Emu3ForCausalLM", named: "Iterable[tuple[str, torch.Tensor]]") -> None:
    """Copy whole weights into a model's adapter, which may be split over ranks: each takes its own part."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = weights(model)
    with torch.no_grad():
        for name, whole in named:
            weight = own[name]
            whole = whole.to(weight.device, weight.dtype)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(whole)


@contextmanager
def disabled(model: "Emu3ForCausalLM") -> Iterator[None]:
    """Have a model compute without its adapter within the block, if it has one."""
    layers = []
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
