"""Which held-out examples the report shows, and their pictures as data URIs.

The choice is a pure function of the two tables, and its rules are printed above the pictures.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from earl.files import images
from earl.files.evaluations import prompt_of
from earl.files.layout import Run
from earl.report import reasoning
from earl.report.contents import Series
from earl.statistics import seeds

PER_KIND = 4
SCORES = ("reward", "edit_success", "overedit", "naturalness", "artifacts")
FACTS = [
    "episode_id",
    "dataset",
    "example_id",
    "task",
    "instruction",
    "sample_index",
    "status",
    "completion_text",
    "raw",
    *SCORES,
]
RULES = {
    "Clear improvements": "largest gain in reward, each edit type once before any comes twice",
    "Failures": "lowest reward of the final policy, then the largest loss, edit types in turn",
    "At random": "drawn from the rest by a seed that the names of the prompts fix",
}
# Small pictures are shown as they are, large ones shrunk: the page has to stay light.
LARGEST_LOSSLESS, LARGEST_SIDE = 128, 256


@dataclass(frozen=True)
class Pair:
    """One prompt under the first and (where there is one) the last policy: rows of the two tables."""

    prompt: tuple[str, str]
    task: str
    first: int
    last: int | None
    reward_before: float
    reward_after: float

    @property
    def gain(self) -> float:
        return self.reward_after - self.reward_before


def choose(first: pa.Table, last: pa.Table | None) -> dict[str, list[Pair]]:
    """Return up to four pairs a kind, no prompt twice; the first sample of each prompt stands for it."""
    pairs = _pairs(first, last)
    chosen: dict[str, list[Pair]] = {}
    if last is not None:
        better = sorted((p for p in pairs if p.gain > 0), key=lambda p: (-p.gain, p.prompt))
        chosen["Clear improvements"] = _in_turn(better)
        taken = {p.prompt for p in chosen["Clear improvements"]}
        rest = [p for p in pairs if p.prompt not in taken]
        chosen["Failures"] = _in_turn(sorted(rest, key=lambda p: (p.reward_after, p.gain, p.prompt)))
    taken = {p.prompt for kind in chosen.values() for p in kind}
    rest = [p for p in pairs if p.prompt not in taken]
    chosen["At random"] = sorted(rest, key=lambda p: seeds.seed("gallery", *p.prompt))[:PER_KIND]
    return {kind: found for kind, found in chosen.items() if found}


def _pairs(first: pa.Table, last: pa.Table | None) -> list[Pair]:
    before, after = _first_samples(first), _first_samples(last) if last is not None else {}
    pairs = []
    for prompt, (row, facts) in sorted(before.items()):
        if last is None:
            pairs.append(Pair(prompt, facts["task"] or "", row, None, facts["reward"], facts["reward"]))
        elif prompt in after:
            other, found = after[prompt]
            pairs.append(Pair(prompt, facts["task"] or "", row, other, facts["reward"], found["reward"]))
    return pairs


def _first_samples(table: pa.Table) -> dict[tuple[str, str], tuple[int, dict[str, Any]]]:
    """Row and facts of each prompt's first sample; prompts whose judgement failed have no place in a ranking."""
    rows = enumerate(table.select(["dataset", "example_id", "task", "sample_index", "reward"]).to_pylist())
    known = sorted((row for row in rows if row[1]["reward"] is not None), key=lambda row: -row[1]["sample_index"])
    return {prompt_of(facts): (row, facts) for row, facts in known}


def _in_turn(ranked: list[Pair]) -> list[Pair]:
    """Take the best of every task, then the second best of every task, and so on, best task first."""
    seen: dict[str, int] = {}
    rounds = []
    for place, pair in enumerate(ranked):
        seen[pair.task] = seen.get(pair.task, 0) + 1
        rounds.append((seen[pair.task], place, pair))
    return [pair for _, _, pair in sorted(rounds, key=lambda item: item[:2])][:PER_KIND]


def cards(run: Run, series: Series) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield (kind, its rule, cards); a card holds the facts and pictures of a prompt under both policies."""
    first = series.table(run, series.first, FACTS)
    last = series.table(run, series.last, FACTS) if series.last > series.first else None
    chosen = choose(first, last)
    pairs = [pair for pairs in chosen.values() for pair in pairs]
    before = _rows(run, series, series.first, first, [pair.first for pair in pairs])
    after = _rows(run, series, series.last, last, [pair.last for pair in pairs]) if last is not None else {}
    for kind, shown in chosen.items():
        policies = ([before[pair.first], *([] if pair.last is None else [after[pair.last]])] for pair in shown)
        yield kind, RULES[kind], [_card(pair, rows) for pair, rows in zip(shown, policies, strict=True)]


def _rows(run: Run, series: Series, iteration: int, table: pa.Table, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Return rows of an evaluation's table with their pictures."""
    facts = dict(zip(rows, table.take(rows).to_pylist(), strict=True))
    pictures = series.pictures(run, iteration, [row["episode_id"] for row in facts.values()])
    return {index: row | pictures[row["episode_id"]] for index, row in facts.items()}


def _card(pair: Pair, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = f"{pair.prompt[0]}/{pair.prompt[1]}"
    height, width = images.decode(rows[0]["original"]["bytes"], where).shape[:2]
    thought = reasoning.pieces(rows[-1]["completion_text"], width, height)
    return {
        "size": (width, height),
        "reasoning": thought,
        "boxes": reasoning.boxes(thought),
        "instruction": rows[0]["instruction"],
        "task": pair.task,
        "example": where,
        "original": data_uri(rows[0]["original"], where),
        "target": data_uri(rows[0]["target"], where),
        "policies": [row | {"picture": data_uri(row["edited"], where)} for row in rows],
    }


def data_uri(picture: dict[str, Any] | None, where: str) -> str | None:
    """Return an image column's value as a data URI: PNG as stored when small, else WebP of at most 256 a side."""
    if picture is None or picture["bytes"] is None:
        return None
    pixels = images.decode(picture["bytes"], where)
    small = max(pixels.shape[:2]) <= LARGEST_LOSSLESS
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image.save(buffer, format="WEBP", quality=88)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
