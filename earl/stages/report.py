"""Report: one HTML page of a run, from its files alone."""

from pathlib import Path

from earl.files import atomic
from earl.report import contents, exports, page


def run(run_folder: Path, out: Path, curves: Path | None = None, evaluations: Path | None = None) -> None:
    """Write the report of ``run_folder`` to ``out``. Equal files give equal bytes; it holds no date.

    Args:
        curves: also write the charts alone, as SVG.
        evaluations: also write the results of the evaluations, as CSV.

    Raises:
        EarlError: when ``run_folder`` is not one, or a file in it is damaged.
    """
    found = contents.read(run_folder)
    if curves is not None:
        atomic.write_text(curves, exports.curves(found))
    if evaluations is not None:
        atomic.write_text(evaluations, exports.evaluations(found))
    atomic.write_text(out, page.render(found))
