"""Select: of each group of a run's rollouts the best completion and the worst, as a tokenised data set.

What is learned from it, the best ones or the preference between the two, is said by the fine-tuning.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.config.paths import selection
from earl.data.example import CODEBOOK_SIZE, TOKENIZER_DIGEST
from earl.data.grids import stored
from earl.data.shards import CARD, DATA, ROWS_OF_TOKENS, SUMMARY
from earl.emu3 import sequence
from earl.emu3.vocabulary import Vocabulary
from earl.files import atomic, manifest, objects, tables
from earl.files.layout import Run
from earl.learner import episodes
from earl.messages.errors import EarlError
from earl.run import replays, selections, state

if TYPE_CHECKING:
    from earl.config.schema import Config

COLUMNS = (
    *("episode_id", "group_id", "dataset", "example_id", "task", "instruction"),
    *("prompt_token_ids", "completion_token_ids", "finish_reason", "completion_text"),
)
_REMEDY = "select from other iterations, or lower minimum_reward"
Row = dict[str, Any]
"""`COLUMNS` of a rollout, its scores and its `reward`."""

log = logging.getLogger(__name__)


def run(config: "Config", name: str, out: Path) -> None:
    """Write the selection `name` as a sealed folder, schema `earl.files.tables.PREFERRED`.

    A file holds the groups of one iteration, and in its metadata the digests of the rollouts and scores they are from.
    ``summary.json`` counts the groups that were left out, by reason.

    Raises:
        EarlError: there is no such selection; the run has not these iterations; rollouts or scores are missing,
            damaged, or lack what the reward is made of; no group is left.
    """
    wanted = selection(config, name)
    files = Run(Path(wanted.run))
    indices = selections.iterations(wanted, state.newest_complete(files))
    if not indices:
        raise EarlError(f"field selections.{name}.run: {files.path} has no iteration {wanted.first_iteration} yet")
    vocabulary = Vocabulary.from_folder(files.iteration(0).policy)
    counts: Counter[str] = Counter()
    with atomic.folder(out) as folder:
        for index in indices:
            where = str(files.iteration(index).path)
            source = _read(files, index)
            rows = []
            for group in _groups(source, config.reward_final_reward, where):
                found = preferred(group, wanted.minimum_reward)
                counts[found if isinstance(found, str) else "kept"] += 1
                if not isinstance(found, str):
                    rows.append(_row(*found, vocabulary, where))
            if rows:
                metadata = _metadata(name, index, config.reward_final_reward, source, vocabulary)
                _write(folder / DATA / f"{index:06d}.parquet", rows, metadata, vocabulary)
        kept, groups = counts.pop("kept", 0), counts.total()
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        if not kept:
            raise EarlError(f"field selections.{name}: no group of {files.path} is left; {left_out}; {_REMEDY}")
        summary = {"groups": kept + groups, "kept": kept, "left_out": dict(counts)}
        objects.write(folder / SUMMARY, summary)
        atomic.write_text(folder / "README.md", CARD)
        manifest.seal(folder)
    log.info("select %s: %d groups of %s%s", name, kept, files.path, left_out and f"; left out: {left_out}")


def preferred(group: Sequence[Row], minimum_reward: float | None = None) -> tuple[Row, Row] | str:
    """Return the best and the worst completion of a group, or why it has none to learn from.

    The best one is better than the group's mean just where it is better than the worst. Of equal rewards the first
    sample's is taken.

    Args:
        group: episodes with a `reward`, that of a finished image or None.
        minimum_reward: that the best one must have, 0..10; None: any.
    """
    counted = sorted((row for row in group if row["reward"] is not None), key=itemgetter("episode_id"))
    if len(counted) < 2:
        return "with fewer than two judged edits"
    best, worst = max(counted, key=itemgetter("reward")), min(counted, key=itemgetter("reward"))
    if best["reward"] == worst["reward"]:
        return "whose rewards are all equal"
    if minimum_reward is not None and best["reward"] < minimum_reward:
        return "below minimum_reward"
    return best, worst


def _read(files: Run, index: int) -> episodes.Source:
    metrics = state.read_metrics(files, index)
    inputs, stored_in = metrics["inputs"], replays.iteration_of(files, index)
    sampled_by = inputs.get("sampled_by", inputs["policy"])
    there = range(metrics["episodes"], metrics["episodes"] + 1)
    return episodes.read(stored_in, len(inputs["rollouts"]), sampled_by, there, COLUMNS)


def _groups(source: episodes.Source, which: str, where: str) -> Iterator[list[Row]]:
    """Yield the episodes of each group with their rewards; of one without a finished image there is none."""
    for row in source.rows:
        finished = row["finish_reason"] == "stop" and row["status"] != "no_image"
        row["reward"] = episodes.reward_of(row, which, where) if finished else None
    for _, group in groupby(sorted(source.rows, key=itemgetter("group_id")), itemgetter("group_id")):
        yield list(group)


def _row(best: Row, worst: Row, vocabulary: Vocabulary, where: str) -> Row:
    """Return a row of `tables.PREFERRED`."""
    prompt = best["prompt_token_ids"]
    original = sequence.parse_completion(prompt, vocabulary)
    asked = [] if original is None else sequence.prompt_ids(original, best["instruction"], "", vocabulary)
    if not asked or prompt[: len(asked)] != asked:
        raise EarlError(
            f"{where}/rollouts: episode {best['episode_id']}: column 'prompt_token_ids' is not its image and "
            "instruction as the tokenizer of the run's starting policy writes them; put that policy back"
        )
    chosen, rejected = (prompt[len(asked) :] + row["completion_token_ids"] for row in (best, worst))
    edit = sequence.parse_completion(chosen, vocabulary)
    if edit is None:
        raise EarlError(f"{where}/rollouts: episode {best['episode_id']}: was judged, but holds no image; score again")
    thought = sequence.reasoning_of(best["completion_text"])
    return {
        **{name: best[name] for name in ("dataset", "example_id", "task", "instruction", "episode_id", "reward")},
        "reasoning": [{"key": "reasoning", "value": thought}] if thought else None,
        "original_tokens": stored(original, vocabulary.num_visual),
        "target_tokens": stored(edit, vocabulary.num_visual),
        "original": None,
        "target": None,
        "chosen_token_ids": chosen,
        "rejected_token_ids": rejected,
        "rejected_episode_id": worst["episode_id"],
        "rejected_reward": worst["reward"],
    }


def _metadata(name: str, index: int, which: str, source: episodes.Source, vocabulary: Vocabulary) -> dict[str, str]:
    return {
        "dataset": name,
        "iteration": str(index),
        "reward": which,
        "rollouts_digests": json.dumps(source.rollouts),
        "scores_digests": json.dumps(source.scores),
        CODEBOOK_SIZE: str(vocabulary.num_visual),
        TOKENIZER_DIGEST: vocabulary.digest,
    }


def _write(path: Path, rows: Sequence[Row], metadata: dict[str, str], vocabulary: Vocabulary) -> None:
    columns = {name: [row[name] for row in rows] for name in tables.PREFERRED.names}
    path.parent.mkdir(exist_ok=True)
    tables.write_table(path, tables.PREFERRED, columns, metadata, vocabulary.size - 1, ROWS_OF_TOKENS)
