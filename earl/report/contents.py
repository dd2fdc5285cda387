"""What a report is made from: read from the run folder, nothing computed but pairings and the present reward."""

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from earl.config import freeze, load, paths
from earl.files import manifest, objects, tables
from earl.files.evaluations import EVALUATION, prompt_of
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import present_reward
from earl.run import replays
from earl.statistics import intervals

PICTURES = ["original", "target", "edited"]
SUMMARY_NAME = re.compile(r"\d{6}\.json")


@dataclass(frozen=True)
class Series:
    """One evaluation of the configuration over the run: its summaries, sorted by iteration.

    Attributes:
        reward: the run's present ``reward_final_reward``, which all rewards are by.
        derived: iterations that were evaluated with another reward, and what that was.
        unknown: those of them whose reward cannot be derived, and why.
    """

    name: str
    folder: Path
    summaries: list[dict[str, Any]]
    reward: str
    derived: dict[int, str]
    unknown: dict[int, str]

    @property
    def first(self) -> int:
        """The first iteration that has a reward, or the first if none has."""
        return self._rewarded[0]

    @property
    def last(self) -> int:
        """The last iteration that has a reward, or the last if none has."""
        return self._rewarded[-1]

    @property
    def _rewarded(self) -> list[int]:
        indices = [summary["iteration"] for summary in self.summaries]
        return [index for index in indices if index not in self.unknown] or indices

    @property
    def temperature(self) -> float:
        return self.summaries[-1]["temperature"]

    def table(self, run: Run, iteration: int, columns: list[str]) -> pa.Table:
        path = run.evaluation(self.name, iteration).table
        if iteration in self.derived:
            return present_reward.read_table(path, columns, self.reward)
        return tables.read_table(path, EVALUATION, columns)

    def notes(self) -> list[str]:
        """Say of which iterations the reward is not the one that they were evaluated with, or is left out."""
        notes = []
        shown = {index: before for index, before in self.derived.items() if index not in self.unknown}
        for before, indices in _by_value(shown).items():
            notes.append(
                f"{self.name}, {iterations_in_words(indices)}: evaluated with the reward {before}; shown here by the "
                f"present one, {self.reward}, derived from the stored scores."
            )
        for why, indices in _by_value(self.unknown).items():
            notes.append(f"{self.name}, {iterations_in_words(indices)}: left out where rewards are shown: {why}.")
        return notes

    def pictures(self, run: Run, iteration: int, episodes: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return image columns of episodes by `episode_id`, from the rollouts that the evaluation is of.

        Raises:
            EarlError: the rollouts are missing or damaged, or have changed since the evaluation.
        """
        rollouts = run.evaluation(self.name, iteration).rollouts
        summary = next(one for one in self.summaries if one["iteration"] == iteration)
        if summary.get("rollouts_digest") not in (None, manifest.digest_file(rollouts)):
            raise EarlError(f"{rollouts}: has changed since it was evaluated; run the evaluate stage again")
        found = tables.read_rows(rollouts, tables.ROLLOUTS, PICTURES, "episode_id", episodes)
        if missing := set(episodes) - found.keys():
            raise EarlError(f"{rollouts}: has no episode {min(missing)!r}; run the evaluate stage again")
        return found


@dataclass(frozen=True)
class Contents:
    """The files of a run, parsed."""

    run: Run
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    # Coldest first: the first one is the headline.
    evaluations: list[Series]
    # Seconds of every job, by stage.
    seconds: dict[str, list[float]]
    verification: dict[str, Any] | None
    # Iterations that another configuration trained, whose changes have been accepted.
    trained_otherwise: list[int]
    # Evaluations of data that are trained on, with these.
    trained_on: dict[str, list[str]]


def read(path: Path) -> Contents:
    """Read the run folder ``path``.

    Raises:
        EarlError: when it holds no configuration, or a file in it is damaged.
    """
    run = Run(path)
    if not run.config.is_file():
        raise EarlError(f"{run.config}: is missing, so {path} is not a run folder; give <base_exp_dir>/<run_name>")
    config = load.read(run.config)
    digest = freeze.config_digest(config)
    metrics = [replays.own(objects.read(file)) for file in sorted(path.glob("iterations/*/train/metrics.json"))]
    return Contents(
        run=run,
        config=objects.read(run.config),
        metrics=metrics,
        evaluations=_evaluations(run, config.reward_final_reward),
        seconds=_seconds(_shared_timings(run) + _timings(path / "benchmarks")),
        verification=objects.read(run.verification) if run.verification.is_file() else None,
        trained_otherwise=[row["iteration"] for row in metrics if row.get("config_digest", digest) != digest],
        trained_on=paths.trained_on(config),
    )


def _evaluations(run: Run, reward: str) -> list[Series]:
    found = []
    for place in sorted((run.path / "evaluations").glob("*/")):
        files = sorted(file for file in place.iterdir() if SUMMARY_NAME.fullmatch(file.name))
        if files:
            found.append(_series(run, place, files, reward))
    return sorted(found, key=lambda series: (series.temperature, series.name))


def _series(run: Run, place: Path, files: list[Path], reward: str) -> Series:
    series = Series(place.name, place, [], reward, {}, {})
    for file in files:
        summary = _summary(file)
        index, before = summary["iteration"], summary.get(present_reward.RECORDED)
        if before != reward:
            series.derived[index] = before or "of a configuration that its summary does not name"
            table = run.evaluation(place.name, index).table
            summary, problem = present_reward.of_summary(summary, table, reward)
            series.unknown.update({} if problem is None else {index: problem})
        series.summaries.append(summary)
    return series


def _by_value(values: dict[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, value in values.items():
        found.setdefault(value, []).append(index)
    return found


def iterations_in_words(indices: list[int]) -> str:
    """Return the iterations as text, the first five of many by number."""
    more = f" and {len(indices) - 5} more" if indices[5:] else ""
    return f"iteration{'s' if indices[1:] else ''} {', '.join(map(str, indices[:5]))}{more}"


def _summary(path: Path) -> dict[str, Any]:
    summary = objects.read(path)
    for field in ("iteration", "temperature", "reward"):
        if field not in summary:
            raise EarlError(f"{path}: field {field!r} is missing; run the evaluate stage again")
    return summary


def _timings(folder: Path) -> list[tuple[str, Path]]:
    """(stage, file) of ``<stage>/*.tsv``."""
    return [(file.parent.name, file) for file in sorted(folder.glob("*/*.tsv"))]


def _shared_timings(run: Run) -> list[tuple[str, Path]]:
    """Those of the shared stages that this run's configuration needs, whichever run had them made."""
    folder = run.path.parent / "shared" / "benchmarks"
    stages = paths.shared_stages(load.read(run.config)).values()
    outputs = [(each.stage, each.output.parent.name, each.output.name.removesuffix(".parquet")) for each in stages]
    files = [(stage, folder / kind / f"{name}.tsv") for stage, kind, name in outputs]
    return [(stage, file) for stage, file in files if file.is_file()]


def _seconds(files: list[tuple[str, Path]]) -> dict[str, list[float]]:
    """Column ``s`` of Snakemake's benchmark files, by stage."""
    found: dict[str, list[float]] = {}
    for stage, file in files:
        try:
            with file.open(encoding="utf-8", newline="") as stream:
                rows = [float(row["s"]) for row in csv.DictReader(stream, delimiter="\t")]
        except (KeyError, TypeError, ValueError) as error:
            raise EarlError(f"{file}: column 's' is not a time in seconds ({error!r}); delete the file") from error
        found.setdefault(stage, []).extend(rows)
    return found


@dataclass(frozen=True)
class Comparison:
    """A measure under the first and the last evaluated policy, over the prompts that both have values for."""

    before: float
    after: float | None
    change: intervals.Interval | None
    prompts: int


def compare(first: pa.Table, last: pa.Table | None, measure: str, task: str | None = None) -> Comparison | None:
    """Compare one measure, of one task or (None) of all; None where the first table knows no value of it."""
    before = _by_prompt(first, measure, task)
    if not before:
        return None
    if last is None:
        return Comparison(sum(before.values()) / len(before), None, None, len(before))
    after = _by_prompt(last, measure, task)
    shared = [prompt for prompt in before if prompt in after]
    if not shared:
        return None
    return Comparison(
        before=sum(before[prompt] for prompt in shared) / len(shared),
        after=sum(after[prompt] for prompt in shared) / len(shared),
        change=intervals.paired_bootstrap(before, after),
        prompts=len(shared),
    )


def _by_prompt(table: pa.Table, measure: str, task: str | None) -> dict[Any, float]:
    rows = table.select(["dataset", "example_id", "task", measure]).to_pylist()
    chosen = (row for row in rows if task is None or (row["task"] or "") == task)
    return intervals.mean_by_prompt((prompt_of(row), row[measure]) for row in chosen)
