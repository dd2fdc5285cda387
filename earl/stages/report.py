"""Report: one HTML page of a run, from its files alone."""

from pathlib import Path

from earl.files import atomic
from earl.report import contents, page


def run(run_folder: Path, out: Path) -> None:
    """Write the report of ``run_folder`` to ``out``. Equal files give equal bytes; it holds no date.

    Raises:
        EarlError: when ``run_folder`` is not one, or a file in it is damaged.
    """
    atomic.write_text(out, page.render(contents.read(run_folder)))
