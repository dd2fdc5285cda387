"""`earl data`: the published data sets, listed and fetched."""

from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import output
from earl.messages.errors import EarlError

app = typer.Typer(help="Published data sets: list them, fetch them.", no_args_is_help=True)


@app.command("list")
def list_data(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets or groups; all by default.")] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Ask the hub for files, bytes and licence of each, as it has them now.")
    ] = False,
) -> None:
    """Print the data sets that experiments use: size, licence as the card says, origin, and who uses them."""
    from earl.data import catalogue, fetch

    found = catalogue.named(names) if names else list(catalogue.entries().values())
    if not online:
        typer.echo(catalogue.table(found))
        return
    for one in found:
        try:
            typer.echo(f"{one.name}: {fetch.look_up(one).text}")
        except EarlError as error:
            typer.echo(str(error))


@app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(help="Data sets or groups, as `earl data list` names them.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to lay them out in; for the ten experiments, that of APP__DATA_DIR.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=output, help="Instead of --to, for one tokenised data set: write it as Parquet alone."),
    ] = None,
    keep_archives: Annotated[bool, typer.Option(help="Keep .pth files once they are converted.")] = True,
    max_rejected_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the .pth files that may be unusable.")
    ] = 0.0,
) -> None:
    """Download data sets from the hub, check and unpack them, and convert tokenised ones to Parquet."""
    from earl.data import catalogue, fetch

    entries = catalogue.named(names)
    if (to is None) == (out is None):
        raise EarlError("give either --to, a folder for all of them, or --out, what to write of a single one")
    if to is not None:
        fetch.fetch(entries, to, keep_archives, max_rejected_fraction)
    elif len(entries) == 1:
        fetch.make(entries[0], out, max_rejected_fraction)
    else:
        raise EarlError(f"--out is for a single data set, and these are {len(entries)}; give --to")
