"""Evaluations of several runs side by side: means with intervals, changes from the first run on the same prompts.

Everything is read from the runs' ``evaluations/``; the published rows come from ``published.json`` and are figures of
others, for other models and by another judge. Where a run's starting policy was evaluated too, the change from it is
what training brought.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from earl.config import load
from earl.files import tables
from earl.files.evaluations import EVALUATION, prompt_of
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import present_reward
from earl.report.contents import SUMMARY_NAME
from earl.statistics import intervals
from earl.statistics.rewards import SUB_SCORES

MAIN = "viescore"
MEASURES = (MAIN, "semantic_consistency", "perceptual_quality", *SUB_SCORES, "ground_score")
SAMPLING = ("temperature", "top_p", "top_k", "samples_per_prompt")
COUNTS = ("n", "prompts", "failed", "no_image")
PUBLISHED = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class Entry:
    """One policy of a run: its evaluations by name, each a summary and where its table lies."""

    label: str
    run: Run
    iteration: int
    summaries: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """What is missing here, and why."""

    def rewards(self, name: str, task: str | None) -> dict[Any, float]:
        """Return the mean VIEScore of each prompt of an evaluation, of one task or (None) of all."""
        return self._rewards(name, self.summaries[name]["iteration"], task)

    def start(self, name: str) -> dict[str, Any] | None:
        """Return the mean VIEScore of the run's starting policy and the paired change from it; None if not known."""
        if self.iteration == 0 or not self.run.evaluation(name, 0).summary.is_file():
            return None
        before = self._rewards(name, 0, None)
        change = intervals.paired_bootstrap(before, self.rewards(name, None))
        return {"mean": fmean(before.values()), "change": vars(change)} if change else None

    def _rewards(self, name: str, iteration: int, task: str | None) -> dict[Any, float]:
        table = self.run.evaluation(name, iteration).table
        columns = ["dataset", "example_id", "instruction", "task", MAIN]
        rows = tables.read_table(table, EVALUATION, columns).to_pylist()
        chosen = (row for row in rows if task is None or (row["task"] or "") == task)
        # The instruction, too: another data set may have the same names and ids.
        return intervals.mean_by_prompt(((*prompt_of(row), row["instruction"]), row[MAIN]) for row in chosen)


def read(spec: str, wanted: Sequence[str] = ()) -> Entry:
    """Read the evaluations of one policy.

    Args:
        spec: A run's folder, for the newest policy that every evaluation has, or ``<folder>@<iteration>``.
        wanted: Names of evaluations; none: all that there are.

    Raises:
        EarlError: the run has no such evaluation, or its evaluations have no iteration in common.
    """
    path, at, number = spec.rpartition("@")
    folder = Path(path if at and number.isdigit() else spec)
    found = {place.name: _indices(place) for place in sorted((folder / "evaluations").glob("*/"))}
    found = {name: indices for name, indices in found.items() if indices and (not wanted or name in wanted)}
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        raise EarlError(f"{folder}/evaluations: has no summary of {', '.join(missing) or 'any evaluation'}")
    common = set.intersection(*(set(indices) for indices in found.values()))
    iteration = int(number) if folder != Path(spec) else max(common, default=None)
    if iteration not in common:
        raise EarlError(_no_policy(folder, iteration, found))
    run, label = Run(folder), folder.resolve().name + (f"@{number}" if folder != Path(spec) else "")
    entry = Entry(label, run, iteration, {})
    which = load.read(run.config).reward_final_reward if run.config.is_file() else None
    for name in found:
        evaluation = run.evaluation(name, iteration)
        summary, problem = _summary(evaluation.summary), None
        if which is not None:
            summary, problem = present_reward.of_summary(summary, evaluation.table, which)
        entry.summaries[name] = summary
        entry.notes.extend([] if problem is None else [f"{name}: {label} has no best of several samples: {problem}."])
    return entry


