"""Where a model thinks before it answers: the marks that models put around it, and the answer without it."""

import re

_KINDS = "think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad"
_TAG = (
    # <think>, </thinking>, <seed:think>, <|begin_of_thought|>, <|END_THINKING|>, <|end thinking|>
    rf"<[|\uff5c]?\s*(?P<end>/|end[ _])?(?:(?:begin|start|of)[ _])*(?:\w+:)?(?P<kind>{_KINDS})\b[^<>]*>"
    r"|(?P<magistral>\[/?(?-i:THINK)\])|(?P<kimi>◁/?think▷)"
)
TAG = re.compile(_TAG, re.IGNORECASE)
"""What stands around thinking and nothing else."""
MARK = re.compile(rf"{_TAG}|(?P<harmony><\|channel\|>(?:analysis|commentary)\b|<\|end\|>)", re.IGNORECASE)
"""What begins or ends thinking."""


class Unfinished(Exception):
    """Thinking that begins and does not end."""


def masked(text: str) -> str:
    """Return a text with all thinking replaced by as many spaces, so that offsets stay the same.

    An end without a beginning ends what began before the text, in the prompt.

    Raises:
        Unfinished: thinking begins and does not end.
    """
    kept, start, depth, inside = text, 0, 0, ""
    for match in MARK.finditer(text):
        kind, ends = _meaning(match)
        if not inside and ends:
            if kind != "harmony":  # there it ends any message
                kept = _blank(kept, 0, match.end())
        elif not inside:
            inside, start, depth = kind, match.start(), 1
        elif kind == inside:
            depth += -1 if ends else 1
            if depth == 0:
                kept, inside = _blank(kept, start, match.end()), ""
    if inside:
        raise Unfinished(f"thinking that begins with {text[start : start + 40]!r} does not end")
    return kept


def _meaning(match: re.Match[str]) -> tuple[str, bool]:
    """The kind of a mark, and whether it is an end: thinking of one kind is not ended by another."""
    if match["kind"]:
        return match["kind"].lower(), match["end"] is not None
    return match.lastgroup or "", match[0].startswith(("[/", "◁/", "<|e", "<|E"))


def _blank(text: str, start: int, end: int) -> str:
    return text[:start] + " " * (end - start) + text[end:]
