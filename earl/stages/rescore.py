"""Rescore: ask another judge, or by other rubrics, about stored rollouts, and measure how far it agrees with the first.

::

    <run>/rescored/<name>/config.json                        the run's configuration with the other judge
    <run>/rescored/<name>/iterations/000012/scores/0003.parquet
    <run>/rescored/<name>/evaluations/<evaluation>/000012.scores.parquet
    <run>/rescored/<name>/agreement.json                     written last

Nothing else in the run changes. Scores that are there, of the same rollouts by the same judge, are not asked for again.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl import judges
from earl.config import freeze
from earl.config.freeze import config_digest
from earl.config.load import changed, read
from earl.config.schema import is_free
from earl.files import atomic, manifest, tables
from earl.files.layout import Evaluation, Run
from earl.messages.errors import EarlError
from earl.run import claims, replays, state
from earl.stages import score
from earl.statistics import agreement
from earl.statistics.rewards import SUB_SCORES, viescore

if TYPE_CHECKING:
    from earl.config.schema import Config

MEASURES = ("viescore", *SUB_SCORES, "ground_score")
JUDGE = ("judge", "reward_")
"""What the names of fields that a judge depends on begin with."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """One file of rollouts with its two files of scores."""

    part: str
    """``iterations``, or the name of an evaluation."""
    iteration: int
    rollouts: Path
    before: Path
    after: Path


def run(
    run_path: Path,
    name: str,
    overrides: Mapping[str, Any],
    iterations: Sequence[int] = (),
    evaluations: Sequence[str] = (),
) -> dict[str, Any]:
    """Score stored rollouts of a run again and return the agreement of the two judges, as `agreement.json` has it.

    Args:
        name: Folder of the results below ``<run>/rescored``.
        overrides: Values of fields of the judge by dotted name.
        iterations: Only of these iterations; none: of all.
        evaluations: Only rollouts of these evaluations; none: those of training and of every evaluation.

    Raises:
        EarlError: a field is not the judge's; there is nothing to score; under this name another judge has scored.
    """
    files = Run(Path(run_path))
    folder = files.rescored(name).path
    config = _config(files, folder, overrides)
    found = list(stored(files, folder, iterations, evaluations))
    if not found:
        raise EarlError(f"{files.path}: has no scored rollouts of these iterations and evaluations; name others")
    claims.claim(config, "score")
    with state.exclusive(Run(folder)):
        freeze.write(config, folder / "config.json")
        judge = judges.get(config)
        for each in found:
            if not _is_done(each, config, judge):
                log.info("rescore: %s", each.rollouts)
                score.run(config, each.rollouts, each.after, judge)
        report = {"run": config.run_name, "name": name, **_report(found)}
        atomic.write_text(folder / "agreement.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _config(files: Run, folder: Path, overrides: Mapping[str, Any]) -> "Config":
    config = changed(read(files.config), overrides)
    for name in overrides:
        field = name.split(".")[0]
        if not field.startswith(JUDGE) and not is_free(field):
            raise EarlError(f"--set {name}: is no field of a judge, and rescoring changes nothing else")
    path = folder / "config.json"
    differing = [change[0] for change in freeze.changes(read(path), config)] if path.is_file() else []
    if differing:
        raise EarlError(
            f"{path}: under this name another judge has scored: {', '.join(differing)} differ; take another --name"
        )
    return config


def stored(files: Run, folder: Path, iterations: Sequence[int], evaluations: Sequence[str]) -> Iterator[Scored]:
    """Yield what has been scored, in the order of iterations and names of evaluations."""
    wanted = set(iterations)
    indices = [index for index in state.iterations(files) if index and (not wanted or index in wanted)]
    for index in [] if evaluations else indices:
        stored = replays.iteration_of(files, index)
        for before in sorted(stored.scores(0).parent.glob("*.parquet")):
            shard = int(before.stem)
            after = Run(folder).iteration(index).scores(shard)
            yield Scored("iterations", index, stored.rollouts(shard), before, after)
    for place in sorted((files.path / "evaluations").glob("*/")):
        if evaluations and place.name not in evaluations:
            continue
        for before in sorted(place.glob("*.scores.parquet")):
            index = int(before.name.split(".")[0])
            if not wanted or index in wanted:
                after = Evaluation(folder / "evaluations" / place.name, index).scores
                yield Scored(place.name, index, Evaluation(place, index).rollouts, before, after)


def _is_done(each: Scored, config: "Config", judge: judges.Judge) -> bool:
    if not each.after.is_file():
        return False
    told = tables.read_metadata(each.after)
    expected = {"rollouts_digest": manifest.digest_file(each.rollouts), "config_digest": config_digest(config)}
    expected["rubrics_digest"] = judge.rubrics_digest
    return all(told.get(key) == value for key, value in expected.items())


def _report(found: Sequence[Scored]) -> dict[str, Any]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        parts.setdefault(each.part, []).extend(_rows(each))
    return {"parts": {part: _part(rows) for part, rows in parts.items()}}


def _rows(each: Scored) -> list[dict[str, Any]]:
    """Return one row an episode; both judges must have scored the same ones.

    Raises:
        EarlError: they have not.
    """
    columns = ("episode_id", "group_id", "status", *SUB_SCORES, "ground_score")
    before, after = (
        {row["episode_id"]: _with_viescore(row) for row in tables.read_table(path, tables.SCORES, columns).to_pylist()}
        for path in (each.before, each.after)
    )
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        raise EarlError(f"{each.before}: episode {odd} is not the one that {each.rollouts} holds; score again")
    # An episode's id is unique in an iteration, its group's too.
    return [
        {"group": (each.iteration, row["group_id"]), "iteration": each.iteration, "before": row, "after": after[name]}
        for name, row in before.items()
    ]


def _with_viescore(row: dict[str, Any]) -> dict[str, Any]:
    known = all(row[name] is not None for name in SUB_SCORES)
    return row | {"viescore": viescore(row) if known else None}


def _part(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Agreement over all iterations, and each judge's means by iteration, whose distance grows where one is hacked."""
    by_iteration: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_iteration.setdefault(row["iteration"], []).append(row)
    return {
        **agreement.measure(rows, MEASURES),
        "by_iteration": {str(i): _means(by_iteration[i]) for i in sorted(by_iteration)},
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = agreement.measure(rows, MEASURES)["measures"]
    return {
        name: {key: values[key] for key in ("mean_before", "mean_after", "mean_difference")}
        for name, values in found.items()
    }


def text(report: Mapping[str, Any]) -> str:
    """Return a report for a terminal."""
    lines = []
    for part, found in report["parts"].items():
        lines += [
            f"{part}: {found['judged_by_both']} of {found['episodes']} episodes judged by both; failed: "
            f"{found['failed_before']} before alone, {found['failed_after']} now alone, {found['failed_both']} both",
            f"  {'':<13}{'n':>6}{'before':>9}{'now':>8}{'change':>8}{'Pearson':>9}{'Spearman':>10}{'Kendall':>9}"
            f"{'ordered alike':>15}{'pairs':>8}",
        ]
        for name, values in found["measures"].items():
            ordered = values["pairs"]["alike"] + values["pairs"]["opposite"]
            lines.append(
                f"  {name:<13}{values['n']:>6}{values['mean_before']:>9.2f}{values['mean_after']:>8.2f}"
                f"{values['mean_difference']:>+8.2f}{_number(values['pearson']):>9}{_number(values['spearman']):>10}"
                f"{_number(values['kendall']):>9}{_number(values['ordered_alike']):>15}{ordered:>8}"
            )
        if len(found["by_iteration"]) > 1 and "viescore" in found["measures"]:
            lines += ["  viescore by iteration, before and now"]
            lines += [
                f"    {index:>6}{means['viescore']['mean_before']:>9.2f}{means['viescore']['mean_after']:>8.2f}"
                for index, means in found["by_iteration"].items()
                if "viescore" in means
            ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
