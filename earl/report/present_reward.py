"""The reward of evaluations by the run's present `reward_final_reward`, whatever it was when they were made.

A run may continue with another reward (`accept_changes`), and keeps its evaluations. Their tables hold the sub-scores,
from which the present reward is derived, so that one curve and one paired change are of one measure.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from earl.files import tables
from earl.files.evaluations import EVALUATION, prompt_of
from earl.messages.errors import EarlError
from earl.statistics import intervals
from earl.statistics.rewards import SUB_SCORES, episode_reward

RECORDED = "reward_final_reward"
"""What a summary calls the reward that its evaluation was made with."""
NEEDED = ("finish_reason", "status", *SUB_SCORES, "ground_score")
"""Columns of an evaluation's table that a reward is derived from."""


def of_summary(summary: dict[str, Any], table: Path, which: str) -> tuple[dict[str, Any], str | None]:
    """Return a summary with ``reward`` and ``best_of`` by the reward ``which``, and why they are unknown (or None).

    Args:
        summary: as the evaluate stage writes it; one of the same reward is returned as it is.
        table: the evaluation's table.
        which: the present ``reward_final_reward``.

    Raises:
        EarlError: the table is missing or damaged.
    """
    if summary.get(RECORDED) == which:
        return summary, None
    found = tables.read_table(table, EVALUATION, ["dataset", "example_id", "task", *NEEDED])
    rewards, problem = _derived(found, which)
    rows = list(zip(found.select(["dataset", "example_id", "task"]).to_pylist(), rewards, strict=True))

    def part(old: dict[str, Any], task: str | None) -> dict[str, Any]:
        pairs = [(prompt_of(row), reward) for row, reward in rows if task is None or (row["task"] or "") == task]
        return old | {"reward": intervals.spread(pairs), "best_of": intervals.best_of(pairs)}

    tasks = {task: part(old, task) for task, old in summary.get("tasks", {}).items()}
    return part(summary, None) | {RECORDED: which, "tasks": tasks}, problem


def read_table(path: Path, columns: list[str], which: str) -> pa.Table:
    """Read columns of an evaluation's table, ``reward`` by the reward ``which``: null throughout where it is unknown.

    Raises:
        EarlError: the table is missing or damaged.
    """
    found = tables.read_table(path, EVALUATION, list(dict.fromkeys([*columns, *NEEDED])))
    if "reward" in columns:
        values = pa.array(_derived(found, which)[0], pa.float32())
        found = found.set_column(found.column_names.index("reward"), "reward", values)
    return found.select(columns)


def _derived(table: pa.Table, which: str) -> tuple[list[float | None], str | None]:
    """Rewards by row. One sub-score that was not asked for leaves all unknown: the rest would be another selection."""
    try:
        return [episode_reward(row, which) for row in table.select(NEEDED).to_pylist()], None
    except EarlError as error:
        return [None] * table.num_rows, str(error)
