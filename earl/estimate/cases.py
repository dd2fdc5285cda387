"""What is asked of the simulation of a step, and its answer. See `earl.estimate.simulation`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from earl.messages.errors import EarlError


@dataclass(frozen=True)
class Case:
    """A step of the learner on one rank; see `earl.estimate.memory.learner`."""

    text: str
    """Fields of the policy's configuration, as JSON."""
    ranks: int
    splits: bool
    """Whether models are split even where there is one rank."""
    episodes: int
    """In a micro-batch."""
    group: int
    """Episodes of one prompt."""
    prompt: int
    completion: int
    top_k: int
    top_p: float
    """Of the support that log-probs are normalised over; -1 and 1: they leave out nothing."""
    bfloat16: bool
    packed: bool
    checkpointing: bool
    reference: bool
    offload: bool
    lora: tuple[int, int, tuple[str, ...]] | None = None
    """Rank, alpha and targets of an adapter that is trained in the place of all weights."""


@dataclass(frozen=True)
class VisionCase:
    """A batch of images made tokens, and tokens made images; see `earl.estimate.memory.vision`."""

    vision: str
    """Fields of the vision tokenizer's configuration, as JSON."""
    side: int


@dataclass(frozen=True)
class Bytes:
    """Bytes of a rank: what stays between steps, by name, and the most there are in each phase."""

    at_rest: dict[str, int]
    peaks: dict[str, int]


Question = Case | VisionCase


class NotSimulated(EarlError):
    """The simulation failed."""


_known: dict[Question, Bytes] = {}


def simulate(cases: Sequence[Question]) -> list[Bytes]:
    """Return what a rank holds in each case; some seconds of a process of its own for those that are new.

    Raises:
        NotSimulated: with what the simulation said.
    """
    new = [case for case in dict.fromkeys(cases) if case not in _known]
    if new:
        asked = json.dumps([asdict(case) for case in new])
        command = [sys.executable, "-m", "earl.estimate.simulation"]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotSimulated(f"what a GPU holds could not be simulated: {done.stderr.strip()[-2000:]}")
        _known.update(zip(new, (Bytes(**found) for found in json.loads(done.stdout)), strict=True))
    return [_known[case] for case in cases]
