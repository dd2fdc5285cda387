"""The page that shows runs side by side: what differs, and their training curves."""

import json
from collections.abc import Sequence
from typing import Any

from earl.report import curves, page

Change = tuple[str, Any, Any]


def training_charts(runs: Sequence[curves.Curves]) -> list[page.Chart]:
    """Return the training charts of some runs, one a measure, for the template."""
    drawn = curves.drawn(runs, page.PALETTE)
    found = [page.chart(each["title"], each["note"], each["lines"]) for each in drawn]
    return [each for each in found if each]


def replay_page(source: curves.Curves, replayed: curves.Curves, changes: Sequence[Change], notes: Sequence[str]) -> str:
    """Return the HTML that shows a replay beside its source."""
    rows = [(name, json.dumps(before), json.dumps(after)) for name, before, after in changes]
    return page.rendered(
        "comparison.html.j2",
        title=replayed.label,
        notes=notes,
        changes={"before": source.label, "after": replayed.label, "rows": rows} if rows else None,
        training=training_charts([source, replayed]),
    )
