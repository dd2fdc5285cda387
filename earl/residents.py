"""What a process keeps in memory between stages: engine, judge, learner.

Stages ask here for what is slow to load, whether their process stays (`earl worker`) or ends with them; in the latter
nothing is found. A key says all that a value depends on, with the digests of the files it came from, so what is found
equals what would be loaded. Of each kind one value is kept: asking for another one lets go of it first, by its method
``close`` if it has one.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")

stays = False
"""Whether this process goes on after a stage, as a worker does. Who keeps more than memory, such as connections to
other processes, asks for this: a process that ends with its stage closes them."""

_kept: dict[str, tuple[Hashable, object]] = {}


def get(kind: str, key: Hashable, make: Callable[[], T]) -> T:
    """Return the value that is kept under ``key``, or make it and keep it. Users do not alter it."""
    found = take(kind, key)
    value = make() if found is None else found
    put(kind, key, value)
    return value


def take(kind: str, key: Hashable) -> T | None:
    """Return the value that is kept under ``key``, and keep it no longer: for one that is going to be altered.

    A value of another key is let go of.
    """
    known, value = _kept.pop(kind, (None, None))
    if known == key:
        return value
    _close(value)
    return None


def put(kind: str, key: Hashable, value: object) -> None:
    """Keep a value, in the place of another one of its kind."""
    _kept[kind] = key, value


def clear() -> None:
    """Let go of everything, since a stage that failed may have left things half done."""
    while _kept:
        _close(_kept.popitem()[1][1])


def _close(value: object) -> None:
    if hasattr(value, "close"):
        value.close()
