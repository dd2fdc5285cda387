"""Answers of a judge model: the JSON schema they follow, and the parser, which reads and never guesses.

The parser also takes the answers of servers that know no schema: JSON in a code fence, after thinking or among prose,
with its fields in any order. It gives up wherever two readings are possible or a number is not one of the rubric's:

    After thinking, an answer is one JSON object with the scores, around which prose names no score, has no number in
    range but those of the object (and the scale, "0 to 10" or "out of 10", labels, "image 1" or "step 2", and the
    numbers of a list), and does not go on with the object's sentence. The object has no further score and no number
    but in texts and sizes, and is neither struck out nor in a comment. "80%" and "80/100" are 8 of 10.

So a draft or a quotation ("an answer such as {...} would be too harsh. I give 8 and 9") is not taken for the answer.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from earl.judges import thinking
from earl.judges.rubric import REASONING, SCORES_OF, Rubric

_WHOLE = re.compile(r"-?\d{1,4}(\.0+)?")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\d|%|\.\d|(?:st|nd|rd|th)\b)")
"""A number in prose; a percentage, an ordinal or the end of a word is none."""
_IMAGE = "(?:image|picture|photo|figure)"
_LABELS = rf"\b{_IMAGE}(?:\s+#?|-)[1-3]|\b{_IMAGE}s\s+[12]\s*(?:and|&)\s*[23]|\b(?:step|criterion)\s+\d"
"""What a number names: one of at most three images, a step or a criterion."""
_SHARE = re.compile(
    r"(?<![\w.])(\d{1,3}(?:\.\d+)?)(?:\s?%|\s?per\s?cent\b|\s*(?:/|out\s+of)\s*(20|50|100)\b(?!\.\d))", re.IGNORECASE
)
"""A percentage, or a number out of more than a rubric's."""
_STRUCK = re.compile(
    r"<!--.*?(?:-->|\Z)|(?<!~)~~(?!~).*?(?<!~)~~(?!~)|<(draft|del|s|strike|example)\b[^<>]*>.*?(?:</\1\s*>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
"""What is written and not said."""
_SIZES = {"size", "width", "height", "resolution", "dimensions"}
"""Names of numbers that are no scores."""
_LISTED = re.compile(r"^[ \t>*#-]*(\d{1,2})[.)][ \t]+(?=[*_\"'`(]*[^\W\d])", re.MULTILINE)
"""The number before an item of a list; words follow it."""
_BETWEEN = " \t\r\n`\"')]},;:*\u2013\u2014-"
"""What may stand between an object and the sentence that goes on after it."""
_LONGEST = 100_000
"""Characters of an answer that are looked at; a real one has hundreds."""
_BRACE = re.compile(r'\{(?=\s*["}])')
"""Where a JSON object begins."""


class Unusable(Exception):
    """An answer that gives no scores; the message says why."""


def schema(rubric: Rubric, reasoning_length: int) -> dict[str, Any]:
    """Return the JSON schema of an answer: reasoning of so many characters at most, then whole numbers in range."""
    number = {"type": "integer", "minimum": rubric.lowest, "maximum": rubric.highest}
    scores: dict[str, Any] = dict.fromkeys(rubric.scores, number)
    if rubric.score_list is not None:
        count = len(rubric.scores)
        scores = {rubric.score_list: {"type": "array", "items": number, "minItems": count, "maxItems": count}}
    properties = {REASONING: {"type": "string", "maxLength": reasoning_length}, **scores}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def rest_pattern(rubric: Rubric, which: int) -> str:
    """Return a regular expression of what may follow the first digit of score number ``which`` to the end."""
    number = "(" + "|".join(str(value) for value in reversed(rubric.values)) + ")"
    later = rubric.scores[which + 1 :]
    if rubric.score_list is not None:
        return "0?" + "".join(f", ?{number}" for _ in later) + r"\]\}"
    return "0?" + "".join(f', ?"{name}": ?{number}' for name in later) + r"\}"


def parse(text: str, finish_reason: str, rubric: Rubric) -> dict[str, int]:
    """Return the number that an answer gives to each of the rubric's scores, in the rubric's range.

    Raises:
        Unusable: the answer is cut off, holds no JSON object with all scores, holds several that differ, one of the
            numbers is missing, not whole, not finite or out of range, or the text around the object may say otherwise.
    """
    if finish_reason != "stop":
        raise Unusable(f"the answer is not finished: finish_reason is {finish_reason!r}")
    return _locate(text, rubric)[0]


def places(text: str, rubric: Rubric) -> list[int]:
    """Return where the number of each score begins in an intact JSON answer, as offsets into the text.

    Inside a JSON string every quote has a backslash before it, so a quoted name followed by a colon is a key.

    Raises:
        Unusable: the answer cannot be read, or a score is not written as a plain number there.
    """
    _, start, end = _locate(text, rubric)
    if rubric.score_list is None:
        patterns = [rf'"{name}"\s*:\s*(?=\d)' for name in rubric.scores]
    else:
        patterns = [rf'"{rubric.score_list}"\s*:\s*\[\s*' + r"\d+\s*,\s*" * i for i in range(len(rubric.scores))]
    found = [list(re.finditer(pattern, text[start:end])) for pattern in patterns]
    if any(len(matches) != 1 for matches in found):
        raise Unusable("the scores do not stand in the answer as plain numbers, each once")
    return [start + matches[0].end() for matches in found]


def _locate(text: str, rubric: Rubric) -> tuple[dict[str, int], int, int]:
    """Return the scores of an answer, and where the object with them begins and ends; the last of equal ones."""
    if len(text) > _LONGEST:
        raise Unusable(f"the answer has {len(text)} characters")
    said = text
    if not _is_json(text):  # where all of it is JSON, a mark of thinking is part of a string
        try:
            text = thinking.masked(text)
        except thinking.Unfinished as error:
            raise Unusable(str(error)) from error
    objects = list(_objects(text, rubric))
    found = [item for item in objects if _answers(item.value, rubric)]
    if not found:
        raise Unusable("no JSON object with the scores " + ", ".join(rubric.scores))
    readings = [_read(item.value, rubric) for item in found]
    if any(reading != readings[0] for reading in readings):
        raise Unusable("several JSON objects with different scores")
    _, start, end = found[-1]
    if any(_is_struck(text, objects, item) for item in found):
        raise Unusable("the JSON object is struck out, a draft or part of a comment")
    if said[end:] != text[end:]:
        raise Unusable("thinking goes on after the JSON object")
    _check_prose(text, objects, found, readings[0], rubric)
    return readings[0], start, end


def _check_prose(
    text: str, objects: "list[_Object]", found: "list[_Object]", reading: dict[str, int], rubric: Rubric
) -> None:
    """Refuse an answer whose object may be a draft or a quotation; the module's header has the rule."""
    outside = _without(text, found)
    if match := _spelled(rubric).search(outside):
        raise Unusable(f"{match[0]!r} stands outside the JSON object, too")
    prose = _without_list_numbers(_without(text, objects))
    prose = re.sub(_harmless(rubric), " ", prose, flags=re.IGNORECASE)
    for match in _NUMBER.finditer(_SHARE.sub(lambda share: _stretched(share, rubric), prose)):
        value = float(match[0])
        if rubric.lowest <= value <= rubric.highest and value not in reading.values():
            raise Unusable(f"the number {match[0]} stands outside the JSON object and may be a score")
    for item in found:
        if (rest := text[item.end :].lstrip(_BETWEEN))[:1].islower():
            raise Unusable(f"the JSON object is part of a sentence, which goes on with {rest[:20]!r}")


def _spelled(rubric: Rubric) -> re.Pattern[str]:
    """Return a pattern of the names of the scores, as prose and keys spell them."""
    names = [name.replace("overedit", "over_edit").replace("_", r"[\W_]{0,3}") for name in rubric.scores]
    return re.compile("|".join(names), re.IGNORECASE)


def _stretched(share: re.Match[str], rubric: Rubric) -> str:
    """Return a percentage, or a number out of 20, 50 or 100, as a number in the rubric's range."""
    value = float(share[1]) / float(share[2] or 100)
    return f" {rubric.lowest + value * (rubric.highest - rubric.lowest):.4g} "


def _harmless(rubric: Rubric) -> str:
    """Return a pattern of what has numbers that are no scores: the scale, and labels of images, steps and criteria."""
    lowest, highest = rubric.lowest, rubric.highest
    to = r"\s*(?:\([^()\d]{1,30}\)\s*)?(?:-|\u2013|\u2014|to|\.\.+)\s*"
    scale = rf"(?<!\d){lowest}{to}{highest}|between\s+{lowest}\s+and\s+{highest}|\[{lowest},\s*{highest}\]"
    scale += rf"|(?:out of|/)\s*{highest}|\b{highest}-point\s+scale"
    return rf"(?:{scale}|{_LABELS})(?![\d.]*\d)"


def _without_list_numbers(prose: str) -> str:
    """Return prose without the numbers of lists, which count from 1 to 2 or more; others may be scores."""
    lists: list[list[re.Match[str]]] = []
    for found in _LISTED.finditer(prose):
        if found[1] == "1":
            lists.append([found])
        elif lists and int(found[1]) == len(lists[-1]) + 1:
            lists[-1].append(found)
    for found in reversed([item for items in lists if len(items) > 1 for item in items]):
        prose = prose[: found.start(1)] + prose[found.end(1) :]
    return prose


def _without(text: str, objects: "list[_Object]") -> str:
    starts, ends = [0, *(item.end for item in objects)], [*(item.start for item in objects), len(text)]
    return " ".join(text[start:end] for start, end in zip(starts, ends, strict=True))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


class _Object(NamedTuple):
    """A JSON object in a text, and where it begins and ends."""

    value: dict[str, Any]
    start: int
    end: int


def _objects(text: str, rubric: Rubric) -> Iterator[_Object]:
    """Yield the outermost JSON objects in a text; braces of prose are passed over.

    Where an object begins and breaks off, nothing after that is read: it may be a part of what broke off.
    """
    scored: list[dict[str, Any]] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a name stands there twice")
        if _answers(value, rubric):
            scored.append(value)
        return value

    # Not strict: schemas let control characters into strings, which strict JSON does not.
    decoder = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=once, strict=False)
    brace = _BRACE.search(text)
    while brace is not None:
        scored.clear()
        try:
            value, end = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError) as error:
            raise Unusable(f"a JSON object that cannot be read: {error}") from error
        if any(one is not value for one in scored):
            raise Unusable("the scores stand in an object inside another one")
        yield _Object(value, brace.start(), end)
        brace = _BRACE.search(text, end)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _answers(item: dict[str, Any], rubric: Rubric) -> bool:
    return rubric.score_list in item if rubric.score_list else any(name in item for name in rubric.scores)


