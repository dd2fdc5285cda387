"""The stages, one command each: files to files."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from earl.cli.options import ConfigFile, IterationIndex, Output, Overrides, RunFolder, output, run_folder
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config


app = typer.Typer()


@app.command()
def download(
    files: Annotated[
        str, typer.Argument(help="hf://datasets/<owner>/<name>[@<revision>]/<path or pattern>.parquet (or .arrow)")
    ],
    out: Output,
) -> None:
    """Download Parquet or Arrow files of a data set on the hub as a folder."""
    from earl.data import hub_files
    from earl.files import hub_names

    try:
        wanted = hub_names.data_files(files)
    except ValueError as error:
        raise EarlError(f"{files}: {error}") from error
    if wanted is None:
        raise EarlError(f"{files}: is no name on the hub, which begins with hf://datasets/")
    hub_files.download(wanted, out)


@app.command()
def tokenise(
    config: ConfigFile,
    dataset: Annotated[str, typer.Option(help="Name in the configuration's raw_datasets.")],
    raw: Annotated[Path, typer.Option(help="Raw pairs: a Parquet or Arrow file, a folder of them, or a pattern.")],
    out: Output,
) -> None:
    """Turn raw image pairs into tokenised Parquet shards."""
    from earl.config.load import read
    from earl.run import claims
    from earl.stages import tokenise as stage

    settings = read(config)
    claims.claim(settings, "tokenise")
    stage.run(settings, dataset, raw, out)


@app.command()
def select(
    config: ConfigFile, name: Annotated[str, typer.Option(help="Name in the configuration's selections.")], out: Output
) -> None:
    """Take the best and the worst completion of each group of a run's rollouts as a tokenised data set."""
    from earl.config.load import read
    from earl.stages import select as stage

    stage.run(read(config), name, out)


@app.command()
def sft(
    config: ConfigFile, name: Annotated[str, typer.Option(help="Name in the configuration's sft.")], out: Output
) -> None:
    """Fine-tune a policy on examples, or by DPO on pairs; by `train_processes` ranks, or those of torchrun."""
    from earl.config.load import read

    settings = read(config)
    leave_to_ranks(settings, "sft", "--config", config, "--name", name, "--out", out)
    from earl.stages import sft as stage

    stage.run(settings, name, out)


@app.command()
def generate(
    config: ConfigFile,
    iteration: IterationIndex,
    policy: Annotated[Path, typer.Option(help="Folder of the policy to sample from.")],
    out: Output,
    shard: Annotated[int | None, typer.Option(min=0, help="Shard of the iteration's prompts.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Name of a held-out evaluation, instead of --shard.")] = None,
) -> None:
    """Sample completions from a policy and decode them to images."""
    if (shard is None) == (evaluation is None):
        raise EarlError("give either --shard, for an iteration's rollouts, or --evaluation, for held-out prompts")
    from earl.config.load import read

    settings = read(config)
    from earl.files import manifest
    from earl.files.layout import Run
    from earl.run import claims, curriculum, state
    from earl.stages import generate as stage
    from earl.stages import rounds

    run, number = Run(config.parent), (shard or 0) // settings.rollout_shards
    digest = manifest.digest_folder(policy) if number else ""
    earlier = rounds.earlier(settings, run.iteration(iteration), number, digest)
    ledger = curriculum.ledger(settings, run, iteration) if evaluation is None else None
    samples = shard is None or bool(stage.wanted(settings, shard, earlier))
    if samples:
        claims.claim(settings, "generate")
    with state.writing_to(out, run):
        if evaluation is not None:
            stage.run_evaluation(settings, evaluation, iteration, stage.Sampler.load(settings, policy), out)
        else:
            sampled = stage.Sampler.load(settings, policy) if samples else stage.Policy.of(policy)
            stage.run(settings, iteration, shard, sampled, out, earlier, ledger)


@app.command()
def score(
    config: ConfigFile,
    rollouts: Annotated[Path, typer.Option(help="Rollouts to judge.")],
    out: Output,
    again_failed: Annotated[
        bool, typer.Option("--again-failed", help="Ask only the failed judgements of the file --out again.")
    ] = False,
) -> None:
    """Ask the judge about rollouts."""
    from earl.config.load import read

    settings = read(config)
    from earl.files.layout import Run
    from earl.run import claims, state
    from earl.stages import score as stage

    claims.claim(settings, "score")
    with state.writing_to(out, Run(config.parent)):
        if again_failed:
            failed, still = stage.run_again(settings, rollouts, out)
            typer.echo(f"{out}: {failed} judgements had failed, {still} still have")
        else:
            stage.run(settings, rollouts, out)


@app.command()
def train(config: ConfigFile, iteration: IterationIndex, run: RunFolder) -> None:
    """Derive rewards and advantages from the scores and train; by `train_processes` ranks, or those of torchrun."""
    from earl.config.load import read

    settings = read(config)
    from earl.execution import ranks
    from earl.files.layout import Run
    from earl.run import state

    with contextlib.nullcontext() if ranks.is_launched() else state.writing(Run(run), alone=False):
        leave_to_ranks(settings, "train", "--config", config, "--iteration", iteration, "--run", run)
        from earl.stages import train as stage

        stage.run(settings, run, iteration)


