"""Score: ask the judge about rollouts. Writes what it said, no reward."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from earl import code_version, judges
from earl.config.freeze import config_digest
from earl.files import images, manifest, tables
from earl.judges.model_judge import ModelJudge
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import numpy as np

    from earl.config.schema import Config

_READ = ("episode_id", "group_id", "task", "instruction", "finish_reason", "original", "target", "edited")


def run(config: "Config", rollouts: Path, out: Path, judge: judges.Judge | None = None) -> None:
    """Write the scores of one file of rollouts, in its order.

    An episode that did not finish or holds no image is not shown to the judge: its status is ``no_image``. Where there
    is nothing to show, the judge is not asked, and no model loaded.

    Args:
        config: The run's resolved configuration.
        rollouts: Schema `earl.files.tables.ROLLOUTS`.
        out: The Parquet file to write, schema `earl.files.tables.SCORES`, or `MODEL_SCORES` where the judge asks a
            model.
        judge: The configured judge, where it is at hand already.
    """
    table = tables.read_table(rollouts, tables.ROLLOUTS, _READ)
    judge = judge or judges.get(config)
    rows = table.to_pylist()
    asked = [i for i, row in enumerate(rows) if row["finish_reason"] == "stop" and row["edited"] is not None]
    decode = images.Decoder()
    verdicts = judge.score([_judgement(rows[index], rollouts, index, decode) for index in asked]) if asked else []
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


def run_again(config: "Config", rollouts: Path, out: Path, judge: judges.Judge | None = None) -> tuple[int, int]:
    """Ask the failed judgements of a file of scores again, and write it with their answers; all other rows stay.

    What was answered for them is kept, the tries go on after the last one, and their seeds follow from its number. So
    the file is a function of configuration, rollouts and the file as it was, whose digest it records (`asked_again`).

    Args:
        config: The run's resolved configuration.
        rollouts: What the scores are of.
        out: The scores; a file in which no judgement failed is left alone.
        judge: The configured judge, where it is at hand already.

    Returns:
        How many judgements had failed, and how many still have.

    Raises:
        EarlError: the scores are of other rollouts, or by another judge or configuration; the judge asks no model.
    """
    judge = judge or judges.get(config)
    if not isinstance(judge, ModelJudge):
        raise EarlError(f"{out}: the judge {judge.name!r} asks no model, so asking again gives the same")
    metadata = _metadata(config, rollouts, judge)
    scores = tables.read_table(out, tables.MODEL_SCORES)
    _check_same(out, scores, metadata, judge)
    failed = [index for index, status in enumerate(scores["status"].to_pylist()) if status == "failed"]
    if not failed:
        return 0, 0
    rows = tables.read_table(rollouts, tables.ROLLOUTS, _READ).take(failed)
    decode = images.Decoder()
    asked = [_judgement(row, rollouts, index, decode) for index, row in zip(failed, rows.to_pylist(), strict=True)]
    verdicts = judge.score(asked, [scores["requests"][index].as_py() for index in failed])
    columns = {name: scores[name].to_pylist() for name in tables.MODEL_SCORES.names}
    for name, values in (_columns(rows, verdicts, judge.name) | _model_columns(verdicts, judge)).items():
        for index, value in zip(failed, values, strict=True):
            columns[name][index] = value.as_py() if isinstance(value, pa.Scalar) else value
    metadata["asked_again"] = manifest.digest_file(out)
    tables.write_table(out, tables.MODEL_SCORES, columns, metadata)
    return len(failed), sum(verdict.status == "failed" for verdict in verdicts)


def _check_same(out: Path, scores: pa.Table, metadata: dict[str, str], judge: judges.Judge) -> None:
    """Refuse to mix what is asked now with scores of other rollouts, or by another judge or configuration."""
    told = tables.read_metadata(out)
    keys = ("rollouts_digest", "rubrics_digest", "config_digest")
    found = [(key, told.get(key), metadata[key]) for key in keys]
    for key, now in (("judge_model", judge.model), ("judge_revision", judge.revision)):
        found += [(key, then, now) for then in scores[key].unique().to_pylist()]
    for key, then, now in found:
        if then != now:
            raise EarlError(f"{out}: its {key} is {then}, now it is {now}; remove the file and run the score stage")


def _judgement(row: dict, rollouts: Path, index: int, decode: images.Decoder) -> judges.Judgement:
    def pixels(column: str) -> "np.ndarray":
        return decode(row[column]["bytes"], f"{rollouts}: column {column!r}, row {index}")

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
    for name in tables.SCORE_COLUMNS:
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
    for name in tables.SCORE_COLUMNS:
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