def _no_policy(folder: Path, iteration: int | None, found: dict[str, list[int]]) -> str:
    """Say which iterations have evaluations, and what may be asked for instead."""
    there = "; ".join(f"{name} has {', '.join(map(str, sorted(indices)))}" for name, indices in found.items())
    having = [name for name, indices in found.items() if iteration in indices]
    if iteration is None:
        return f"{folder}/evaluations: no iteration has all evaluations ({there}); name some with --evaluation"
    if having:
        ask = " ".join(f"--evaluation {name}" for name in having)
        return f"{folder}/evaluations: iteration {iteration} has not all evaluations ({there}); {ask} shows what it has"
    return f"{folder}/evaluations: iteration {iteration} has not been evaluated ({there}); give one that has been"


def _indices(place: Path) -> list[int]:
    return [int(file.stem) for file in place.iterdir() if SUMMARY_NAME.fullmatch(file.name)]


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if MAIN in summary and "tasks" in summary:
            return summary
        problem = f"has no {MAIN}"
    except (OSError, ValueError) as error:
        problem = f"is not readable JSON ({error})"
    raise EarlError(f"{path}: {problem}; run the evaluate stage again")


def compare(entries: Sequence[Entry], published: bool = False) -> dict[str, Any]:
    """Return everything that the page, the table for terminals and the JSON file show.

    Raises:
        EarlError: two entries have the same label, or a table cannot be read.
    """
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise EarlError(f"--run: two runs have one name ({', '.join(labels)}); rename a folder, or leave one out")
    told = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    ours = dict.fromkeys(name for entry in entries for name in entry.summaries)
    # Those of the published table in its order, then the others.
    columns = [*(name for name in told["columns"] if name in ours), *(n for n in ours if n not in told["columns"])]
    changes = {entry.label: _changes(entries[0], entry) for entry in entries[1:]}
    return {
        "measure": MAIN,
        "columns": columns,
        "entries": [_entry(entry, columns) for entry in entries],
        "baseline": labels[0],
        "changes": changes,
        "notes": _notes(entries, columns) + _few_pairs(labels[0], changes),
        "published": told if published else None,
    }


def _entry(entry: Entry, columns: Sequence[str]) -> dict[str, Any]:
    means = [(entry.summaries[name][MAIN] or {}).get("mean") for name in columns if name in entry.summaries]
    whole = len(means) == len(columns) and None not in means
    return {
        "label": entry.label,
        "iteration": entry.iteration,
        # Every evaluation counts alike, whatever its size.
        "mean": fmean(means) if whole else None,
        "start": {name: entry.start(name) for name in entry.summaries},
        "evaluations": {
            name: _part(summary) | {"tasks": {task: _part(part) for task, part in summary["tasks"].items()}}
            for name, summary in entry.summaries.items()
        },
    }


def _part(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: summary.get(key) for key in (*COUNTS, *MEASURES, "best_of")}


def _changes(baseline: Entry, entry: Entry) -> dict[str, Any]:
    """Change of the mean VIEScore with its paired bootstrap interval, by evaluation and by task of it.

    `prompts` is how many the baseline knows the VIEScore of, and the entry.
    """
    found = {}
    for name in entry.summaries:
        if name not in baseline.summaries:
            continue
        tasks = [None, *entry.summaries[name]["tasks"]]
        before, after = ({task: each.rewards(name, task) for task in tasks} for each in (baseline, entry))
        all_, *rest = (intervals.paired_bootstrap(before[task], after[task]) for task in tasks)
        by_task = {task: vars(change) for task, change in zip(tasks[1:], rest, strict=True) if change}
        known = [len(before[None]), len(after[None])]
        found[name] = {"all": vars(all_) if all_ else None, "tasks": by_task, "prompts": known}
    return found


def _few_pairs(baseline: str, changes: dict[str, dict[str, Any]]) -> list[str]:
    """Say where a change is over fewer prompts than either of the two has."""
    notes = []
    for label, by_name in changes.items():
        for name, change in by_name.items():
            pairs = change["all"]["n"] if change["all"] else 0
            if pairs < min(change["prompts"]):
                counts = " and ".join(map(str, change["prompts"]))
                common = f"{pairs} prompt{'' if pairs == 1 else 's'} in common, of {counts}"
                notes.append(f"{name}: {baseline} and {label} have {common}; the change is over these.")
    return notes


