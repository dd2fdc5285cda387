"""Commands about the machines that stages run on."""

import dataclasses
import enum
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from earl.config.schema import Config

app = typer.Typer()


class Granularity(enum.StrEnum):
    segment = enum.auto()
    stage = enum.auto()


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            help="An experiment, or a run's <run>/config.json: says the judge, the folder, and what stages take of "
            "memory and disk."
        ),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Folder for the files of runs.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's address, or the file that holds it.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that are to be visible.")] = None,
    minimum_free: Annotated[
        float | None, typer.Option(min=0, help="GiB of disk that are to be free; else what the configuration needs.")
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="How the experiment is to run; see `snakemake --config granularity=`.")
    ] = Granularity.segment,
    processes: Annotated[
        int, typer.Option(min=1, help="Check as so many ranks, spread over the nodes of the Slurm job this runs in.")
    ] = 1,
) -> None:
    """Check this node, or all nodes of several ranks, as a stage would find it."""
    from earl import doctor as checks
    from earl.doctor import wanted
    from earl.execution import launch, ranks

    if config is None:
        asked = wanted.Wanted(path or Path("runs"), gpus, judge)
    else:
        from earl.doctor import needs

        asked = needs.of(_read(config), path, gpus, judge, granularity == Granularity.segment)
    if minimum_free is not None:
        asked = dataclasses.replace(asked, disk=wanted.Needs(int(minimum_free * 2**30)))
    if processes > 1 and not ranks.is_launched():
        status = launch.launch(None, sys.argv[1:], processes)
        if config is None:
            raise typer.Exit(status)
        [(place, fit)] = checks.fit(asked)
        typer.echo(checks.table([(place, fit)]))
        raise typer.Exit(status or fit.passed is False)
    found = checks.examine(asked)
    has_failed = any(finding.passed is False for _, finding in found)
    if has_failed or os.environ.get("RANK", "0") == "0":
        typer.echo(checks.table(found))
    raise typer.Exit(has_failed)


def _read(path: Path) -> "Config":
    from earl.config import load

    return load.read(path) if path.suffix == ".json" else load.load(path).config
