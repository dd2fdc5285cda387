"""Commands about the machines that stages run on."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="A run's <run>/config.json: says the judge and the folder.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Folder for the files of runs.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's address, or the file that holds it.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that are to be visible.")] = None,
    minimum_free: Annotated[float, typer.Option(min=0, help="GiB that are to be free.")] = 10.0,
    processes: Annotated[
        int, typer.Option(min=1, help="Check as so many ranks, spread over the nodes of the Slurm job this runs in.")
    ] = 1,
) -> None:
    """Check this node, or all nodes of several ranks, as a stage would find it."""
    from earl.execution import launch, ranks
    from earl.run import doctor as checks

    if processes > 1 and not ranks.is_launched():
        raise typer.Exit(launch.launch(None, sys.argv[1:], processes))

    if config is not None:
        from earl.config.load import read

        settings = read(config)
        path = path or Path(settings.base_exp_dir)
        judge = judge or (str(settings.reward_function_api_base) if settings.judge == "openai" else None)
    wanted = checks.Wanted(path or Path("runs"), gpus, judge, int(minimum_free * 2**30))
    found = checks.examine(wanted)
    has_failed = any(finding.passed is False for _, finding in found)
    if has_failed or os.environ.get("RANK", "0") == "0":
        typer.echo(checks.table(found))
    raise typer.Exit(has_failed)
