"""Compare: evaluations and training curves of several runs on one page, and as JSON beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from earl.files import atomic
from earl.report import comparison, curves, results


def run(specs: Sequence[str], out: Path, evaluations: Sequence[str] = (), published: bool = False) -> str:
    """Write ``out`` (HTML) and the same figures as JSON beside it; return the tables as Markdown.

    Args:
        specs: Run folders, each with ``@<iteration>`` behind it if it shall not be the newest evaluated policy. Changes
            are from the first.
        evaluations: Names of the evaluations to show; none: all.
        published: Also show the published rows.

    Raises:
        EarlError: a run lacks an evaluation, or a file is damaged.
    """
    entries = [results.read(spec, evaluations) for spec in specs]
    found = results.compare(entries, published)
    trained = {entry.run.path: curves.read(entry.run.path, entry.run.path.resolve().name) for entry in entries}
    atomic.write_text(out, comparison.results_page(found, list(trained.values())))
    atomic.write_text(out.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    return results.markdown(found)
