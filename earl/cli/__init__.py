"""The command line: one command a stage. Parses arguments, calls the stage, prints errors for people.

Stages are imported when they are called, so that ``--help`` answers at once.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from earl.cli import data as data_commands
from earl.cli.options import output
from earl.execution import processes
from earl.messages import console
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config

app = typer.Typer(
    help="Reinforcement learning for autoregressive image editing, one stage a command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show and freeze configurations.", no_args_is_help=True)
shapes_app = typer.Typer(help="The embedded synthetic world of shapes.", no_args_is_help=True)
convert_app = typer.Typer(help="Models and data of other formats, turned into ours.", no_args_is_help=True)
judge_app = typer.Typer(help="Judges: check one, start a server.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(convert_app, name="convert")
app.add_typer(data_commands.app, name="data")
app.add_typer(judge_app, name="judge")
app.add_typer(shapes_app, name="shapes")

ConfigFile = Annotated[Path, typer.Option("--config", help="The run's resolved configuration, <run>/config.json.")]
RunFolder = Annotated[Path, typer.Option("--run", help="The run's folder, <base_exp_dir>/<run_name>.")]
IterationIndex = Annotated[int, typer.Option("--iteration", min=0, help="Index of the iteration.")]


def _run_folder(path: Path) -> Path:
    """As `output`, for a folder that is filled, not replaced: a link may lead there."""
    return path if path.is_dir() else output(path)


Output = Annotated[
    Path, typer.Option("--out", callback=output, help="What to write; it appears only once it is complete.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="field=value, the value as JSON or plain text; may be repeated.")
]


@config_app.command("show")
def config_show(
    file: Annotated[Path, typer.Argument(help="A .jsonnet file, for example config/demo.jsonnet.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration and where each value came from."""
    from earl.config import load

    typer.echo(load.show(load.load(file, load.parse_overrides(overrides or []))))


@config_app.command("freeze")
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


@app.command("import-config")
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


@shapes_app.command("raw")
def shapes_raw(
    out: Output,
    count: Annotated[int, typer.Option(min=1, help="Number of pairs.")],
    seed: Annotated[int, typer.Option(help="Seed; disjoint seeds give disjoint pairs.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks, all by default.")] = "",
) -> None:
    """Write pairs of images with instructions as a raw Parquet file."""
    from earl.shapes import dataset

    dataset.write_raw(out, count=count, seed=seed, tasks=tuple(tasks.split(",")) if tasks else dataset.world.TASKS)


@shapes_app.command("policy")
def shapes_policy(out: Output, seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0) -> None:
    """Write a tiny Emu3 policy with random weights and its tokenizer."""
    from earl.shapes import policy

    policy.write_policy(out, seed=seed)


@convert_app.command("model")
def convert_model(
    source: Annotated[str, typer.Argument(help="Folder, or name on the hub: BAAI/Emu3-Gen, mair-lab/sft-simple, ...")],
    out: Output,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name of the tokenizer, where the source has none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the source on the hub.")] = None,
    vision: Annotated[bool, typer.Option("--vision", help="Of a checkpoint with both, its vision tokenizer.")] = False,
) -> None:
    """Write a published Emu3 policy or vision tokenizer as a folder that every stage reads; runs no code of it."""
    from earl.config.hub import Conversion
    from earl.emu3 import published

    published.make(Conversion(source, revision, tokenizer, vision), out)


@convert_app.command("data")
def convert_data(
    listing: Annotated[Path, typer.Argument(help="The tokenized_datalist.json of a pre-tokenised data set.")],
    out: Output,
    codebook_size: Annotated[int, typer.Option(min=1, max=2**32, help="Codes of its vision tokenizer.")] = 32768,
    dataset: Annotated[str | None, typer.Option(help="Name of the data set; by default its folder's.")] = None,
    max_rejected_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the archives that may be unusable.")
    ] = 0.0,
) -> None:
    """Write pre-tokenised .pth archives as tokenised Parquet shards, every token id checked."""
    from earl.stages import convert as stage

    stage.run(listing, out, codebook_size, dataset, max_rejected_fraction)


@app.command()
def download(
    files: Annotated[
        str, typer.Argument(help="hf://datasets/<owner>/<name>[@<revision>]/<path or pattern>.parquet (or .arrow)")
    ],
    out: Output,
) -> None:
    """Download Parquet or Arrow files of a data set on the hub as a folder."""
    from earl.config import hub
    from earl.data import hub_files

    try:
        wanted = hub.data_files(files)
    except ValueError as error:
        raise EarlError(f"{files}: {error}") from error
    if wanted is None:
        raise EarlError(f"{files}: is no name on the hub, which begins with hf://datasets/")
    hub_files.download(wanted, out)


