"""Between pixels and visual tokens, with an `Emu3VQVAE`, in batches of a fixed shape.

A convolution may round differently in a batch of another size. So the last batch is filled up, and an image's
tokens or pixels never depend on what else is in its shard.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import Emu3VQVAE

SPATIAL_FACTOR = 8
"""Pixels of a visual token's side, in Emu3's vision tokenizer."""
BATCH = 16
"""Images in a batch, and fewer of them where they are large."""
TOKENS = 4096
"""Tokens in a batch at most: the published tokenizer takes about 4 GB to turn as many into pixels."""


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
        size = max(1, min(BATCH, TOKENS * scale**2 // (height * width)))
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            filled = part + [part[-1]] * (size - len(part))
            batches.append((part, np.stack([items[index] for index in filled])))
    return batches


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
            sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
            found = vision_tokenizer.encode(pixels, image_sizes=sizes).image_tokens
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
            pixels = _first_frames(vision_tokenizer, torch.from_numpy(batch).to(device))
            pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
            pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
            for index, image in zip(indices, pixels, strict=False):
                images[index] = image
    return images


def _first_frames(vision_tokenizer: "Emu3VQVAE", tokens: "torch.Tensor") -> "torch.Tensor":
    """Return `Emu3VQVAE.decode` of grids [N, H, W], as float [N, 3, h, w].

    A grid stands for the `temporal_downsample_factor` frames of a film, of which that method computes all and returns
    the first. Here the others go as soon as frames do not depend on each other any more, before they become large.
    """
    decoder = vision_tokenizer.decoder
    if not len(decoder.time_conv):
        return vision_tokenizer.decode(tokens)
    codes = vision_tokenizer.quantize.embedding(tokens)[:, None].permute(0, 4, 1, 2, 3).contiguous()
    hidden = vision_tokenizer.post_quant_conv(codes)
    hook = decoder.time_conv[-1].register_forward_hook(lambda module, inputs, frames: frames[:, :, :1])
    try:
        return decoder(hidden.permute(0, 2, 1, 3, 4), codes.permute(0, 2, 1, 3, 4))
    finally:
        hook.remove()
