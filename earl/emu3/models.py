"""Emu3's classes in transformers. The package imports them from here, where it is sure that they can be imported."""

from earl.execution import torch_extensions

torch_extensions.work_around()

from transformers import (  # noqa: E402
    Emu3Config,
    Emu3ForCausalLM,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
)

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
    "StaticCache",
]
