"""Colour: what a sample means by its depth, its transparency and its profile, against the definitions in numpy."""

import io

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from earl.files import pictures
from tests.support.picture_files import (
    CHANNELS,
    DISPLAY_P3,
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    SRGB,
    cmyk_profile,
    in_srgb,
    png,
    profile,
    tiff,
)

RAMP = np.linspace(0, 65535, 16 * 16).round().astype(np.uint16).reshape(16, 16, 1)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
P3 = profile(2.2, DISPLAY_P3)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def assert_near(found: np.ndarray, expected: np.ndarray, by: float) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= by


# Profiles


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_a_profile_is_followed_in_every_format(kind: str) -> None:
    flat = np.full((32, 32, 3), (200, 30, 40), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 100}
    data = encoded(Image.fromarray(flat), kind, icc_profile=P3, **options)
    # Lossy formats alter the samples before the profile, so their own are taken.
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_near(pictures.read(data), in_srgb((stored / 255) ** 2.2, DISPLAY_P3), 1.5)
    assert pictures.read(data)[0, 0, 0] > 210


def test_a_profile_of_srgb_changes_nothing() -> None:
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pictures.read(png(COLOURS, 8, RGB, profile=data)), COLOURS)


@pytest.mark.parametrize(
    "data",
    [b"", b"no profile", P3[:200], profile(2.2, None), cmyk_profile(np.zeros((2, 2, 2, 2, 3)))],
    ids=["empty", "no profile", "cut off", "of grey", "of inks"],
)
def test_a_profile_that_cannot_be_followed_changes_nothing(data: bytes) -> None:
    assert np.array_equal(pictures.read(png(COLOURS, 8, RGB, profile=data)), COLOURS)


def test_linear_grey_of_eight_and_sixteen_bits() -> None:
    data = profile(1.0, None)
    deep, shallow = RAMP, RAMP >> 8
    assert_near(pictures.read(png(deep, 16, GREY, profile=data)), in_srgb(deep / 65535, None), 1.5)
    assert_near(pictures.read(png(shallow, 8, GREY, profile=data)), in_srgb(shallow / 255, None), 1.5)


@pytest.mark.parametrize("colour", [GREY, RGB, GREY_ALPHA, RGB_ALPHA])
def test_sixteen_bits_count_under_a_profile(colour: int) -> None:
    """Of linear light, the darkest of 256 levels are 13 levels of sRGB apart."""
    channels = CHANNELS[colour]
    samples = np.repeat((RAMP >> 7).astype(np.uint16), channels, axis=2)
    light = 3 if channels > 2 else 1
    samples[..., light:] = 65535
    primaries = SRGB if light == 3 else None
    data = png(samples, 16, colour, profile=profile(1.0, primaries))
    assert_near(pictures.read(data), in_srgb(samples[..., :light] / 65535, primaries), 1.5)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_count_in_tiff_too(order: str, compressed: bool) -> None:
    samples = np.repeat((RAMP >> 7).astype(np.uint16), 3, axis=2)
    data = tiff(samples, 2, order, compressed=compressed, profile=profile(1.0, SRGB))
    assert_near(pictures.read(data), in_srgb(samples / 65535, SRGB), 1.5)


def test_inks_are_those_of_the_profile() -> None:
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[0, 0, 0, 0] = (100, 0, 0)
    # A printer whose full cyan is a dull red: (54, 40, 20) of Lab is sRGB (182, 103, 96) by the formulas of CIE.
    corners[1, 0, 0, 0] = (54, 40, 20)
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (0, 0, 8, 16))
    for kind, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("TIFF", {})):
        pixels = pictures.read(encoded(inks, kind, icc_profile=cmyk_profile(corners), **options))
        assert_near(pixels[8, 3], np.array(lab_in_srgb(54, 40, 20)), 3)
        assert_near(pixels[8, 13], np.array([255, 255, 255]), 3)


def test_inks_of_sixteen_bits_are_those_of_eight() -> None:
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[..., 0] = 100 * (1 - np.indices((2, 2, 2, 2)).sum(axis=0) / 4)
    samples = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    data = cmyk_profile(corners)
    shallow = pictures.read(tiff(samples, 5, profile=data))
    deep = pictures.read(tiff(samples.astype(np.uint16) * 257, 5, profile=data))
    assert np.array_equal(deep, shallow)
    assert np.ptp(shallow) > 50


def test_lab_is_what_it_says() -> None:
    samples = np.full((8, 8, 3), (round(54 * 2.55), 40, 20), np.uint8)
    assert_near(pictures.read(tiff(samples, 8)), np.broadcast_to(lab_in_srgb(54, 40, 20), (8, 8, 3)), 2)


def lab_in_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    return in_srgb(xyz, tuple(map(tuple, np.eye(3))))


def test_a_palette_has_a_profile_too() -> None:
    palette = np.array([[200, 30, 40], [30, 200, 40]])
    samples = np.zeros((8, 8, 1), np.uint8)
    samples[:, 4:] = 1
    pixels = pictures.read(png(samples, 1, PALETTE, palette, profile=P3))
    assert_near(pixels, in_srgb((palette[samples[..., 0]] / 255) ** 2.2, DISPLAY_P3), 1.5)


def test_what_is_half_transparent_is_converted_before_it_lies_on_white() -> None:
    samples = np.full((8, 8, 4), (200, 30, 40, 128), np.uint8)
    expected = in_srgb((samples[..., :3] / 255) ** 2.2, DISPLAY_P3) * 128 / 255 + 127
    assert_near(pictures.read(png(samples, 8, RGB_ALPHA, profile=P3)), expected, 1.5)


