"""Images of raw data sets, which may be anything: what a model can see of them, or why they are rejected.

Decoders are those of picture formats alone, since some that Pillow knows start other programs or follow links. Sizes
are looked at before anything is unpacked.
"""

import io
import re
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from earl.errors import EarlError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 2**26
"""Pixels above which an image is taken for a decompression bomb: 8192 x 8192, about 200 MB unpacked."""
MIN_SIDE = 8
"""Pixels of the shorter side below which there is nothing to see: one visual token."""
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class Rejected(EarlError):
    """Why a row cannot be used: a few fixed words, then after a colon what was found in this row."""

    @property
    def kind(self) -> str:
        return str(self).partition(":")[0]


def read(data: bytes | None) -> np.ndarray:
    """Return the pixels, uint8 [height, width, 3], of an encoded image as a viewer would show it.

    Turned as EXIF says; transparency on white; CMYK, palettes and grey become RGB; 16 bits become 8.

    Raises:
        Rejected: when there is nothing, it does not decode, it moves, is too large or too small, or its pixels have a
            type without a known range.
    """
    if data is None:
        raise Rejected("no bytes: the column holds a path alone")
    if not data:
        raise Rejected("empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check(image)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise Rejected("does not decode: no known image format") from error
    except Exception as error:  # A damaged picture fails in any way; each means the same.
        # Rejected rows are written to files, which are the same in every run: no addresses of objects.
        message = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
        raise Rejected(f"does not decode: {type(error).__name__}: {message}") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Rejected(f"decompression bomb: {width} x {height} pixels")
    if min(width, height) < MIN_SIDE:
        raise Rejected(f"too small: {width} x {height} pixels")
    # An MPO is a photograph with others, such as its preview, behind it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Rejected(f"more than one image: {image.n_frames} frames of {image.format}")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels without a known range: mode {image.mode}, 32 bits")
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))
