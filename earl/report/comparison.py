"""The page that shows runs side by side: a replay beside its source, or evaluations and training of several runs."""

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from earl.report import curves, dots, page, results

Change = tuple[str, Any, Any]
MOST_IN_A_LEGEND = 4
"""Runs that each training chart names beside its own values; of more, one legend stands above all charts."""
COLUMNS = {
    "semantic_consistency": "SC",
    "perceptual_quality": "PQ",
    "viescore": "VIEScore",
    **page.SCORE_LABELS,
}


def replay_page(source: curves.Curves, replayed: curves.Curves, changes: Sequence[Change], notes: Sequence[str]) -> str:
    """Return the HTML that shows a replay beside its source."""
    rows = [(name, json.dumps(before), json.dumps(after)) for name, before, after in changes]
    return page.rendered(
        "comparison.html.j2",
        title=replayed.label,
        notes=notes,
        changes={"before": source.label, "after": replayed.label, "rows": rows} if rows else None,
        results=None,
        **training([source, replayed]),
    )


def results_page(found: dict[str, Any], runs: Sequence[curves.Curves]) -> str:
    """Return the HTML of `earl.report.results.compare`, with the training curves of the runs."""
    labels = [entry["label"] for entry in found["entries"]]
    return page.rendered(
        "comparison.html.j2",
        title=" · ".join(labels) if len(labels) < 4 else f"{len(labels)} runs",
        notes=[],
        changes=None,
        results={
            **found,
            "columns": results.all_columns(found),
            "measured": found["columns"],
            "published": _published(found),
            "apart": results.published_apart(found),
            "started": any(any(entry["start"].values()) for entry in found["entries"]),
            "failures": {entry["label"]: results.failures(entry) for entry in found["entries"]},
            # Of two, everyone sees the mean.
            "charts": [_dots(found, name) for name in [*found["columns"], None] if name or len(found["columns"]) > 2],
            "measures": [(name, _measures(found, name)) for name in found["columns"]],
            "tasks": [(name, _tasks(found, name)) for name in found["columns"]],
            "labels": COLUMNS,
        },
        **training([each for each in runs if each.metrics]),
    )


def training(runs: Sequence[curves.Curves]) -> dict[str, list[Any]]:
    """Return the training charts of some runs, one a measure, and the legend of them all, for the template."""
    drawn = curves.drawn(runs, page.PALETTE)
    found = [page.chart(each["title"], each["note"], each["lines"]) for each in drawn]
    kept = [each for each in found if each]
    if len(runs) <= MOST_IN_A_LEGEND:
        return {"training": kept, "legend": []}
    legend = [{"label": run.label, "colour": place % page.PALETTE} for place, run in enumerate(runs)]
    return {"training": [each | {"legend": []} for each in kept], "legend": legend}


def _published(found: dict[str, Any]) -> dict[str, Any] | None:
    """The published rows with their values by column."""
    published = found["published"]
    if published is None:
        return None
    rows = [row | {"values": dict(zip(published["columns"], row["values"], strict=True))} for row in published["rows"]]
    return published | {"rows": rows}


def _dots(found: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The chart of an evaluation, or (None) of the mean over all of them, with the published figures of that name."""
    rows = []
    for entry in found["entries"]:
        if name is None:
            rows += [] if entry["mean"] is None else [dots.Dot(entry["label"], entry["mean"])]
        elif (value := entry["evaluations"].get(name, {}).get(results.MAIN)) is not None:
            start = entry["start"].get(name)
            rows.append(dots.Dot(entry["label"], value["mean"], value["low"], value["high"], start and start["mean"]))
    published = _published(found)
    for row in published["rows"] if published and name in published["columns"] else []:
        rows.append(dots.Dot(f"{row['label']}, published", row["values"][name], other=True))
    title = name or "Mean of the evaluations"
    drawn = Markup(dots.dot_chart(title, rows)) if rows else None
    return {"title": title, "svg": drawn}


def _measures(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Of one evaluation, the measures that any entry has, and each entry's values."""
    parts = {entry["label"]: entry["evaluations"][name] for entry in found["entries"] if name in entry["evaluations"]}
    shown = [measure for measure in COLUMNS if any(part.get(measure) for part in parts.values())]
    best = sorted({size for part in parts.values() for size in part["best_of"] or {}}, key=int)
    return {"parts": parts, "shown": shown, "best": best}


def _tasks(found: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The tasks of an evaluation, and one row an entry; nothing where there is one task alone."""
    parts = {entry["label"]: entry["evaluations"].get(name) for entry in found["entries"]}
    names = sorted({task for part in parts.values() if part for task in part["tasks"]})
    if len(names) < 2:
        return None
    rows = []
    for label, part in parts.items():
        changes = (found["changes"].get(label, {}).get(name) or {"tasks": {}})["tasks"]
        cells = [{"part": part and part["tasks"].get(task), "change": changes.get(task)} for task in names]
        rows.append({"label": label, "cells": cells})
    return {"names": [task or "no type" for task in names], "rows": rows}
