"""Adapters of the tiny policy."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from earl.emu3 import adapter, checkpoint, saving
from earl.emu3.adapter import Lora
from earl.files import atomic, manifest

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

LORA = Lora(4, 8)


def strong(policy: Path, lora: Lora = LORA, seed: int = 0) -> "Emu3ForCausalLM":
    """Return a policy with an adapter that changes what it samples."""
    model = checkpoint.load_policy(policy, torch.float32, "cpu", lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.weights(model).values():
            weight.normal_(std=0.05, generator=generator)
    return model


def write(folder: Path, base: Path, model: "Emu3ForCausalLM", lora: Lora = LORA) -> Path:
    """Write the adapter of a model beside its base, as an iteration does."""
    place = os.path.relpath(base.resolve(), folder.resolve())
    beside = saving.companions(base) | adapter.files(lora, place, manifest.digest_folder(base))
    with atomic.folder(folder) as temporary:
        saving.save_policy(model, temporary, beside)
    return folder
