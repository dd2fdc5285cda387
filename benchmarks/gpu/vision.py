"""The published vision tokenizer, with random weights: seconds, memory, and the CPU's answer."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Range
from earl.emu3 import vision
from earl.emu3.models import Emu3VQVAE, Emu3VQVAEConfig
from earl.estimate import memory

IMAGES = 16
SIDES = (256, 512)
"""Pixels."""


def run(context: Context) -> None:
    small = {"base_channels": 32, "hidden_size": 128, "codebook_size": 64} if context.small else {}
    config = Emu3VQVAEConfig(**small)
    with torch.device(context.device):
        model = Emu3VQVAE(config).eval()
    rng = np.random.default_rng(0)
    for side in (32,) if context.small else SIDES:
        expected = memory.vision(None, config, side).peak / 1e9
        grids = list(rng.integers(0, config.codebook_size, (IMAGES, side // 8, side // 8)))
        images = list(rng.integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8))
        for name, function, items in (("decode", vision.decode, grids), ("encode", vision.encode, images)):
            with context.attempt(f"{name} {side} px"):
                _measure(
                    context, f"{name} {IMAGES} of {side} x {side} pixels", partial(function, model, items), expected
                )
    with context.attempt("against the CPU"):
        _against_cpu(context, model)


def _measure(context: Context, name: str, function: Callable[[], object], most: float) -> None:
    """Measure a call; `most`: the GB that the estimate has for decoding and encoding, whichever takes more."""
    context.release()
    seconds = context.seconds(function, 1)
    context.measure(f"{name}: seconds", seconds, "s", note=f"{seconds / IMAGES:.3g} s an image")
    context.measure(f"{name}: peak memory", context.peak(), "GB", Range(high=1.1 * most), f"{most:.1f} by the estimate")


def _against_cpu(context: Context, model: Emu3VQVAE) -> None:
    rng, side = np.random.default_rng(1), 32 if context.small else 128
    grid = rng.integers(0, model.config.codebook_size, (1, side // 8, side // 8))
    image = rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    pixels, tokens = vision.decode(model, grid)[0].astype(int), vision.encode(model, image)[0]
    own = Emu3VQVAE(model.config).eval()
    own.load_state_dict({name: weight.cpu() for name, weight in model.state_dict().items()})
    far = float((np.abs(pixels - vision.decode(own, grid)[0]) > 1).mean())
    other = float((tokens != vision.encode(own, image)[0]).mean())
    context.measure("pixels that differ from the CPU's by more than 1 of 255", 100 * far, "%", Range(high=1))
    context.measure("tokens that differ from the CPU's", 100 * other, "%", Range(high=5), "convolutions may use TF32")
