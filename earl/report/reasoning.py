"""The reasoning that a policy wrote before its image, cut at its boxes, so that both can be shown in one colour.

Boxes ``[x1, y1, x2, y2]`` are in pixels of the original image. A policy may write anything: what is no box inside the
image stays text and is not drawn.
"""

import re
from dataclasses import dataclass

from earl.emu3.sequence import END_THINKING, reasoning_of

COLOURS = 6
CUT_OFF = "[no end, no image]"
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,4})?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclass(frozen=True)
class Box:
    """A box to draw: its corner and size in pixels, and a number that stands for its colour."""

    x: float
    y: float
    width: float
    height: float
    colour: int


@dataclass(frozen=True)
class Piece:
    """A part of the text, with its box where it is one."""

    text: str
    box: Box | None = None


def pieces(completion_text: str, width: int, height: int) -> list[Piece]:
    """Return the reasoning of a completion in pieces; nothing where it holds none.

    One that did not come to its end is reasoning too, and says so.

    Args:
        completion_text: What comes before a completion's first visual token.
        width: Pixels of the original image.
        height: Pixels of the original image.
    """
    text, end, _ = completion_text.partition(END_THINKING)
    if not reasoning_of(completion_text):
        return []
    found: list[Piece] = []
    colours: dict[tuple[float, ...], int] = {}
    start = 0
    for match in _BOX.finditer(text):
        corners = tuple(map(float, match.groups()))
        if not _is_inside(corners, width, height):
            continue
        # One place has one colour, however often it is named.
        colour = colours.setdefault(corners, len(colours) % COLOURS)
        left, top, right, bottom = corners
        found.append(Piece(text[start : match.start()]))
        found.append(Piece(match[0], Box(left, top, right - left, bottom - top, colour)))
        start = match.end()
    rest = text[start:] if end else f"{text[start:]} {CUT_OFF}"
    return [piece for piece in (*found, Piece(rest)) if piece.text]


def _is_inside(corners: tuple[float, ...], width: int, height: int) -> bool:
    left, top, right, bottom = corners
    return 0 <= left < right <= width and 0 <= top < bottom <= height


def boxes(found: list[Piece]) -> list[Box]:
    """Return the boxes of some pieces, each once, in the order in which they are named."""
    return list(dict.fromkeys(piece.box for piece in found if piece.box))
