"""Between pixels and visual tokens, with an `Emu3VQVAE`, in batches of a fixed shape.

A convolution may round differently in a batch of another size. So the last batch is filled up, and an image's
tokens or pixels never depend on what else is in its shard.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import Emu3VQVAE

BATCH = 16


def _batches(items: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """Group items of one shape, `BATCH` at a time, the last group filled up by repetition."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        by_shape.setdefault(item.shape, []).append(index)
    batches = []
    for indices in by_shape.values():
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            filled = part + [part[-1]] * (BATCH - len(part))
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
        for indices, batch in _batches(images):
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
            pixels = vision_tokenizer.decode(torch.from_numpy(batch).to(device))
            pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
            pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
            for index, image in zip(indices, pixels, strict=False):
                images[index] = image
    return images
