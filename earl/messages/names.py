"""Unknown names: what to tell someone who gave one."""

from collections.abc import Iterable
from difflib import get_close_matches

_NEAR = 0.7
"""Similarity (`difflib.SequenceMatcher.ratio`) from which a name may have been meant: a letter or two, or a part."""
_FEW = 12
"""Names that a message lists, at most."""


def near(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that may have been meant; None where none is near."""
    found = get_close_matches(name, list(known), n=1, cutoff=_NEAR)
    return found[0] if found else None


def hint(name: str, known: Iterable[str], where: str) -> str:
    """Return the end of a message about an unknown name: a near one, else all of a few, else where they stand."""
    names = list(known)
    if found := near(name, names):
        return f"did you mean {found}?"
    if len(names) <= _FEW:
        return f"there are {', '.join(names)}"
    return where
