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
) -> None:
    """Write pairs of images with instructions as a raw Parquet file."""
    from earl.shapes import dataset

    dataset.write_raw(out, count=count, seed=seed, tasks=tuple(tasks.split(",")) if tasks else dataset.world.TASKS)


@app.command("policy")
def shapes_policy(out: Output, seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0) -> None:
    """Write a tiny Emu3 policy with random weights and its tokenizer."""
    from earl.shapes import policy

    policy.write_policy(out, seed=seed)
