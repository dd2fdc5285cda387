"""Marks of chat templates in the texts of others: an instruction must not place an image or begin a turn.

A tokenizer that reads ``<|image_pad|>`` in an instruction puts the picture's features there. Which marks a server's
model knows is not known here, so everything that looks like one is broken, alike for every judge: its answers, and the
keys they are kept under, then do not depend on how the model is reached.
"""

import re
from collections.abc import Iterable

_BEGINNING = re.compile(
    r"<(?=[|\uff5c]|[^<>\s]+>)"  # <|im_end|>, <image>, </s>, <start_of_turn>, <<SYS>>
    r"|\[(?=/?[a-z]?[A-Z][A-Z\d_]+\])"  # [INST], [/INST], [IMG_BREAK], [gMASK]
    "|◁(?=/?\\w+▷)"
)


def unbroken(tokens: Iterable[str]) -> list[str]:
    """Return the special tokens of a tokenizer that `plain` leaves whole, so that an instruction could write them."""
    return [token for token in tokens if plain(token) == token]


def plain(text: str, but: re.Pattern[str] | None = None) -> str:
    """Return a text with a space after the first character of every mark, so that it stays text: ``< |im_end|>``.

    A text without marks stays as it is, and so does what ``but`` matches: the marks that a model's own words may hold.
    """
    kept = {match.start() for match in but.finditer(text)} if but else ()
    return _BEGINNING.sub(lambda found: found[0] if found.start() in kept else f"{found[0]} ", text)