def _is_struck(text: str, objects: "list[_Object]", item: "_Object") -> bool:
    """Return whether an object is inside what is struck out; marks inside objects are texts."""
    for one in objects:
        text = text[: one.start] + " " * (one.end - one.start) + text[one.end :]
    return any(match.start() < item.start < match.end() for match in _STRUCK.finditer(text))


def _check_further(item: dict[str, Any], rubric: Rubric) -> None:
    """Refuse an object that may give another score beside the rubric's."""
    own = [rubric.score_list] if rubric.score_list else rubric.scores
    others = {name for names in SCORES_OF.values() for name in names} - {*rubric.scores}  # those of other rubrics
    stack: list[tuple[str, Any]] = [(name, value) for name, value in item.items() if name not in own]
    while stack:
        name, value = stack.pop()
        if _spelled(rubric).search(name):
            raise Unusable(f"the object has {name[:40]!r}, too")
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list):
            stack += [(name, one) for one in value]
        elif _is_number(value) and name.lower() not in _SIZES | others:
            raise Unusable(f"the number {str(value)[:40]} of {name[:40]!r} may be a score")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\s*-?\d+(\.\d+)?\s*(%|(/|out of)\s*\d+)?\s*", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(item: dict[str, Any], rubric: Rubric) -> dict[str, int]:
    _check_further(item, rubric)
    if rubric.score_list is None:
        numbers = [item.get(name) for name in rubric.scores]
    else:
        numbers = item[rubric.score_list]
        if len(rubric.scores) == 1 and not isinstance(numbers, list):
            numbers = [numbers]
        if not isinstance(numbers, list) or len(numbers) != len(rubric.scores):
            raise Unusable(f"{rubric.score_list} is not a list of {len(rubric.scores)} numbers")
    return {name: _number(name, value, rubric) for name, value in zip(rubric.scores, numbers, strict=True)}


def _number(name: str, value: Any, rubric: Rubric) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # bool is a kind of int in Python, and no score.
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unusable(f"{name} is missing" if value is None else f"{name} is {str(value)[:40]!r}, not a whole number")
    if value not in rubric.values:
        raise Unusable(f"{name} is {str(value)[:40]}, outside {rubric.lowest}..{rubric.highest}")
    return value
