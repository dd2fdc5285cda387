"""Score: ask the judge about rollouts. Writes what it said, no reward."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from earl import code_version, judges
from earl.config.freeze import config_digest
from earl.errors import EarlError
from earl.files import images, manifest, tables

if TYPE_CHECKING:
    import pyarrow as pa

    from earl.config.schema import Config

_READ = ("episode_id", "group_id", "task", "instruction", "finish_reason", "original", "target", "edited")


def run(config: "Config", rollouts: Path, out: Path) -> None:
    """Write the scores of one file of rollouts, in its order.

    An episode that did not finish or holds no image is not shown to the judge: its status is ``no_image``.

    Args:
        config: The run's resolved configuration.
        rollouts: Schema `earl.files.tables.ROLLOUTS`.
        out: The Parquet file to write, schema `earl.files.tables.SCORES`, or `MODEL_SCORES` where the judge asks a
            model.
    """
    table = tables.read_table(rollouts, tables.ROLLOUTS, _READ)
    judge = judges.get(config)
    rows = table.to_pylist()
    asked = [i for i, row in enumerate(rows) if row["finish_reason"] == "stop" and row["edited"] is not None]
    verdicts = judge.score([_judgement(rows[index], rollouts, index) for index in asked])
    if len(verdicts) != len(asked):
        raise EarlError(f"judge {judge.name!r} answered {len(verdicts)} of {len(asked)} questions about {rollouts}")
    answers: list[judges.Verdict | None] = [None] * len(rows)
    for index, verdict in zip(asked, verdicts, strict=True):
        answers[index] = verdict
    columns = _columns(table, answers, judge.name)
    schema = tables.SCORES
    if judge.model is not None:
        schema = tables.MODEL_SCORES
        columns |= _model_columns(answers, judge)
    tables.write_table(out, schema, columns, _metadata(config, rollouts, judge))


def _judgement(row: dict, rollouts: Path, index: int) -> judges.Judgement:
    def pixels(column: str) -> object:
        return images.decode(row[column]["bytes"], f"{rollouts}: column {column!r}, row {index}")

    return judges.Judgement(
        instruction=row["instruction"],
        original=pixels("original"),
        edited=pixels("edited"),
        target=None if row["target"] is None else pixels("target"),
        task=row["task"],
    )


def _columns(table: "pa.Table", answers: list[judges.Verdict | None], judge: str) -> dict[str, object]:
    columns = {
        "episode_id": table.column("episode_id"),
        "group_id": table.column("group_id"),
        "status": ["no_image" if answer is None else answer.status for answer in answers],
        "raw": [None if answer is None else answer.raw for answer in answers],
        "judge": [judge] * len(answers),
    }
    for name in tables.SUB_SCORES:
        columns[name] = [None if answer is None else getattr(answer, name) for answer in answers]
    return columns


def _model_columns(answers: list[judges.Verdict | None], judge: judges.Judge) -> dict[str, object]:
    requests = [[] if answer is None else list(answer.requests) for answer in answers]
    columns: dict[str, object] = {
        "failure": [None if answer is None else answer.failure for answer in answers],
        "judge_model": [judge.model] * len(answers),
        "judge_revision": [judge.revision] * len(answers),
        "requests": requests,
    }
    for name in tables.SUB_SCORES:
        columns[f"{name}_variance"] = [None if answer is None else answer.variance.get(name) for answer in answers]
    for name in ("tokens_in", "tokens_out", "seconds"):
        columns[name] = [_sum(request[name] for request in row) for row in requests]
    return columns


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of what is known, None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _metadata(config: "Config", rollouts: Path, judge: judges.Judge) -> dict[str, str]:
    """Carry over where the rollouts come from, and bind the scores to their very bytes and to what was asked."""
    found = tables.read_metadata(rollouts)
    kept = ("run", "iteration", "shard", "evaluation", "policy_digest")
    return {
        **{key: found[key] for key in kept if key in found},
        **({"rubrics_digest": judge.rubrics_digest} if judge.rubrics_digest is not None else {}),
        "rollouts_digest": manifest.digest_file(rollouts),
        "config_digest": config_digest(config),
        "code_version": code_version(),
    }
