"""Emu3's classes in transformers. The package imports them from here, where it is sure that they can be imported."""

import gc

from earl.execution import torch_extensions

# The import makes a million objects, and all stay: searching them for garbage would take a fifth of it.
_collects = gc.isenabled()
gc.disable()
try:
    torch_extensions.work_around()

    from transformers import (
        Emu3Config,
        Emu3ForCausalLM,
        Emu3ImageProcessor,
        Emu3Processor,
        Emu3TextConfig,
        Emu3VQVAE,
        Emu3VQVAEConfig,
        GenerationConfig,
        PreTrainedTokenizerFast,
    )
finally:
    if _collects:
        gc.enable()

__all__ = [
    "Emu3Config",
    "Emu3ForCausalLM",
    "Emu3ImageProcessor",
    "Emu3Processor",
    "Emu3TextConfig",
    "Emu3VQVAE",
    "Emu3VQVAEConfig",
    "GenerationConfig",
    "PreTrainedTokenizerFast",
]
