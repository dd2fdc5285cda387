"""Full weights of an adapter and its base: W + alpha / rank B A, summed in float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import adapter, checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import Emu3ForCausalLM


@dataclass(frozen=True)
class Merged:
    """A weight of a base with its adapter; each of the three may be split over ranks."""

    base: "torch.Tensor"  # [O, I]
    a: "torch.Tensor"  # [rank, I]
    b: "torch.Tensor"  # [O, rank]
    scale: float

    @property
    def shape(self) -> "torch.Size":
        return self.base.shape

    def numel(self) -> int:
        return self.base.numel()

    def full_tensor(self) -> "torch.Tensor":
        """Return the sum, float32 and whole on the device; of a split one, all ranks call this together."""
        base, a, b = (getattr(x, "full_tensor", lambda x=x: x)().detach().float() for x in (self.base, self.a, self.b))
        return base.addmm(b, a, alpha=self.scale)


def merged(model: "Emu3ForCausalLM", lora: adapter.Lora) -> "dict[str, torch.Tensor | Merged]":
    """Return the weights of a model as if its adapter were part of them, by their names in `Emu3ForCausalLM`."""
    return _merged(adapter.base_weights(model), adapter.weights(model), lora)


def merged_weights(folder: Path | str) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the full weights of a policy folder by their names in `Emu3ForCausalLM`, one after the other.

    They come as they are stored, but for those that an adapter adds to, which are float32: rounded to bfloat16, they
    would lose what is small beside them. Who reads within `checkpoint.reading_policy` finds damage.

    Raises:
        EarlError: there are no safetensors, or a file or the base is missing, damaged or another one.
    """
    lora = adapter.settings(folder)
    parts = {name: weight for _, name, weight in checkpoint.weights(folder)} if lora else {}
    for _, stored, weight in checkpoint.weights(adapter.base_of(folder)):
        name = checkpoint.text_weight_name(stored)
        if name is not None:
            found = _merged({name: weight}, parts, lora)[name] if lora else weight
            yield name, found.full_tensor() if isinstance(found, Merged) else found


def _merged(
    base: "dict[str, torch.Tensor]", parts: "dict[str, torch.Tensor]", lora: adapter.Lora
) -> "dict[str, torch.Tensor | Merged]":
    found = dict(base)
    for name, weight in base.items():
        a, b = (parts.get(adapter.weight_name(name, part)) for part in "AB")
        if a is not None and b is not None:
            found[name] = Merged(weight, a, b, lora.scale)
    return found
