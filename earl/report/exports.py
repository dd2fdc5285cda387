"""Parts of a report as files of their own, for other reports and for tables: curves as SVG, evaluations as CSV."""

import csv
import io
from collections.abc import Iterator
from html import escape
from typing import Any

from earl.report import page
from earl.report.contents import Contents

COLUMNS = 3
CELL = (380, 230)
"""Width and height of a chart with its title, in pixels."""
ENDS = {"": "mean", "_low": "low", "_high": "high"}
MEASURES = ("reward", *page.VIESCORE_LABELS, *page.SCORE_LABELS)


def curves(found: Contents) -> str:
    """Return all charts of a report as one SVG file; it follows the viewer's light or dark colours as the page does."""
    charts = [*page.held_out(found.evaluations), *page.training(found.metrics)]
    width, height = CELL
    parts = []
    for place, chart in enumerate(charts):
        x, y = place % COLUMNS * width + 10, place // COLUMNS * height + 24
        words = "; ".join(line["label"] for line in chart["legend"])
        parts.append(f'<text class="tick" x="{x}" y="{y - 6}">{escape(chart["title"])}: {escape(words)}</text>')
        size = f'x="{x}" y="{y}" width="{width - 20}" height="{height - 40}"'
        parts.append(str(chart["svg"]).replace("<svg ", f"<svg {size} ", 1))
    rows = -(-len(charts) // COLUMNS)
    style = (page.FOLDER / "style.css").read_text(encoding="utf-8")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * width} {max(rows, 1) * height}">'
        f"<style><![CDATA[{style}]]></style>{''.join(parts)}</svg>\n"
    )


def evaluations(found: Contents) -> str:
    """Return the evaluations as CSV: a row for each and each iteration, means with their 95% intervals."""
    text = io.StringIO()
    names = [f"{measure}{end}" for measure in MEASURES for end in ENDS]
    table = csv.DictWriter(text, ["evaluation", "iteration", "prompts", *names], lineterminator="\n")
    table.writeheader()
    table.writerows(_rows(found))
    return text.getvalue()


def _rows(found: Contents) -> Iterator[dict[str, Any]]:
    for series in found.evaluations:
        for summary in series.summaries:
            row = {"evaluation": series.name, "iteration": summary["iteration"], "prompts": summary.get("prompts")}
            for measure in MEASURES:
                value = summary.get(measure) or {}
                row |= {f"{measure}{end}": value.get(key) for end, key in ENDS.items()}
            yield row