def _notes(entries: Sequence[Entry], columns: Sequence[str]) -> list[str]:
    """Say what makes figures of one column hard to compare."""
    notes = [note for entry in entries for note in entry.notes]
    for name in columns:
        those = {entry.label: entry.summaries[name] for entry in entries if name in entry.summaries}
        ways_to_differ = [("sampling", SAMPLING), ("how a completion begins", ("assistant_prefill",))]
        ways_to_differ.append(("judge", ("judge",)))
        if any(summary.get("best_of") for summary in those.values()):
            ways_to_differ.append(("the reward that the best of several samples is by", (present_reward.RECORDED,)))
        for what, keys in ways_to_differ:
            ways: dict[tuple, list[str]] = {}
            for label, summary in those.items():
                ways.setdefault(tuple(summary.get(key) for key in keys), []).append(label)
            if len(ways) > 1:
                parts = (f"{', '.join(map(str, way))} ({', '.join(labels)})" for way, labels in ways.items())
                notes.append(f"{name}: the entries differ in {what}: {'; '.join(parts)}.")
    return notes


def markdown(found: dict[str, Any]) -> str:
    """Return the table of means, and that of changes, as Markdown."""
    columns, published = all_columns(found), _published_rows(found)
    rows = [["", *columns, "mean", "failed"]]
    rows += [
        [f"{entry['label']}", *(_cell(entry, name) for name in columns), _score(entry["mean"]), str(failures(entry))]
        for entry in found["entries"]
    ]
    if not published_apart(found):
        rows += [[head, *(_score(known.get(name)) for name in columns), mean, ""] for head, known, mean in published]
    lines = [f"VIEScore, mean ± std [95% interval of the mean]; changes are paired, from {found['baseline']}."]
    lines += ["", *_pipes(rows)]
    if found["changes"]:
        changed = [["change", *found["columns"]]]
        for label, changes in found["changes"].items():
            changed.append([label, *(_change((changes.get(name) or {}).get("all")) for name in found["columns"])])
        lines += ["", *_pipes(changed)]
    if any(any(entry["start"].values()) for entry in found["entries"]):
        gained = [["change in training", *found["columns"]]]
        for entry in found["entries"]:
            starts = [entry["start"].get(name) for name in found["columns"]]
            gained.append([entry["label"], *(_change(start and start["change"]) for start in starts)])
        lines += ["", *_pipes(gained)]
    if published_apart(found):
        names = found["published"]["columns"]
        apart = [[head, *(_score(known[name]) for name in names), mean] for head, known, mean in published]
        lines += ["", *_pipes([["", *names, "mean"], *apart])]
    return "\n".join([*lines, *(["", *found["notes"]] if found["notes"] else [])])


def _published_rows(found: dict[str, Any]) -> list[tuple[str, dict[str, float], str]]:
    """Label, values by evaluation, and mean of each published row."""
    published = found["published"] or {"rows": []}
    return [
        (
            f"{row['label']} (published, {published['judge']})",
            dict(zip(published["columns"], row["values"], strict=True)),
            _score(row["mean"]),
        )
        for row in published["rows"]
    ]


def published_apart(found: dict[str, Any]) -> bool:
    """Return whether there are published rows that have no evaluation in common with the runs: a table of their own."""
    return found["published"] is not None and not set(found["published"]["columns"]) & set(found["columns"])


def all_columns(found: dict[str, Any]) -> list[str]:
    """Return the names of evaluations: those of the runs, then those that only published rows in their table have."""
    more = [] if found["published"] is None or published_apart(found) else found["published"]["columns"]
    return list(dict.fromkeys([*found["columns"], *more]))


def failures(entry: dict[str, Any]) -> int:
    """Return how many judgements of an entry failed, in all evaluations."""
    return sum(part["failed"] or 0 for part in entry["evaluations"].values())


def _cell(entry: dict[str, Any], name: str) -> str:
    value = entry["evaluations"].get(name, {}).get(MAIN)
    return (
        "-" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def _pipes(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
