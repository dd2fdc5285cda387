"""Images of raw data sets: whatever comes is shown as a viewer would show it, or rejected by name."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from earl.data import pictures

RED = (200, 40, 40)
BLUE = (40, 40, 200)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def left_red(mode: str = "RGB") -> Image.Image:
    """24 x 16 pixels, the left third red, the rest blue."""
    image = Image.new("RGB", (24, 16), BLUE)
    image.paste(RED, (0, 0, 8, 16))
    return image.convert(mode)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "RGB") for kind in ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG")]
    + [(kind, "P") for kind in ("PNG", "BMP", "TIFF", "GIF")],
)
def test_usual_formats(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    pixels = pictures.read(encoded(left_red(mode), kind, **options))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 24, 3)
    near = 25 if kind == "JPEG" or mode == "P" else 0
    assert np.abs(pixels[8, 4].astype(int) - RED).max() <= near
    assert np.abs(pixels[8, 20].astype(int) - BLUE).max() <= near


def test_cmyk_keeps_its_colours() -> None:
    pixels = pictures.read(encoded(left_red("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(pixels[8, 2] - RED).max() < 30
    assert np.abs(pixels[8, 20] - BLUE).max() < 30


def test_sixteen_bits_become_eight_without_clipping() -> None:
    grey = np.array([0, 257, 32768, 65278, 65535], np.uint16)
    pixels = pictures.read(encoded(Image.fromarray(np.tile(grey, (10, 2))), "PNG"))
    assert pixels.shape == (10, 10, 3)
    assert pixels[0, :5].tolist() == [[v] * 3 for v in (0, 1, 128, 254, 255)]
    pixels = pictures.read(encoded(Image.fromarray(np.tile(grey, (10, 2))), "TIFF"))
    assert pixels[0, :5, 0].tolist() == [0, 1, 128, 254, 255]


@pytest.mark.parametrize(("orientation", "left", "shape"), [(1, RED, (16, 24, 3)), (3, BLUE, (16, 24, 3))])
def test_exif_turns_half(orientation: int, left: tuple, shape: tuple) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pictures.read(encoded(left_red(), "PNG", exif=exif))
    assert pixels.shape == shape
    assert tuple(pixels[8, 2]) == left


def test_exif_turns_a_quarter() -> None:
    exif = Image.Exif()
    # 6: the camera was turned; viewers turn the image clockwise, so that the left side comes to the top.
    exif[0x0112] = 6
    pixels = pictures.read(encoded(left_red(), "JPEG", quality=95, subsampling=0, exif=exif))
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels[3, 8].astype(int) - RED).max() < 20
    assert np.abs(pixels[20, 8].astype(int) - BLUE).max() < 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 16))
    image = image.convert("LA") if mode == "LA" else image
    data = encoded(image.quantize(4) if mode == "P" else image, "PNG")
    pixels = pictures.read(data)
    assert pixels[8, 12].tolist() == [255, 255, 255]
    assert pixels[8, 2].tolist() == [0, 0, 0]


def frames(kind: str) -> bytes:
    return encoded(left_red(), kind, save_all=True, append_images=[Image.new("RGB", (24, 16), BLUE)])


def test_a_photograph_with_its_preview_is_one_image() -> None:
    assert pictures.read(frames("MPO")).shape == (16, 24, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no bytes: "),
        (b"", "empty: 0 bytes"),
        (b"no image", "does not decode: no known image format"),
        (encoded(left_red(), "PNG")[:-30], "does not decode: "),
        (encoded(left_red(), "JPEG")[:200], "does not decode: "),
        (png_of_size(0, 16), "does not decode: "),
        (png_of_size(30_000, 30_000), "decompression bomb: "),
        (png_of_size(9000, 9000), "decompression bomb: 9000 x 9000 pixels"),
        (encoded(Image.new("RGB", (300, 7)), "PNG"), "too small: 300 x 7 pixels"),
        (frames("GIF"), "more than one image: 2 frames of GIF"),
        (frames("PNG"), "more than one image: 2 frames of PNG"),
        (frames("WEBP"), "more than one image: 2 frames of WEBP"),
        (frames("TIFF"), "more than one image: 2 frames of TIFF"),
        (encoded(Image.new("F", (16, 16), 0.5), "TIFF"), "pixels without a known range: mode F"),
        (encoded(Image.new("I", (16, 16), 5), "TIFF"), "pixels without a known range: mode I"),
        # Pillow would start Ghostscript for this one.
        (encoded(left_red(), "EPS"), "does not decode: no known image format"),
    ],
)
def test_what_cannot_be_used_is_rejected_by_name(data: bytes | None, reason: str) -> None:
    with pytest.raises(pictures.Rejected) as error:
        pictures.read(data)
    assert str(error.value).startswith(reason)
    assert error.value.kind == reason.partition(":")[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_rejected_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    for width in (8200, 12_000):
        with pytest.raises(pictures.Rejected, match="decompression bomb"):
            pictures.read(png_of_size(width, width))
