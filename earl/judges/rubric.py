"""Rubrics: what a judge model is asked, as data files. Anyone can bring texts of their own.

A rubric is a Jsonnet (or JSON) file with these fields::

    {
      name: 'semantic consistency',
      images: ['original', 'edited'],        // what the judge sees, of: original, target, edited
      scores: ['edit_success', 'overedit'],  // the columns that the answer's numbers go to, in their order
      lowest: 0, highest: 10,                // range of the whole numbers in the answer, inside 0..10
      prompt: 'text with {instruction}, and with {original}, {edited} where the images go',
      score_list: 'score',                   // optional: the answer holds one list of this name, not a field a score
    }

Images that the prompt does not place come after it, in the order of `images`. Scores of another range than 0..10 are
stretched to it. What a rubric says is identified by a digest of the evaluated fields, so a comment changes nothing.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from earl.config.jsonnet_values import evaluate
from earl.files import remedies
from earl.messages.errors import EarlError

ImageName = Literal["original", "target", "edited"]
ScoreName = Literal["edit_success", "overedit", "naturalness", "artifacts", "ground_score"]
SCORES_OF = {
    "semantic_consistency": ("edit_success", "overedit"),
    "perceptual_quality": ("naturalness", "artifacts"),
    "ground_score": ("ground_score",),
}
"""The scores that each part of a verdict consists of (VIEScore: SC and PQ)."""
REASONING = "reasoning"
"""Name of the text that every answer begins with."""


class Rubric(BaseModel):
    """One question about an edit, with the form of its answer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1)
    images: list[ImageName] = Field(min_length=1)
    scores: list[ScoreName] = Field(min_length=1)
    lowest: int = Field(ge=0, le=10)
    highest: int = Field(ge=0, le=10)
    prompt: str = Field(min_length=1)
    score_list: Annotated[str, StringConstraints(pattern=r"^\w+$")] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest is {self.lowest}, not below highest ({self.highest})")
        for name in ("images", "scores"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice")
        placed = re.findall(r"\{(original|target|edited)\}", self.prompt)
        if len(set(placed)) < len(placed):
            raise ValueError("prompt places an image twice")
        if strange := sorted(set(placed) - set(self.images)):
            raise ValueError(f"prompt places the image {strange[0]}, which is not in images")
        if self.score_list == REASONING:
            raise ValueError(f"score_list is {REASONING!r}, the name of the text before it")
        return self

    @property
    def values(self) -> range:
        """The whole numbers that an answer may give."""
        return range(self.lowest, self.highest + 1)

    def stretched(self, value: float) -> float:
        """A number of this rubric's range on the scale 0..10 of every score column."""
        return 10 * (value - self.lowest) / (self.highest - self.lowest)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that the rubric says."""
        text = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def digest_all(rubrics: Sequence[Rubric]) -> str:
    """SHA-256, in hexadecimal, of everything that several rubrics say."""
    return hashlib.sha256("".join(one.digest for one in rubrics).encode()).hexdigest()


def load(path: Path) -> Rubric:
    """Read a rubric.

    Raises:
        EarlError: naming file and field, when it cannot be read or says something that cannot be.
    """
    if remedies.is_pointer(path):
        raise EarlError(f"{path}: {remedies.described(path)}")
    value = evaluate(path, {}).value
    try:
        return Rubric.model_validate(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"])) or "rubric"
        raise EarlError(
            f"{path}: {field}: {wrong['msg'].removeprefix('Value error, ')}; "
            "earl/judges/rubric.py says what belongs there"
        ) from error