# Depth and transparency


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("order", "photometric"), [("<", 0), ("<", 1), (">", 1)])
def test_tiff_of_sixteen_bits_says_which_end_is_white(order: str, photometric: int, compressed: bool) -> None:
    grey = RAMP if photometric else 65535 - RAMP
    assert_near(
        pictures.read(tiff(grey, photometric, order, compressed=compressed)), np.repeat(RAMP / 257, 3, axis=2), 0.51
    )


def test_tiff_of_twelve_bits_is_not_black() -> None:
    pixels = pictures.read(tiff(RAMP >> 4, 1, bits=12))
    assert_near(pixels, np.repeat((RAMP >> 4) / 4095 * 255, 3, axis=2), 0.51)


def test_signed_samples_have_no_known_range() -> None:
    for samples in (np.full((8, 8, 1), 200, np.uint8), RAMP):
        with pytest.raises(pictures.Rejected, match="pixels without a known range: "):
            pictures.read(tiff(samples, 1, format=2))


@st.composite
def stored(draw: st.DrawFn) -> tuple:
    """Draw a colour type, a depth, samples, the alpha that they mean, 0..1, a palette and a tRNS chunk."""
    colour = draw(st.sampled_from(list(CHANNELS)))
    depth = draw(st.sampled_from({GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}.get(colour, (8, 16))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(8, 11)), draw(st.integers(8, 11))
    largest = 2**depth - 1
    # Of few values, so that many of them are the transparent one, and of some that differ from it by their low byte.
    few = rng.integers(0, largest, 3, endpoint=True)
    few = np.append(few, few ^ 1)
    samples = rng.choice(few, (height, width, CHANNELS[colour]))
    palette = transparency = None
    alpha = np.ones((height, width, 1))
    if colour == PALETTE:
        palette = rng.integers(0, 256, (largest + 1, 3))
    if colour in (GREY_ALPHA, RGB_ALPHA):
        alpha = samples[..., -1:] / largest
    elif draw(st.booleans()):
        if colour == PALETTE:
            alphas = np.append(rng.integers(0, 256, min(largest, 5)), [255] * 256).astype(np.uint8)
            transparency = alphas[: min(largest, 5)].tobytes()
            alpha = alphas[samples] / 255
        else:
            key = samples[0, 0]
            transparency = key.astype(">u2").tobytes()
            alpha = 1.0 - (samples == key).all(axis=2, keepdims=True)
    return colour, depth, samples, alpha, palette, transparency


@given(stored(), st.sampled_from([None, 1.0, 1.8, 2.2]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_png_means_what_its_chunks_say(stored: tuple, gamma: float | None) -> None:
    colour, depth, samples, alpha, palette, transparency = stored
    light = {GREY: 1, GREY_ALPHA: 1}.get(colour, 3)
    primaries = DISPLAY_P3 if light == 3 else None
    data = None if gamma is None else profile(gamma, primaries)
    found = pictures.read(png(samples, depth, colour, palette, transparency, data))
    values = palette[samples[..., 0]] / 255 if colour == PALETTE else samples[..., :light] / (2**depth - 1)
    check(found, values, alpha, gamma, primaries, depth)


@given(
    st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 3), (2, 4)]),
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from("<>"),
    st.booleans(),
    st.sampled_from([None, 1.0, 1.8, 2.2]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_tiff_means_what_its_tags_say(
    form: tuple[int, int], kind: type, order: str, compressed: bool, gamma: float | None, seed: int
) -> None:
    photometric, channels = form
    # Pillow knows neither grey of 16 bits with alpha, nor big-endian with white as 0.
    assume(kind == np.uint8 or (form != (1, 2) and (form != (0, 1) or order == "<")))
    largest = np.iinfo(kind).max
    samples = np.random.default_rng(seed).integers(0, largest, (8, 9, channels), kind, endpoint=True)
    light = 1 if channels < 3 else 3
    primaries = DISPLAY_P3 if light == 3 else None
    data = None if gamma is None else profile(gamma, primaries)
    extra = {"extra": 2} if channels > light else {}
    found = pictures.read(tiff(samples, photometric, order, compressed=compressed, profile=data, **extra))
    values = samples[..., :light] / largest
    alpha = samples[..., light:] / largest if extra else np.ones((8, 9, 1))
    depth = np.dtype(kind).itemsize * 8
    check(found, values if photometric else 1 - values, alpha, gamma, primaries, depth)


def check(
    found: np.ndarray, values: np.ndarray, alpha: np.ndarray, gamma: float | None, primaries: tuple | None, depth: int
) -> None:
    """Compare pixels with the values 0..1 that they are made of, to the rounding that is to be expected."""
    if gamma is None:
        colours = np.repeat(values, 3 // values.shape[2], axis=2) * 255
    else:
        # What profiles hold: a gamma in 256ths.
        colours = in_srgb(values ** (round(gamma * 256) / 256), primaries)
    expected = colours * alpha + 255 * (1 - alpha)
    # Between the levels of 8 bits, colours at the edge of sRGB are interpolated: few are off by more than 2.
    interpolated = depth == 16 and primaries is not None
    assert_near(found, expected, 1 if gamma is None else 7 if interpolated else 1.5)
    assert np.abs(found - expected).mean() < 0.6
