"""`earl shapes`: the embedded synthetic world."""

from typing import Annotated

import typer

from earl.cli.options import Output

app = typer.Typer(help="The embedded synthetic world of shapes.", no_args_is_help=True)


@app.command("raw")
def shapes_raw(
    out: Output,
    count: Annotated[int, typer.Option(min=1, help="Number of pairs.")],
    seed: Annotated[int, typer.Option(help="Seed; disjoint seeds give disjoint pairs.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks, all by default.")] = "",
    unchanged_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pairs whose edited image is the original.")
    ] = 0.0,
    damaged_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pairs whose edit also removes or replaces another object.")
    ] = 0.0,
) -> None:
    """Write pairs of images with instructions as a raw Parquet file."""
    from earl.shapes import dataset

    chosen = tuple(tasks.split(",")) if tasks else dataset.world.TASKS
    dataset.write_raw(out, count, seed, chosen, unchanged_fraction, damaged_fraction)


@app.command("policy")
def shapes_policy(out: Output, seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0) -> None:
    """Write a tiny Emu3 policy with random weights and its tokenizer."""
    from earl.shapes import policy

    policy.write_policy(out, seed=seed)
