"""Commands on a run as a whole: start, verify, prune, rewind, status, track, push."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import BestEffort, Record, RunFolder, output

app = typer.Typer()


@app.command()
def track(
    run: RunFolder,
    best_effort: BestEffort = False,
    online: Annotated[bool, typer.Option("--online", help="Send now, whatever wandb_mode says.")] = False,
    out: Record = None,
) -> None:
    """Show the run's figures and episodes on Weights & Biases, as far as the configuration says and it is not done."""
    from earl import tracking
    from earl.config.load import read
    from earl.files.layout import Run
    from earl.tracking import wandb_run

    folder = Run(run)
    config = read(folder.config)
    config = config.model_copy(update={"wandb_mode": "online"}) if online else config
    tracking.attempt(lambda: wandb_run.send(folder, config), best_effort, out)


@app.command()
def push(run: RunFolder, best_effort: BestEffort = False, out: Record = None) -> None:
    """Push the run's policies to the Hugging Face hub, as far as the configuration says and it is not done."""
    from earl import tracking
    from earl.config.load import read
    from earl.files.layout import Run
    from earl.tracking import hub_push

    folder = Run(run)
    tracking.attempt(lambda: hub_push.push(folder, read(folder.config)), best_effort, out)


@app.command()
def start(run: RunFolder, policy: Annotated[Path, typer.Option(help="Folder of the starting policy.")]) -> None:
    """Link a run's starting policy as its iteration 0."""
    from earl.files.layout import Run
    from earl.run import state

    state.start(Run(run), policy)


@app.command()
def verify(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(callback=output, help="Also write the findings as JSON.")] = None,
    deep: Annotated[bool, typer.Option(help="Also compare every file with its recorded digest.")] = False,
) -> None:
    """Check that every file of a run is there, made from what it says; note what other configurations or code made."""
    from earl.files.layout import Run
    from earl.run import verify as verification

    found = verification.verify(Run(run), deep=deep)
    typer.echo(found.text())
    if out is not None:
        verification.write(found, out)
    elif found.problems:
        raise typer.Exit(1)


@app.command()
def prune(
    run: RunFolder,
    after: Annotated[int | None, typer.Option(min=1, help="Only what this new iteration makes superfluous.")] = None,
) -> None:
    """Drop checkpoints that the configuration does not keep, and what killed stages left half-written."""
    from earl.config.load import read
    from earl.execution import processes
    from earl.files.layout import Run
    from earl.run import state

    folder = Run(run)
    retention = state.Retention.of(read(folder.config))
    # After one iteration, stages of the next may be at work already; a whole run is cleared alone. In a workflow this
    # waits for stages of files that were asked for besides.
    patience = float("inf") if processes.in_workflow() else 10.0
    alone = state.writing(folder, alone=True, what="prune", patience=patience) if after is None else nullcontext()
    with state.exclusive(folder), alone:
        for index in state.prune(folder, retention, after):
            typer.echo(f"dropped the checkpoint of iteration {index}")


@app.command()
def rewind(run: RunFolder, iteration: Annotated[int, typer.Option("--iteration", min=1)]) -> None:
    """Forget what was trained in an iteration and after it, so that the next call trains from there again."""
    from earl.files.layout import Run
    from earl.run import state

    folder = Run(run)
    with state.exclusive(folder), state.writing(folder, alone=True, what="rewind"):
        gone = state.rewind(folder, iteration)
    typer.echo(f"iterations {gone[0]} to {gone[-1]} are to be trained again")


@app.command()
def status(run: RunFolder) -> None:
    """Print how far a run is and which checkpoints it holds."""
    from earl.config.load import read
    from earl.files.layout import Run
    from earl.run import state

    folder = Run(run)
    typer.echo(state.status(folder, read(folder.config).num_iterations).text())
