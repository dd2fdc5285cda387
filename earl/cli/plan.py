"""`earl plan`: what a run takes, before it starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from earl.cli.options import Overrides
from earl.messages.errors import EarlError

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[
        list[Path],
        typer.Option("--config", help="An experiment, .jsonnet, or a run's config.json; may be repeated."),
    ],
    overrides: Overrides = None,
    profile: Annotated[
        str | None, typer.Option(help="A Snakemake profile, such as slurm, whose resources say what GPUs jobs get.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="The GPUs of all jobs instead: type, type:GB or GB, such as h100, a100:40, 24.")
    ] = None,
    granularity: Annotated[
        Literal["segment", "stage"], typer.Option(help="What one job is; see the workflow's setting.")
    ] = "segment",
    assume: Annotated[
        list[str] | None, typer.Option(help="name=value, in place of an assumption that the plan prints.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", min=0, max=1e6, help="Also print what the GPU-hours cost.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_table: Annotated[bool, typer.Option("--table", help="Print a Markdown table, a row an experiment.")] = False,
) -> None:
    """Print what a run takes: GPU memory by stage, disk, tokens, GPU-hours, questions to the judge.

    Without --profile and --gpu, the GPUs are those of this machine. The status is 1 where a stage does not fit.
    """
    from earl.config import load
    from earl.estimate import gpus, rates, text
    from earl.estimate import run as estimates

    # As Snakemake does, which takes that one by itself, if there is one here.
    usual = ["default"] if Path("profiles/default/config.yaml").is_file() else []
    resources = gpus.of_profiles(*usual, *([profile] if profile else []))
    if as_json and as_table:
        raise EarlError("--json and --table: give one of the two")
    chosen = gpus.gpu(gpu) if gpu is not None else None
    machine = gpus.Asked(None, None) if profile or chosen else gpus.here()
    assumed = rates.assumed(assume or [])

    def asked(rule: str) -> gpus.Asked:
        said = gpus.asked(resources(rule))
        return replace(said, gpu=chosen) if chosen else said.or_of(machine)

    fields = load.parse_overrides(overrides or [])
    configs = [
        load.changed(load.read(path), fields) if path.suffix == ".json" else load.load(path, fields).config
        for path in config
    ]
    found = estimates.make(configs, granularity == "segment", asked, assumed)
    if as_json:
        objects = [estimates.to_json(one, price) for one in found]
        typer.echo(json.dumps(objects[0] if len(objects) == 1 else objects, indent=1))
    elif as_table:
        typer.echo("\n".join([text.HEADER, *map(text.row, found)]))
    else:
        typer.echo("\n\n".join(text.page(one, price) for one in found))
    raise typer.Exit(any(one.problems for one in found))
