"""The expected score: the mean over the distribution that a score is drawn from, by the tokens' log-probabilities.

    E[score] = sum_v v p(v),   p(v) = probability of the tokens that spell v, over that of all numbers in range

One pass then says what many passes average to, since the reasoning before the score is held fixed. Which token spells
what is told by the text that the model's own tokenizer gives it, so that "10" may be one token or two. Where it is two,
"1" stands for 1 and for 10; what follows the "1" tells them apart. If the model wrote another digit, that has to be
asked for: `Unclear` says how, and `expected` is called again with the answer.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from earl.judges.answers import Unusable, places
from earl.judges.chat import Pass, Token
from earl.judges.rubric import Rubric

UNSEEN = 0.01
"""Share of the distribution over numbers that may remain unknown, in all: it moves the score by 0.1 at most."""

_NUMBER = re.compile(r"(\d+)($|[\s,\]}])")
"""A number, and at once the sign that ends it if the token holds it."""


@dataclass(frozen=True)
class Unclear:
    """Where an answer has to be continued to tell 1 from 10: it begins with ``beginning``, which ends in "1"."""

    which: int
    """Number of the score, in the rubric's order."""
    beginning: str


@dataclass
class _Masses:
    """Probabilities of what may stand at the place of a score."""

    numbers: dict[int, float] = field(default_factory=dict)
    one: float = 0.0
    """Of the token "1" with nothing behind it, which may become 10."""
    unseen: float = 0.0
    """Of the tokens that the model did not list."""

    def add(self, number: int, mass: float) -> None:
        self.numbers[number] = self.numbers.get(number, 0.0) + mass


def expected(
    answer: Pass, rubric: Rubric, continued: dict[int, Token] | None = None
) -> tuple[dict[str, float], list[Unclear]]:
    """Return the expected number of each score, in the rubric's range, and what is unclear; one of them is empty.

    Args:
        answer: An intact answer with log-probabilities.
        continued: By number of the score, the token that followed where an earlier call was `Unclear`.

    Raises:
        Unusable: the tokens do not spell the answer, or more than `UNSEEN` of a distribution is not known.
    """
    if answer.tokens is None:
        raise Unusable("the answer came without log-probabilities; ask a server that gives them, or read out `sampled`")
    starts = token_starts(answer.text, answer.tokens)
    scores, unclear = {}, []
    for which, (name, place) in enumerate(zip(rubric.scores, places(answer.text, rubric), strict=True)):
        index = _token_at(starts, place)
        masses = _masses(answer.tokens[index], answer.text[starts[index] : place], rubric)
        after = (continued or {}).get(which)
        if after is None and answer.tokens[index].text == answer.text[starts[index] : place] + "1":
            after = answer.tokens[index + 1] if index + 1 < len(answer.tokens) else None
        total = sum(masses.numbers.values()) + masses.one
        if 10 not in rubric.values:
            masses.add(1, masses.one)
        elif after is not None:
            _divide(masses, after, name)
        elif masses.one > UNSEEN / 10 * total:
            unclear.append(Unclear(which, answer.text[:place] + "1"))
            continue
        else:
            masses.add(1, masses.one)
        scores[name] = _mean(masses, name)
    return ({}, unclear) if unclear else (scores, [])


def token_starts(text: str, tokens: Sequence[Token]) -> list[int]:
    """Return the offset of each token in the text, -1 for those before the last one that does not spell its part.

    Counted from the end, since a token may be a part of a character and spell nothing by itself. The token that ends
    the answer may be there, but is not part of the text.

    Raises:
        Unusable: the tokens do not spell the end of the text.
    """
    with_end, without = _spelt(text, tokens), _spelt(text, tokens[:-1])
    starts = max(with_end, without, key=len)
    if not starts:
        raise Unusable("the tokens do not spell the answer")
    count = len(tokens) if starts is with_end else len(tokens) - 1
    return [-1] * (count - len(starts)) + starts


def _spelt(text: str, tokens: Sequence[Token]) -> list[int]:
    """Offsets of the last tokens, as many as spell the end of the text."""
    end, starts = len(text), []
    for token in reversed(tokens):
        if not text[:end].endswith(token.text):
            break
        end -= len(token.text)
        starts.append(end)
    return starts[::-1]


def _token_at(starts: Sequence[int], place: int) -> int:
    index = max((i for i, start in enumerate(starts) if 0 <= start <= place), default=None)
    if index is None:
        raise Unusable("the tokens do not spell the answer as far back as its scores")
    return index


def _masses(token: Token, before: str, rubric: Rubric) -> _Masses:
    """Sort what could have stood here; ``before`` is what the token spells before the number begins."""
    masses = _Masses(unseen=_unseen(token))
    for text, logprob in token.choices:
        match = _NUMBER.match(text[len(before) :]) if text.startswith(before) else None
        if match is None:
            continue
        digits, end = match.groups()
        if digits == "1" and not end:
            masses.one += _probability(logprob)
        elif str(int(digits)) == digits and int(digits) in rubric.values:
            masses.add(int(digits), _probability(logprob))
    return masses


def _divide(masses: _Masses, after: Token, name: str) -> None:
    """Share the probability of "1" out to 1 and 10, by what comes after it."""
    zero = sum(_probability(logprob) for text, logprob in after.choices if re.match(r"0(\D|$)", text))
    end = sum(_probability(logprob) for text, logprob in after.choices if re.match(r"[\s,\]}]", text))
    if zero + end == 0:
        raise Unusable(f"{name}: neither an end nor a 0 is among the likeliest tokens after 1")
    # The unseen may be all zeros or all ends; it counts as far as "1" counts.
    masses.unseen += masses.one * _unseen(after) / (zero + end + _unseen(after))
    masses.add(10, masses.one * zero / (zero + end))
    masses.add(1, masses.one * end / (zero + end))


def _probability(logprob: float) -> float:
    # Rounding may lift it a little over 0; servers write large negative numbers for minus infinity.
    if not logprob < 1e-3:
        raise Unusable(f"{logprob} is no log-probability")
    return math.exp(logprob)


def _unseen(token: Token) -> float:
    return max(0.0, 1.0 - sum(_probability(logprob) for _, logprob in token.choices))


def _mean(masses: _Masses, name: str) -> float:
    known = sum(masses.numbers.values())
    if known <= 0:
        raise Unusable(f"{name}: no number in range is among the likeliest tokens")
    if masses.unseen > UNSEEN * (known + masses.unseen):
        share = masses.unseen / (known + masses.unseen)
        raise Unusable(f"{name}: {share:.1%} of the distribution over numbers may lie among tokens that are not listed")
    return sum(number * mass for number, mass in masses.numbers.items()) / known
