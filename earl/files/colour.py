"""Converts the samples of an image to sRGB, by its ICC profile if it has one.

The intent is relative colorimetric. A profile that cannot be read, or is for another kind of samples, is ignored. So is
a profile that equals sRGB up to rounding: lossless sRGB stays lossless.
"""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_ROUNDING = 1
"""Largest change, in levels of 255, that a profile of sRGB makes."""
_ROWS = 256
"""Rows of 16-bit samples that are converted at once, which bounds memory."""


def to_srgb(samples: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Return colours as uint8 [H, W, 3].

    Args:
        samples: uint8 or uint16 [H, W, C] over their whole range: grey (C = 1), RGB (3) or CMYK (4; the largest value
            is full ink).
        profile: ICC profile of the samples. None means sRGB, or inks without a profile.
    """
    transform = _transform(profile, MODES[samples.shape[2]]) if profile else None
    if transform is not None:
        return _fine(transform, samples) if samples.dtype == np.uint16 else transform(samples)
    samples = to_eight_bits(samples)
    if samples.shape[2] == 1:
        return np.repeat(samples, 3, axis=2)
    return np.asarray(_image(samples).convert("RGB")) if samples.shape[2] == 4 else samples


def to_eight_bits(samples: np.ndarray) -> np.ndarray:
    """Round uint16 samples to uint8; return uint8 samples as they are."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


Transform = Callable[[np.ndarray], np.ndarray]
"""From uint8 [H, W, C] to sRGB uint8 [H, W, 3]."""


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """Return the conversion to sRGB, or None if there is nothing to do or the profile cannot be used."""
    srgb = ImageCms.createProfile("sRGB")
    # The optimised conversion of grey is off by 10 levels where the curve is steep.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(found, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags)
    except (ImageCms.PyCMSError, OSError):
        return None

    def apply(samples: np.ndarray) -> np.ndarray:
        return np.asarray(transform.apply(_image(samples)))

    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        table = apply(levels.reshape(1, -1, 1))[0]
        is_srgb = np.abs(table - levels[:, None].astype(int)).max() <= _ROUNDING
        return None if is_srgb else lambda samples: table[samples[..., 0]]
    if mode == "RGB":
        probe = np.stack(np.meshgrid(*[levels[::15]] * 3, indexing="ij"), axis=-1).reshape(18, -1, 3)
        if np.abs(apply(probe) - probe.astype(int)).max() <= _ROUNDING:
            return None
    return apply


def _fine(transform: Transform, samples: np.ndarray) -> np.ndarray:
    """Convert uint16 samples with a transform of 8 bits, interpolating linearly between its levels."""
    colours = np.empty((*samples.shape[:2], 3), np.uint8)
    for top in range(0, len(samples), _ROWS):
        part = samples[top : top + _ROWS]
        level = (part // 257).astype(np.uint8)
        beyond = (part % 257 / 257).astype(np.float32)
        at_level = transform(level).astype(np.float32)
        colour = at_level.copy()
        for channel in range(samples.shape[2]):
            above = level.copy()
            above[..., channel] = np.minimum(above[..., channel], 254) + 1
            colour += beyond[..., channel, None] * (transform(above) - at_level)
        colours[top : top + _ROWS] = (colour + 0.5).clip(0, 255)
    return colours


def _image(samples: np.ndarray) -> Image.Image:
    height, width, channels = samples.shape
    return Image.frombytes(MODES[channels], (width, height), samples.tobytes())
