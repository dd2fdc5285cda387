"""Evaluate: join the rollouts and scores of one evaluation, add rewards, and sum them up.

Writes ``000012.parquet``, the columns of both tables and ``reward``, ``viescore`` and its two parts, and, last,
``000012.json``. Images stay in the rollouts beside it. No policy and no judge is asked: rerunning it after a change of
``reward_final_reward`` costs nothing.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from earl import code_version
from earl.config import freeze
from earl.files import atomic, manifest, tables
from earl.files.evaluations import EVALUATION, WITHOUT_IMAGES, prompt_of
from earl.messages.errors import EarlError
from earl.statistics import intervals
from earl.statistics.rewards import COMPONENTS, SUB_SCORES, component, episode_reward

if TYPE_CHECKING:
    from earl.config.schema import Config

# What the summary averages. Rewards, VIEScore: every episode whose judgement did not fail. Others: every image judged.
MEASURES = ("reward", "viescore", "semantic_consistency", "perceptual_quality", *SUB_SCORES, "ground_score")


def run(config: "Config", name: str, iteration: int, rollouts: Path, scores: Path, out: Path) -> None:
    """Write the evaluation's table to ``out`` and its summary beside it (suffix ``.json``).

    Raises:
        EarlError: when rollouts and scores do not belong together or hold no episode, the rollouts were sampled with
            other settings, or a score that the reward needs is missing.
    """
    episodes = joined(rollouts, scores, WITHOUT_IMAGES)
    if not episodes.num_rows:
        raise EarlError(f"{rollouts}: holds no episode; run the generate stage again")
    columns = _with_rewards(episodes, config.reward_final_reward, scores)
    metadata = tables.read_metadata(rollouts)
    _check_sampling(config, name, rollouts, metadata)
    origin = {key: value for key, value in metadata.items() if key not in ("huggingface", "earl_table")}
    origin |= {"evaluation": name, "scores_digest": manifest.digest_file(scores), "code_version": code_version()}
    tables.write_table(out, EVALUATION, columns, origin, _largest_token(episodes))
    summary = {
        "evaluation": name,
        "iteration": iteration,
        **freeze.recorded(config, name),
        "judge": _judge(scores),
        "reward_final_reward": config.reward_final_reward,
        "policy_digest": metadata.get("policy_digest"),
        "rollouts_digest": manifest.digest_file(rollouts),
        "scores_digest": origin["scores_digest"],
        "table_digest": manifest.digest_file(out),
        **summarise(_rows(columns)),
    }
    atomic.write_text(out.with_suffix(".json"), json.dumps(summary, indent=1, allow_nan=False) + "\n")


def joined(rollouts: Path, scores: Path, columns: Sequence[str]) -> pa.Table:
    """Return rollouts with their scores appended, in the order of the rollouts.

    Args:
        rollouts: Schema `earl.files.tables.ROLLOUTS`.
        scores: Schema `earl.files.tables.SCORES`, all of which is read.
        columns: Of the rollouts, ``episode_id`` among them.

    Raises:
        EarlError: when the scores were made from other rollouts, or episodes are missing or double.
    """
    left, right = tables.read_table(rollouts, tables.ROLLOUTS, columns), tables.read_table(scores, tables.SCORES)
    remedy = f"run the score stage again on {rollouts}"
    expected = tables.read_metadata(scores).get("rollouts_digest")
    if expected is not None and expected != manifest.digest_file(rollouts):
        raise EarlError(f"{scores}: rollouts_digest is not that of {rollouts}, which has changed since; {remedy}")
    ids = left["episode_id"].to_pylist()
    place = {episode: row for row, episode in enumerate(right["episode_id"].to_pylist())}
    if len(set(ids)) != len(ids) or len(place) != right.num_rows:
        raise EarlError(f"{rollouts}, {scores}: column 'episode_id' repeats a value; run both stages again")
    if place.keys() != set(ids):
        odd = sorted(place.keys() ^ set(ids))[0]
        raise EarlError(f"{scores}: column 'episode_id' differs from that of {rollouts}, first in {odd!r}; {remedy}")
    right = right.take(pa.array([place[episode] for episode in ids], pa.int64()))
    for column in right.column_names:
        if column not in left.column_names:
            left = left.append_column(right.schema.field(column), right[column])
    return left


def _judge(scores: Path) -> str:
    """Return who scored: the judge's name, and its model where it asks one."""
    with tables.open_table(scores) as source:
        names = [name for name in ("judge", "judge_model") if name in source.schema_arrow.names]
        columns = source.read(columns=names).to_pydict().values()
    return ", ".join(sorted({" ".join(values) for values in zip(*columns, strict=True)}))