@judge_app.command("check")
def judge_check(
    config: ConfigFile,
    pairs: Annotated[
        Path | None, typer.Option(help="Parquet of images with ranks, instead of judge_gate.pairs or the shapes world.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Examples to take.")] = None,
    minimum: Annotated[float | None, typer.Option(min=0, max=1, help="Pairwise accuracy to reach.")] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Price of a million tokens read.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Price of a million tokens written.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(callback=output, help="Also write the figures as JSON, if they suffice.")
    ] = None,
) -> None:
    """Have the judge score images whose order is known; fails where it does not reach the minimum."""
    from earl.config.load import read
    from earl.config.schema import JudgeGate
    from earl.judges import check

    settings = read(config)
    given = {"pairs": pairs and str(pairs), "examples": examples, "minimum_accuracy": minimum}
    gate = (settings.judge_gate or JudgeGate()).model_copy(update={k: v for k, v in given.items() if v is not None})
    found = check.run(settings, gate, (price_in, price_out) if price_in or price_out else None)
    typer.echo(check.text(found))
    check.check(found, gate, settings.max_failed_fraction)
    if out is not None:
        check.write(found, out)


@judge_app.command("again")
def judge_again(
    run: RunFolder,
    iterations: Annotated[
        list[int] | None, typer.Option("--iteration", min=0, help="Only this iteration; may be repeated.")
    ] = None,
    evaluations: Annotated[
        list[str] | None, typer.Option("--evaluation", help="Only this evaluation; may be repeated.")
    ] = None,
) -> None:
    """Ask the failed judgements of a run again; scores that were given stay."""
    from earl.stages import again

    count = 0
    for asked in again.run(run, iterations or (), evaluations or ()):
        count += 1
        typer.echo(f"{asked.scores}: {asked.failed} judgements had failed, {asked.still} still have")
    if not count:
        typer.echo(f"{run}: no judgement has failed")


