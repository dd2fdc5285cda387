"""Between pixels and visual tokens, with an `Emu3VQVAE`: one frame of each image, in batches of a fixed shape.

The model is one of films. It takes an image as `temporal_downsample_factor` equal frames, and makes as many of a grid.
Here they are equal frames only where frames are mixed, at the size of tokens; at the size of pixels there is one. The
results are those of `Emu3VQVAE.encode` and `.decode`, up to rounding.

A convolution may round differently in a batch of another size. So the size of a batch depends on the images' size
alone, the last batch is filled up, and an image's tokens or pixels never depend on what else is in its shard.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import Emu3VQVAE

SPATIAL_FACTOR = 8
"""Pixels of a visual token's side, in Emu3's vision tokenizer."""
BATCH = 16
"""Images in a batch at most."""
TOKENS = 1024
"""Tokens in a batch at most, unless one image has more. That is one image of 256 x 256 pixels, for which the published
tokenizer takes 1.9 TFLOP and 1.8 GB, weights included: enough work for a GPU. So images of that size, however many
shapes they have, never fill a batch up."""


def _batches(items: Sequence[np.ndarray], scale: int = 1) -> list[tuple[list[int], np.ndarray]]:
    """Group items of one shape, `BATCH` or fewer at a time, the last group filled up by repetition.

    Args:
        items: Each [height, width, ...].
        scale: Values of height, and of width, for one token.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        by_shape.setdefault(item.shape, []).append(index)
    batches = []
    for (height, width, *_), indices in by_shape.items():
        size = batch_size(height * width // scale**2)
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            filled = part + [part[-1]] * (size - len(part))
            batches.append((part, np.stack([items[index] for index in filled])))
    return batches


def batch_size(tokens: int) -> int:
    """Return the images in a batch of those that have this many visual tokens."""
    return max(1, min(BATCH, TOKENS // tokens))


def encode(vision_tokenizer: "Emu3VQVAE", images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return codebook indices, int64 [H, W] each, of images, uint8 [h, w, 3] each.

    Sides must be multiples of the spatial factor; pixels are scaled to -1..1 as Emu3's image processor does.
    """
    import torch

    device = vision_tokenizer.device
    tokens: list[np.ndarray] = [None] * len(images)
    with torch.inference_mode():
        for indices, batch in _batches(images, vision_tokenizer.spatial_scale_factor):
            pixels = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            found = tokens_of(vision_tokenizer, pixels)
            for index, grid in zip(indices, found, strict=False):
                tokens[index] = grid.cpu().numpy()
    return tokens


def decode(vision_tokenizer: "Emu3VQVAE", tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return images, uint8 [h, w, 3] each, of codebook indices, int [H, W] each."""
    import torch

    device = vision_tokenizer.device
    images: list[np.ndarray] = [None] * len(tokens)
    with torch.inference_mode():
        for indices, batch in _batches(tokens):
            pixels = first_frames(vision_tokenizer, torch.from_numpy(batch).to(device))
            pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
            pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
            for index, image in zip(indices, pixels, strict=False):
                images[index] = image
    return images


def tokens_of(vision_tokenizer: "Emu3VQVAE", pixels: "torch.Tensor") -> "torch.Tensor":
    """Return codebook indices [N, H, W] of images [N, 3, h, w] in -1..1.

    An image is repeated in front of the first layer that mixes frames.
    """
    encoder, frames = vision_tokenizer.encoder, vision_tokenizer.config.temporal_downsample_factor
    with ExitStack() as hooks:
        for first in encoder.time_conv[:1]:
            repeated = first.register_forward_pre_hook(lambda _, image: image[0].expand(-1, -1, frames, -1, -1))
            hooks.enter_context(repeated)
        hidden = encoder(pixels.to(vision_tokenizer.dtype)[:, None])
    codes = vision_tokenizer.quant_conv(hidden.permute(0, 2, 1, 3, 4))
    return vision_tokenizer.quantize(codes.permute(0, 2, 1, 3, 4))[:, 0]


def first_frames(vision_tokenizer: "Emu3VQVAE", tokens: "torch.Tensor") -> "torch.Tensor":
    """Return images [N, 3, h, w], in -1..1 but for overshoot, of grids [N, H, W].

    All frames but the first are dropped behind the last layer that mixes them.
    """
    decoder = vision_tokenizer.decoder
    codes = vision_tokenizer.quantize.embedding(tokens)[:, None].permute(0, 4, 1, 2, 3).contiguous()
    hidden = vision_tokenizer.post_quant_conv(codes)
    with ExitStack() as hooks:
        for last in decoder.time_conv[-1:]:
            hooks.enter_context(last.register_forward_hook(lambda _, __, frames: frames[:, :, :1]))
        return decoder(hidden.permute(0, 2, 1, 3, 4), codes.permute(0, 2, 1, 3, 4))