def _with_rewards(episodes: pa.Table, which: str, scores: Path) -> dict[str, Any]:
    judged = episodes.select(["finish_reason", "status", *SUB_SCORES, "ground_score"]).to_pylist()
    try:
        rewards = [episode_reward(row, which) for row in judged]
        viescores = [_viescore(row) for row in judged]
    except EarlError as error:
        raise EarlError(f"{scores}: {error}") from error
    return {name: episodes[name] for name in episodes.column_names} | {
        "reward": rewards,
        "viescore": viescores,
        "semantic_consistency": [_component(row, "semantic_consistency") for row in judged],
        "perceptual_quality": [_component(row, "perceptual_quality") for row in judged],
    }


def _component(row: dict[str, Any], name: str) -> float | None:
    return None if any(row[part] is None for part in COMPONENTS[name]) else component(row, name)


def _viescore(row: dict[str, Any]) -> float | None:
    # A judge may be asked for the ground score alone; then nothing stands in for the scores it did not give.
    if row["status"] == "ok" and any(row[name] is None for name in SUB_SCORES):
        return None
    return episode_reward(row, "viescore")


def _largest_token(episodes: pa.Table) -> int:
    return 2 ** episodes.schema.field("completion_token_ids").type.value_type.bit_width - 1


def _check_sampling(config: "Config", name: str, rollouts: Path, metadata: dict[str, str]) -> None:
    """Refuse rollouts that were sampled when the evaluation had other settings."""
    if name not in config.evaluations:
        known = ", ".join(config.evaluations) or "none"
        raise EarlError(f"evaluation {name!r} is not in the configuration's field evaluations (known: {known})")
    stated, wanted = metadata.get(tables.SAMPLING), json.dumps(freeze.sampling(config, name))
    if stated not in (None, wanted):
        raise EarlError(
            f"{rollouts}: was sampled with {stated}, but evaluations.{name} says {wanted}; remove it and generate it "
            "again, or give the changed evaluation a name of its own"
        )


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = ("dataset", "example_id", "task", "finish_reason", "status", *MEASURES)
    lists = [columns[name] if isinstance(columns[name], list) else columns[name].to_pylist() for name in wanted]
    lengths = columns["completion_token_ids"].combine_chunks().value_lengths().to_pylist()
    rows = [dict(zip(wanted, values, strict=True)) for values in zip(*lists, strict=True)]
    return [row | {"completion_tokens": length} for row, length in zip(rows, lengths, strict=True)]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts, means and standard deviations over all episodes, and the same by task.

    Args:
        rows: One mapping an episode: dataset, example_id, task, finish_reason, status, completion_tokens, `MEASURES`.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"] or "", []).append(row)
    return _part(rows) | {"tasks": {task: _part(by_task[task]) for task in sorted(by_task)}}


def _part(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lengths = [row["completion_tokens"] for row in rows]
    stops = Counter(row["finish_reason"] for row in rows)
    return {
        "n": len(rows),
        "prompts": len({prompt_of(row) for row in rows}),
        "failed": sum(row["status"] == "failed" for row in rows),
        "no_image": sum(row["status"] == "no_image" for row in rows),
        "finish_reason": {reason: stops[reason] / len(rows) for reason in sorted(stops)},
        "completion_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths)},
        **{measure: intervals.spread(_by_prompt(rows, measure)) for measure in MEASURES},
        "best_of": intervals.best_of(_by_prompt(rows, "reward")),
    }


def _by_prompt(rows: Sequence[dict[str, Any]], measure: str) -> list[tuple[tuple[str, str], float | None]]:
    return [(prompt_of(row), row[measure]) for row in rows]