@judge_app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def judge_serve(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "Qwen/Qwen2.5-VL-72B-Instruct",
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="Port to listen at; 0 takes a free one.")] = 4877,
    host_file: Annotated[
        Path | None,
        typer.Option(callback=output, help="Appears with the address once the server answers; goes when it ends."),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs to split the model over.")] = 1,
    context_size: Annotated[int, typer.Option(min=1, help="Longest question and answer, in tokens.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    startup: Annotated[float, typer.Option(help="Seconds that the server may take to come up.")] = 1800.0,
) -> None:
    """Run a judge server, which several runs may share; what follows `--` goes to vLLM's server as it is."""
    from earl.judges import server

    port = port or server.free_port()
    options = server.engine_options(revision, dtype, context_size, tensor_parallel_size, server.is_cpu_build())
    arguments = server.command(model, host, port, options, context.args)
    raise typer.Exit(server.serve(arguments, host, port, host_file, startup))


@app.command()
def tokenise(
    config: ConfigFile,
    dataset: Annotated[str, typer.Option(help="Name in the configuration's raw_datasets.")],
    raw: Annotated[Path, typer.Option(help="Raw pairs: a Parquet or Arrow file, a folder of them, or a pattern.")],
    out: Output,
) -> None:
    """Turn raw image pairs into tokenised Parquet shards."""
    from earl.config.load import read
    from earl.stages import tokenise as stage

    stage.run(read(config), dataset, raw, out)


@app.command()
def sft(
    config: ConfigFile, name: Annotated[str, typer.Option(help="Name in the configuration's sft.")], out: Output
) -> None:
    """Warm-start a policy by supervised fine-tuning; by `train_processes` ranks, or those of torchrun."""
    from earl.config.load import read

    settings = read(config)
    _leave_to_ranks(settings, "sft", "--config", config, "--name", name, "--out", out)
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
    from earl.stages import generate as stage

    if evaluation is not None:
        stage.run_evaluation(read(config), evaluation, iteration, policy, out)
    else:
        stage.run(read(config), iteration, shard, policy, out)


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
    from earl.stages import score as stage

    if again_failed:
        failed, still = stage.run_again(read(config), rollouts, out)
        typer.echo(f"{out}: {failed} judgements had failed, {still} still have")
    else:
        stage.run(read(config), rollouts, out)


@app.command()
def train(config: ConfigFile, iteration: IterationIndex, run: RunFolder) -> None:
    """Derive rewards and advantages from the scores and train; by `train_processes` ranks, or those of torchrun."""
    from earl.config.load import read

    settings = read(config)
    _leave_to_ranks(settings, "train", "--config", config, "--iteration", iteration, "--run", run)
    from earl.stages import train as stage

    stage.run(settings, run, iteration)


def _leave_to_ranks(config: "Config", *arguments: object) -> None:
    """Have the `train_processes` ranks run this command, and end with their status; return where this is one, or alone.

    Raises:
        EarlError: see `ranks.launch`.
    """
    from earl.execution import ranks

    if config.train_processes > 1 and not ranks.is_launched():
        raise typer.Exit(ranks.launch(config, [str(argument) for argument in arguments], config.train_processes))


@app.command()
def restore(run: RunFolder, iteration: IterationIndex) -> None:
    """Bring back a dropped policy by training again over the stored scores."""
    from earl.stages import restore as stage

    stage.run(run, iteration)


@app.command()
def replay(
    run: Annotated[Path, typer.Option("--run", help="The run whose rollouts and scores to train on.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", callback=_run_folder, help="Folder of the new run, beside the other; its name is the run's."
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
def report(run: RunFolder, out: Output) -> None:
    """Write the run's report, one self-contained HTML file."""
    from earl.stages import report as stage

    stage.run(run, out)


BestEffort = Annotated[
    bool, typer.Option("--best-effort", help="Warn instead of failing; the next call sends what is missing.")
]
Record = Annotated[Path | None, typer.Option("--out", callback=output, help="Also write what was done as JSON.")]


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
    from earl.run.layout import Run
    from earl.tracking import page

    folder = Run(run)
    config = read(folder.config)
    config = config.model_copy(update={"wandb_mode": "online"}) if online else config
    tracking.attempt(lambda: page.send(folder, config), best_effort, out)


@app.command()
def push(run: RunFolder, best_effort: BestEffort = False, out: Record = None) -> None:
    """Push the run's policies to the Hugging Face hub, as far as the configuration says and it is not done."""
    from earl import tracking
    from earl.config.load import read
    from earl.run.layout import Run
    from earl.tracking import hub

    folder = Run(run)
    tracking.attempt(lambda: hub.push(folder, read(folder.config)), best_effort, out)


@app.command()
def start(run: RunFolder, policy: Annotated[Path, typer.Option(help="Folder of the starting policy.")]) -> None:
    """Link a run's starting policy as its iteration 0."""
    from earl.run import state
    from earl.run.layout import Run

    state.start(Run(run), policy)


@app.command()
def verify(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(callback=output, help="Also write the findings as JSON.")] = None,
    deep: Annotated[bool, typer.Option(help="Also compare every file with its recorded digest.")] = False,
) -> None:
    """Check that every file of a run is there, made from what it says by the present configuration and code."""
    from earl.run import verify as verification
    from earl.run.layout import Run

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
    from earl.run import state
    from earl.run.layout import Run

    folder = Run(run)
    retention = state.Retention.of(read(folder.config))
    with state.exclusive(folder):
        for index in state.prune(folder, retention, after):
            typer.echo(f"dropped the checkpoint of iteration {index}")


@app.command()
def rewind(run: RunFolder, iteration: Annotated[int, typer.Option("--iteration", min=1)]) -> None:
    """Forget what was trained in an iteration and after it, so that the next call trains from there again."""
    from earl.run import state
    from earl.run.layout import Run

    folder = Run(run)
    with state.exclusive(folder):
        gone = state.rewind(folder, iteration)
    typer.echo(f"iterations {gone[0]} to {gone[-1]} are to be trained again")


@app.command()
def status(run: RunFolder) -> None:
    """Print how far a run is and which checkpoints it holds."""
    from earl.config.load import read
    from earl.run import state
    from earl.run.layout import Run

    folder = Run(run)
    typer.echo(state.status(folder, read(folder.config).num_iterations).text())


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="A run's <run>/config.json: says the judge and the folder.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Folder for the files of runs.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's address, or the file that holds it.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that are to be visible.")] = None,
    minimum_free: Annotated[float, typer.Option(min=0, help="GiB that are to be free.")] = 10.0,
) -> None:
    """Check this node, or all nodes of several ranks, as a stage would find it."""
    from earl.run import doctor as checks

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


@app.command()
def launch(
    command: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    launcher: Annotated[str, typer.Option(help="local, debug, slurm or workers.")],
    name: Annotated[str, typer.Option(help="Short name of the job.")],
    folder: Annotated[Path, typer.Option(help="The job's own folder, for its record and logs.")],
    output: Annotated[list[Path] | None, typer.Option(help="A file that it makes; may be repeated.")] = None,
    resource: Annotated[list[str] | None, typer.Option(help="name=value; may be repeated.")] = None,
) -> None:
    """Run a command somewhere else, a stage's as a rule, or wait for it where it already runs."""
    from earl import launchers
    from earl.launchers.job import Job, Resources

    job = Job(name, command, folder, output or [], Resources.parse(resource or []))
    raise typer.Exit(launchers.create(launcher).run(job))


@app.command(hidden=True)
def worker(
    pool: Annotated[Path, typer.Option(help="Folder of the pool that a workflow has opened.")],
    name: Annotated[str, typer.Option(help="engine-<n>, judge-<n> or learner-<n>.")],
    host: Annotated[str | None, typer.Option(help="Address to listen at for other machines.")] = None,
) -> None:
    """Stay, and run stages on what is in memory already; the first stage that wants a worker starts it."""
    from earl.workers import server

    server.serve(str(pool), name, host)


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the system that a user can mend, wherever they appear."""


def call(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; mistakes that a user can mend end in one line and status 2."""
    try:
        app(list(arguments), prog_name="earl")
    except EarlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; free space or check permissions, then try again", file=sys.stderr)
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def main() -> None:
    """Run the command line in this process."""
    console.set_up()
    processes.name_user()
    processes.end_with_workflow()
    if "LOCAL_RANK" in os.environ:
        processes.end_with(os.getppid())  # torchrun ends ranks, unless it is killed itself
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may be no UTF-8
    status = call(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:
        processes.end_at_once(status)
    sys.exit(status)
