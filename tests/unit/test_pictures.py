"""Images of raw data sets: whatever comes is shown as a viewer would show it, or rejected by name."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from earl.files import images, pictures, tables
from earl.judges import known_order
from earl.messages.errors import EarlError
from tests.support.picture_files import GREY, RGB, chunk, png

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


# Text in a PNG: what a viewer skips does not keep it from being read, and cannot fill memory.


@pytest.mark.parametrize("size", [1_000_000, 3_000_000])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_long_text_is_no_hindrance(kind: bytes, size: int) -> None:
    words = b"workflow " * (size // 9)
    text = {
        b"tEXt": b"prompt\0" + words,
        b"zTXt": b"prompt\0\0" + zlib.compress(words),
        b"iTXt": b"prompt\0\1\0\0\0" + zlib.compress(words),
    }
    samples = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    pixels = pictures.read(png(samples, 8, GREY, before=chunk(kind, text[kind])))
    assert np.array_equal(pixels, np.repeat(samples, 3, axis=2))


def test_a_large_profile_is_no_hindrance_either() -> None:
    noise = np.random.default_rng(0).bytes(3_000_000)
    samples = np.full((8, 8, 3), 77, np.uint8)
    assert np.array_equal(pictures.read(png(samples, 8, RGB, profile=noise)), samples)


def test_text_that_unpacks_to_gigabytes_is_rejected_before_it_does() -> None:
    bomb = zlib.compress(bytes(2**28), 1)
    data = png(np.zeros((8, 8, 1), np.uint8), 8, GREY, before=chunk(b"zTXt", b"a\0\0" + bomb))
    tracemalloc.start()
    with pytest.raises(pictures.Rejected, match="does not decode: "):
        pictures.read(data)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "JPEG", "GIF", "TIFF", "PNG"])
def test_damage_is_a_reject_or_a_picture_and_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(2)
    data = encoded(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), kind)
    messages = []
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 500), 4):
            damaged[place] = rng.integers(256)
        try:
            assert images.decode(bytes(damaged), "here").shape[2] == 3
        except EarlError as error:
            messages.append(str(error))
    assert messages
    assert all(message.startswith("here: the image does not decode (") for message in messages)


# Pictures of other files than raw data sets: the same decoder


def pairs_file(path: Path, *pictures_: bytes) -> Path:
    """Images with ranks, as `earl judge check --pairs` takes them; all have the first as their original."""
    cells = [images.struct(data) for data in pictures_]
    columns = {
        "example_id": ["a"] * len(cells),
        "rank": list(range(len(cells))),
        "label": [None] * len(cells),
        "instruction": ["add a cat"] * len(cells),
        "original": [cells[0]] * len(cells),
        "target": [None] * len(cells),
        "edited": cells,
    }
    tables.write_table(path, tables.RANKED, columns, {})
    return path


def test_pairs_reach_the_judge_as_a_viewer_shows_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(left_red(), "JPEG", quality=95, subsampling=0, exif=exif)
    clear = encoded(Image.new("RGBA", (24, 16), (0, 0, 0, 0)), "PNG")
    grey = encoded(Image.fromarray(np.full((16, 24), 128 * 257, np.uint16)), "PNG")
    shown = [one.judgement.edited for one in known_order.read(pairs_file(tmp_path / "p.parquet", turned, clear, grey))]
    assert shown[0].shape == (24, 16, 3)
    assert np.abs(shown[0][3, 8].astype(int) - RED).max() < 20
    assert shown[1].min() == 255
    assert (shown[2] == 128).all()


def test_small_images_of_our_own_are_read() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(images.decode(images.encode(pixels), "here"), pixels)


@pytest.mark.parametrize(
    "data",
    [None, b"", b"no image", frames("GIF"), png_of_size(9000, 9000)],
    ids=["none", "empty", "no image", "two frames", "bomb"],
)
def test_what_cannot_be_used_names_where_it_stands_and_a_remedy(data: bytes | None, tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "p.parquet", images.encode(np.zeros((8, 8, 3), np.uint8)), data or b"")
    with pytest.raises(
        EarlError, match=r"p\.parquet: row 1, column 'edited': the image .*; replace it or remove its row"
    ):
        known_order.read(path)
    with pytest.raises(EarlError, match=r"here: the image .*; replace it or remove its row"):
        images.decode(data, "here")


READ_PAIRS = """
import sys
from pathlib import Path
from earl.judges import known_order
known_order.read(Path(sys.argv[1]))
"""


def test_no_picture_starts_a_program(tmp_path: Path) -> None:
    called = tmp_path / "called"
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    interpreter.chmod(0o755)
    path = pairs_file(tmp_path / "p.parquet", encoded(left_red(), "EPS"))
    search = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", READ_PAIRS, str(path)], env=search, capture_output=True, text=True)
    assert not called.exists()
    assert "the image does not decode (no known image format)" in done.stderr
