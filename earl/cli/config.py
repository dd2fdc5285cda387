"""`earl config`, `earl import-config`: show, freeze and import configurations."""

from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import Overrides, output
from earl.messages.errors import EarlError

app = typer.Typer(help="Show and freeze configurations.", no_args_is_help=True)


@app.command("show")
def config_show(
    file: Annotated[Path, typer.Argument(help="A .jsonnet file, for example config/demo.jsonnet.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration and where each value came from."""
    from earl.config import load

    typer.echo(load.show(load.load(file, load.parse_overrides(overrides or []))))


@app.command("freeze")
def config_freeze(
    file: Annotated[Path, typer.Argument(help="A .jsonnet file.")],
    run_config: Annotated[Path, typer.Argument(help="The <run>/config.json to write.")],
    overrides: Overrides = None,
    accept_changes: Annotated[bool, typer.Option(help="Replace a frozen configuration that differs.")] = False,
) -> None:
    """Write the resolved configuration into a run folder, or stop with what differs from the one there."""
    from earl.config import freeze, load

    loaded = load.load(file, load.parse_overrides(overrides or []))
    freeze.write(loaded.config, run_config, accept_changes=accept_changes)


def import_config(
    file: Annotated[Path, typer.Argument(help="A .jsonnet or .json file of mair-lab/EARL, an experiment.")],
    out: Annotated[
        Path | None, typer.Option(callback=output, help="The .jsonnet file to write; without, print only.")
    ] = None,
) -> None:
    """Read a configuration of the reference and write ours; says what becomes of each field."""
    from earl.config import from_reference, load
    from earl.files import atomic

    lines = from_reference.read(file)
    text = from_reference.jsonnet(lines, file.name)
    if out is not None and out.exists() and out.read_text(encoding="utf-8", errors="replace") != text:
        raise EarlError(f"{out}: is there already and says something else; choose another name, or remove it first")
    typer.echo("\n".join(line.text() for line in lines))
    load.validate(from_reference.values(lines), str(file))
    if out is not None:
        atomic.write_text(out, text)
        typer.echo(f"written: {out}")
