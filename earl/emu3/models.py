"""Emu3's classes in transformers. The package imports them from here, where it is sure that they can be imported."""

import gc
import sys

from earl.execution import torch_extensions

# The import makes a million objects, and all stay: searching them for garbage would take a fifth of it.
_collects = gc.isenabled()
gc.disable()
# As if it were not installed: transformers imports it, for a tenth of the time, for losses of object detection.
_hides_scipy = sys.modules.setdefault("scipy", None) is None
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
        StaticCache,
    )
finally:
    if _hides_scipy:
        del sys.modules["scipy"]
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
    "StaticCache",
]
