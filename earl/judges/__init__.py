"""Judges: what scores edited images. One interface; `get` finds an implementation by its configured name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from earl.errors import EarlError

if TYPE_CHECKING:
    import numpy as np

    from earl.config.schema import Config


@dataclass(frozen=True)
class Judgement:
    """One question to a judge. Images are uint8 [height, width, 3]."""

    instruction: str
    original: "np.ndarray"
    edited: "np.ndarray"
    target: "np.ndarray | None" = None
    task: str | None = None


@dataclass(frozen=True)
class Verdict:
    """One answer. Scores are in 0..10 and set only where ``status`` is ``ok``; ``raw`` keeps the judge's words."""

    status: Literal["ok", "failed"]
    raw: str
    edit_success: float | None = None
    overedit: float | None = None
    naturalness: float | None = None
    artifacts: float | None = None
    ground_score: float | None = None


class Judge(Protocol):
    """What every judge can do."""

    name: str
    """Recorded beside every score."""

    def score(self, judgements: Sequence[Judgement]) -> list[Verdict]:
        """Return one verdict for each question, in order. A failure is a verdict too, never a made-up score."""
        ...


def get(config: "Config") -> Judge:
    """Return the configured judge.

    Raises:
        EarlError: when this version has no such judge.
    """
    if config.judge == "program":
        from earl.judges.program import ProgramJudge

        return ProgramJudge()
    raise EarlError(f"judge is {config.judge!r}, which this version does not have; it has 'program'")
