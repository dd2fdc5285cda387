"""A question to a judge model, everything that was asked and answered for it, and the verdict that comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pvariance
from typing import Any

from earl.judges import Verdict, answers
from earl.judges.answers import Unusable
from earl.judges.chat import Messages, Question, Reply
from earl.judges.rubric import Rubric
from earl.statistics import seeds

Request = dict[str, Any]
"""A row of `earl.files.tables.REQUEST`."""


@dataclass
class Case:
    """One question to the model, which any number of judgements may share."""

    key: str
    rubric: Rubric
    messages: Messages
    requests: list[Request] = field(default_factory=list)
    failure: str | None = None
    hopeless: bool = False

    @property
    def attempt(self) -> int:
        """Number of the next try."""
        return 1 + max((request["attempt"] for request in self.requests), default=-1)

    @property
    def passes(self) -> list[dict[str, Any]]:
        """The answers that give scores."""
        return [one for request in self.requests for one in request["passes"] if one["scores"]]

    def seed(self, attempt: int) -> int:
        """The seed of a try, which hangs on the question's content alone."""
        # Some servers take no more than 31 bits.
        return seeds.seed("judge", self.key, attempt) % 2**31

    def record(self, attempt: int, question: Question, reply: Reply) -> list[dict[str, Any]]:
        """Add a reply to what has been asked, as a row of `earl.files.tables.REQUEST`; return its passes."""
        passes = [
            {"raw": one.text, "finish_reason": one.finish_reason, "failure": None, "scores": []} for one in reply.passes
        ]
        self.requests.append(
            {
                "question": self.key,
                "rubric": self.rubric.name,
                "rubric_digest": self.rubric.digest,
                "attempt": attempt,
                "continues": question.messages[-1]["content"] if question.continues else None,
                "seed": question.seed,
                "error": reply.error,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
                "seconds": reply.seconds,
                "passes": passes,
            }
        )
        if reply.error is not None:
            # Whatever may pass has been tried again already, with the same seed.
            self.failure, self.hopeless = reply.error, True
        return passes


def by_question(rows: Sequence[Sequence[Request]]) -> dict[str, list[Request]]:
    """What was asked for some judgements, by question; rows that share a question hold the same of it."""
    found: dict[str, list[Request]] = {}
    for row in rows:
        own: dict[str, list[Request]] = {}
        for request in row:
            own.setdefault(request["question"], []).append(request)
        found |= own
    return found


def reads_alike(requests: Sequence[Request], rubric: Rubric, expected: bool) -> bool:
    """Return whether stored answers are read now as they were then; an earlier version took drafts for scores."""
    for one in (one for request in requests for one in request["passes"] if one["scores"]):
        try:
            found = answers.parse(one["raw"], one["finish_reason"], rubric)
        except Unusable:
            return False
        if not expected and found != {score["name"]: score["value"] for score in one["scores"]}:
            return False
    return True


def verdict(row: Sequence[Case | str], samples: int) -> Verdict:
    """Return what the questions of one judgement come to; a text says why there is no question."""
    cases = [case for case in row if isinstance(case, Case)]
    requests = [request for case in cases for request in case.requests]
    raw = "\n".join(one["raw"] for case in cases for one in case.passes or _last_passes(case))
    failures = [
        case if isinstance(case, str) else f"{case.rubric.name}: {case.failure}"
        for case in row
        if isinstance(case, str) or len(case.passes) < samples
    ]
    if failures:
        return Verdict("failed", raw, failure="; ".join(failures), requests=requests)
    means, variance = {}, {}
    for case in cases:
        for name in case.rubric.scores:
            values = [case.rubric.stretched(_value(one, name)) for one in case.passes]
            means[name], variance[name] = fmean(values), pvariance(values)
    return Verdict("ok", raw, **means, variance=variance, requests=requests)


def _last_passes(case: Case) -> list[dict[str, Any]]:
    """The answers to the last try of a question, its continuations aside."""
    asked = [request for request in case.requests if request["continues"] is None]
    return asked[-1]["passes"] if asked else []


def _value(record: dict[str, Any], name: str) -> float:
    return next(score["value"] for score in record["scores"] if score["name"] == name)
