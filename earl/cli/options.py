"""What options of several command groups have in common."""

from pathlib import Path
from typing import Annotated

import typer

from earl.execution import processes
from earl.files import atomic, manifest


def output(path: Path | None) -> Path | None:
    """Refuse what cannot be written before the work begins: the callback of an option that names an output.

    Raises:
        EarlError: see `earl.files.atomic.check_target` and `earl.files.manifest.refuse_foreign`.
    """
    if path is not None:
        atomic.check_target(path)
        # A workflow's outputs are its own; Snakemake removes a manifest before it has the folder made again.
        if not processes.in_workflow():
            manifest.refuse_foreign(path)
    return path


def run_folder(path: Path) -> Path:
    """As `output`, for a folder that is filled, not replaced: a link may lead there."""
    return path if path.is_dir() else output(path)


ConfigFile = Annotated[Path, typer.Option("--config", help="The run's resolved configuration, <run>/config.json.")]
RunFolder = Annotated[Path, typer.Option("--run", help="The run's folder, <base_exp_dir>/<run_name>.")]
IterationIndex = Annotated[int, typer.Option("--iteration", min=0, help="Index of the iteration.")]
Output = Annotated[
    Path, typer.Option("--out", callback=output, help="What to write; it appears only once it is complete.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="field=value, the value as JSON or plain text; may be repeated.")
]
BestEffort = Annotated[
    bool, typer.Option("--best-effort", help="Warn instead of failing; the next call sends what is missing.")
]
Record = Annotated[Path | None, typer.Option("--out", callback=output, help="Also write what was done as JSON.")]
