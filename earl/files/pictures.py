"""Images of raw data sets, which may be anything: what a model can see of them, or why they are rejected.

Decoders are those of picture formats alone, since some that Pillow knows start other programs or follow links. Sizes
are looked at before anything is unpacked.
"""

import io
import re
import sys
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from earl.files import colour
from earl.messages.errors import EarlError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 2**26
"""Pixels above which an image is taken for a decompression bomb: 8192 x 8192, about 200 MB unpacked."""
MIN_SIDE = 8
"""Pixels of the shorter side below which there is nothing to see: one visual token."""
# A PNG whose text is longer than 1 MiB, such as the workflow it was made with, is a picture all the same; of its texts
# together Pillow takes 64 MiB, which bounds what can be unpacked.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class Rejected(EarlError):
    """Why a row cannot be used: a few fixed words, then after a colon what was found in this row."""

    @property
    def kind(self) -> str:
        return str(self).partition(":")[0]


def read(data: bytes | None, smallest: int = MIN_SIDE) -> np.ndarray:
    """Return the pixels, uint8 [height, width, 3] in sRGB, of an encoded image as a viewer would show it.

    Turned as EXIF says; colours as the ICC profile says; transparency on white; CMYK, palettes and grey become RGB; 16
    bits become 8.

    Args:
        data: The encoded image; None where a file has none.
        smallest: Pixels that the shorter side must have.

    Raises:
        Rejected: when there is nothing, it does not decode, it moves, is too large or too small, or its pixels have a
            type without a known range.
    """
    if data is None:
        raise Rejected("no bytes: the value is missing, or a path alone")
    if not data:
        raise Rejected("empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check(image, smallest)
            return _shown(image, data)
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


def _check(image: Image.Image, smallest: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Rejected(f"decompression bomb: {width} x {height} pixels")
    if min(width, height) < smallest:
        raise Rejected(f"too small: {width} x {height} pixels")
    # An MPO is a photograph with others, such as its preview, behind it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Rejected(f"more than one image: {image.n_frames} frames of {image.format}")
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels without a known range: mode {image.mode}, 32 bits")
    if image.format == "TIFF" and 2 in image.tag_v2.get(ExifTags.Base.SampleFormat, ()):
        raise Rejected("pixels without a known range: signed samples")


def _shown(image: Image.Image, data: bytes) -> np.ndarray:
    raw_mode = _raw_mode(image)
    image.load()
    profile = image.info.get("icc_profile")
    ImageOps.exif_transpose(image, in_place=True)
    samples = _sixteen_bits(image, data, raw_mode) if raw_mode in _OTHER_BYTES else _samples(image)
    colours = 1 if samples.shape[2] < 3 else 4 if image.mode == "CMYK" else 3
    alpha = samples[..., colours:] if samples.shape[2] > colours else None
    if alpha is None and "transparency" in image.info and image.mode not in ("P", "PA"):
        alpha = _alpha_of_key(samples, image, data)
    shown = colour.to_srgb(samples[..., :colours], profile)
    return shown if alpha is None else _on_white(shown, colour.to_eight_bits(alpha))


def _samples(image: Image.Image) -> np.ndarray:
    """Return samples [H, W, C]: grey, RGB or CMYK; alpha, where the image has it, comes last."""
    if image.mode.startswith("I;16"):
        return _deep_grey(image)[..., None]
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        plain = {"1": "L", "La": "LA", "RGBa": "RGBA"}
        image = image.convert(plain.get(image.mode, "RGBA" if image.has_transparency_data else "RGB"))
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Return grey of 12 or 16 bits over the whole range of uint16, black as 0."""
    grey = np.asarray(image).astype(np.uint16)
    if image.format != "TIFF":
        return grey
    if image.tag_v2.get(ExifTags.Base.BitsPerSample) == (12,):
        grey = (grey.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    white_is_zero = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation, 0) == 0
    return 65535 - grey if white_is_zero else grey


_OTHER = "B" if sys.byteorder == "little" else "L"
_OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "CMYK")
    for order, other in (("B", "L"), ("L", "B"), ("N", _OTHER))
} | {"LA;16B": "RGBA"}
"""How colours of 16 bits are stored, of which Pillow keeps the upper bytes, and where it would find the lower ones."""


def _raw_mode(image: Image.Image) -> str | None:
    """Return how the samples of an image that is not loaded yet are stored, as Pillow calls it; None: not said."""
    found = {tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.args}
    return found.pop() if len(found) == 1 else None


def _sixteen_bits(image: Image.Image, data: bytes, raw_mode: str) -> np.ndarray:
    """Return samples uint16 of an image whose upper bytes are loaded, by decoding it as if the lower were the upper."""
    with Image.open(io.BytesIO(data), formats=[image.format]) as lower:
        swapped = _OTHER_BYTES[raw_mode]
        lower.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
            for tile in lower.tile
        ]
        lower.load()
        ImageOps.exif_transpose(lower, in_place=True)
        low = np.asarray(lower).astype(np.uint16)
    if raw_mode == "LA;16B":
        # Grey and alpha of two bytes each were read as four bands.
        return low[..., ::2] << 8 | low[..., 1::2]
    return np.asarray(image).astype(np.uint16) << 8 | low


def _alpha_of_key(samples: np.ndarray, image: Image.Image, data: bytes) -> np.ndarray:
    """Return alpha uint8 [H, W, 1] of an image in which one value of grey or RGB, as it is stored, is transparent."""
    depth = data[24] if image.format == "PNG" else 8
    key = np.array(image.info["transparency"]).reshape(-1) & (2**depth - 1)
    if image.mode == "1":
        key = np.array([image.info["transparency"]])
    elif depth < 8:
        key = key * 255 // (2**depth - 1)
    return np.where((samples == key).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opaque = alpha.astype(np.uint16)
    return ((colours * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