@app.command()
def iterate(
    run: RunFolder,
    to: Annotated[int, typer.Option("--to", min=0, help="Last iteration to make.")],
) -> None:
    """Make a run's iterations, with models kept in memory; by `segment_processes` ranks, or those of torchrun."""
    from earl.config.load import read
    from earl.execution import ranks
    from earl.files.layout import Run
    from earl.messages import console
    from earl.run import state

    console.leave_out_bars()  # Several for each iteration, of every rank; the loop has a line an iteration.
    folder = Run(run)
    settings = read(folder.config)
    with contextlib.ExitStack() as held:
        if not ranks.is_launched():
            held.enter_context(state.exclusive(folder))
            held.enter_context(state.writing(folder, alone=True, what=state.segment_name(to)))
        leave_to_ranks(settings, "iterate", "--run", run, "--to", to)
        from earl.stages import iterate as stage

        stage.run(settings, run, to)


def leave_to_ranks(config: "Config", stage: str, *options: object) -> None:
    """Have ranks run this stage, and end with their status; return where this process is a rank, or alone.

    Raises:
        EarlError: see `launch.launch` and `gpus.claim`.
    """
    from earl.execution import launch, ranks
    from earl.run import claims, resources

    claims.claim(config, stage)
    size = resources.ranks(config, stage)
    if size > 1 and not ranks.is_launched():
        raise typer.Exit(launch.launch(config, [stage, *map(str, options)], size))


@app.command()
def restore(run: RunFolder, iteration: IterationIndex) -> None:
    """Bring back a dropped policy by training again over the stored scores."""
    from earl.files.layout import Run
    from earl.run import state
    from earl.stages import restore as stage

    with state.writing(Run(run), alone=False):
        stage.run(run, iteration)


@app.command()
def replay(
    run: Annotated[Path, typer.Option("--run", help="The run whose rollouts and scores to train on.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", callback=run_folder, help="Folder of the new run, beside the other; its name is the run's."
        ),
    ],
    overrides: Overrides = None,
    scores: Annotated[
        str | None, typer.Option(help="Train on the scores that `earl rescore --name` gave, instead of the run's own.")
    ] = None,
) -> None:
    """Train again over a run's stored rollouts and scores with another learner, and compare the curves."""
    from earl.config.load import parse_overrides
    from earl.report import curves
    from earl.stages import replay as stage

    replayed = stage.run(run, out, parse_overrides(overrides or []), scores)
    typer.echo("\n".join([curves.table(replayed.curves()), "", *replayed.notes(), f"charts: {replayed.page}"]))


@app.command()
def rescore(
    run: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the results' folder, <run>/rescored/<name>.")],
    overrides: Overrides = None,
    iterations: Annotated[
        list[int] | None, typer.Option("--iteration", min=0, help="Only this iteration; may be repeated.")
    ] = None,
    evaluations: Annotated[
        list[str] | None, typer.Option("--evaluation", help="Only this evaluation's rollouts; may be repeated.")
    ] = None,
) -> None:
    """Ask another judge about a run's stored rollouts, and print how far the two agree."""
    from earl.config.load import parse_overrides
    from earl.stages import rescore as stage

    found = stage.run(run, name, parse_overrides(overrides or []), iterations or (), evaluations or ())
    typer.echo(stage.text(found))


@app.command()
def evaluate(
    config: ConfigFile,
    name: Annotated[str, typer.Option(help="Name of the evaluation.")],
    iteration: IterationIndex,
    rollouts: Annotated[Path, typer.Option(help="Its rollouts.")],
    scores: Annotated[Path, typer.Option(help="Their scores.")],
    out: Output,
) -> None:
    """Join rollouts and scores of a held-out evaluation and summarise them."""
    from earl.config.load import read
    from earl.stages import evaluate as stage

    stage.run(read(config), name, iteration, rollouts, scores, out)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Option("--run", help="A run's folder, <folder>@<iteration> for another than its newest policy."),
    ],
    out: Output,
    evaluations: Annotated[
        list[str] | None, typer.Option("--evaluation", help="Only this evaluation; may be repeated.")
    ] = None,
    published: Annotated[bool, typer.Option(help="Show the published rows too, marked as such.")] = False,
) -> None:
    """Compare evaluations and training of several runs on one page; changes are from the first."""
    from earl.stages import compare as stage

    typer.echo(stage.run(runs, out, evaluations or (), published))


@app.command()
def report(
    run: RunFolder,
    out: Output,
    curves: Annotated[Path | None, typer.Option(callback=output, help="Also write the charts, as SVG.")] = None,
    evaluations: Annotated[
        Path | None, typer.Option(callback=output, help="Also write the evaluations' results, as CSV.")
    ] = None,
) -> None:
    """Write the run's report, one self-contained HTML file."""
    from earl.stages import report as stage

    stage.run(run, out, curves, evaluations)
