"""Colour: samples of an image, with or without an ICC profile, become sRGB.

A profile is followed with relative colorimetric intent. One that cannot be read, or is for another kind of samples,
changes nothing, as in viewers; nor does one that is sRGB but for rounding, so that lossless sRGB stays lossless.
"""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_ROUNDING = 1
"""Levels of 255 by which a profile may alter colours and still be sRGB."""
_ROWS = 256
"""Rows of 16 bits that are converted together, to bound memory."""


def to_srgb(samples: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Return colours as uint8 [H, W, 3].

    Args:
        samples: uint8 or uint16 [H, W, C] over their whole range: grey (C = 1), RGB (3), or CMYK (4, full ink the
            largest value).
        profile: ICC profile that the samples are in; None: sRGB, or plain grey or inks.
    """
    transform = _transform(profile, MODES[samples.shape[2]]) if profile else None
    if transform is not None:
        return _fine(transform, samples) if samples.dtype == np.uint16 else transform(samples)
    samples = to_eight_bits(samples)
    if samples.shape[2] == 1:
        return np.repeat(samples, 3, axis=2)
    return np.asarray(_image(samples).convert("RGB")) if samples.shape[2] == 4 else samples


def to_eight_bits(samples: np.ndarray) -> np.ndarray:
    """Return uint16 samples as the nearest uint8; uint8 stays."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


Transform = Callable[[np.ndarray], np.ndarray]
"""From uint8 [H, W, C] to sRGB uint8 [H, W, 3]."""


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """Return the way to sRGB, or None where there is nothing to do or the profile cannot be followed."""
    srgb = ImageCms.createProfile("sRGB")
    # What littleCMS makes of a curve of grey to be quicker is off by 10 levels where the curve is steep.
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
    """Convert uint16 samples with a transform that takes 8 bits, linearly between its levels."""
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
