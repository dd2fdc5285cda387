"""Judges: what scores edited images. One interface; `get` finds an implementation by its configured name.

A stage asks `get`. A segment, whose ranks share a judge for many iterations, asks `in_segment`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from earl.config.schema import Config
    from earl.execution.ranks import Ranks


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
    failure: str | None = None
    """Why a model's judgement failed."""
    variance: Mapping[str, float] = field(default_factory=dict)
    """Population variance of each score over the passes of a model."""
    requests: Sequence[Mapping[str, Any]] = ()
    """Everything that a model was asked for this, with every raw answer: rows of `earl.files.tables.REQUEST`."""


class Judge(Protocol):
    """What every judge can do."""

    name: str
    """Recorded beside every score."""
    model: str | None
    """The model that judges; None for a judge that asks none."""
    revision: str | None
    """Which version of that model, where it is known."""
    rubrics_digest: str | None
    """Digest of what all its rubrics say; None for a judge without rubrics."""

    def score(self, judgements: Sequence[Judgement]) -> list[Verdict]:
        """Return one verdict for each question, in order. A failure is a verdict too, never a made-up score."""
        ...


def get(config: "Config") -> Judge:
    """Return the configured judge.

    Raises:
        EarlError: when one of its rubrics cannot be read.
    """
    if config.judge == "program":
        from earl.judges.program import ProgramJudge

        return ProgramJudge()
    from earl.judges import model_judge

    return model_judge.from_config(config)


@contextmanager
def in_segment(config: "Config", team: "Ranks") -> Iterator[Judge]:
    """Yield the configured judge on every rank of a segment; all enter and leave together, in their main threads.

    For `vllm` the segment starts a server (see `earl.judges.segment`), whose scores say the same of who judged as those
    of the judge `vllm` in a stage. The server ends with the segment, however that ends.

    Raises:
        EarlError: see `get` and `earl.judges.segment.serving`.
    """
    if config.judge != "vllm":
        yield get(config)
        return
    from earl.judges import model_judge, segment

    with segment.serving(config, team) as url:
        yield model_judge.from_config(config, url)
