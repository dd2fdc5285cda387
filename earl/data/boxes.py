"""Boxes ``[x1, y1, x2, y2]`` in reasoning text. Boxes in pixels scale with their image."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earl.config.sections import BoxUnit

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_COLOUR = re.compile(r"\b(?:rgb|rgba|bgr|bgra|argb|hsl|hsla|hsv|hsva|hsb|cmyk|colou?rs?)\W{0,4}$", re.IGNORECASE)
"""Words before four numbers that are a colour, not a box."""


def scale_boxes(text: str, scale_x: float, scale_y: float, width: float = math.inf, height: float = math.inf) -> str:
    """Return a text with every box in pixels scaled; whole numbers stay whole, others get two decimals.

    Args:
        text: Reasoning.
        scale_x: New width divided by the old one.
        scale_y: New height divided by the old one.
        width: Old width in pixels. Numbers that are not a box inside the image stay as they are; so do colours.
        height: Old height in pixels.
    """
    if scale_x == scale_y == 1:
        return text
    is_box = _in_unit("pixels", width, height)

    def scaled(match: re.Match[str]) -> str:
        if _is_colour(match) or not is_box(*map(float, match.groups())):
            return match[0]
        numbers = zip(match.groups(), (scale_x, scale_y, scale_x, scale_y), strict=True)
        return f"[{', '.join(_scale_number(number, scale) for number, scale in numbers)}]"

    return _FOUR.sub(scaled, text)


def misfits(text: str, unit: "BoxUnit", width: float, height: float) -> list[str]:
    """Return the lists of four numbers in a text, colours aside, that are not boxes in this unit."""
    is_box = _in_unit(unit, width, height)
    return [
        match[0] for match in _FOUR.finditer(text) if not _is_colour(match) and not is_box(*map(float, match.groups()))
    ]


def _in_unit(unit: "BoxUnit", width: float, height: float) -> Callable[[float, float, float, float], bool]:
    def in_pixels(x1: float, y1: float, x2: float, y2: float) -> bool:
        # A box smaller than a pixel is in another unit.
        return 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height and max(x2, y2) > 1

    def relative(x1: float, y1: float, x2: float, y2: float) -> bool:
        return 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1

    return {"pixels": in_pixels, "relative": relative, "none": lambda *_: True}[unit]


def _is_colour(match: re.Match[str]) -> bool:
    return _COLOUR.search(match.string, max(0, match.start() - 16), match.start()) is not None


def _scale_number(number: str, scale: float) -> str:
    value = float(number) * scale
    return f"{value:.2f}" if "." in number else str(math.floor(value + 0.5))
