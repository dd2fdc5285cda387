"""`earl judge`: check a judge, ask it again, serve it."""

from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import ConfigFile, RunFolder, output

app = typer.Typer(help="Judges: check one, start a server.", no_args_is_help=True)


@app.command("check")
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
    from earl.config.sections import JudgeGate
    from earl.judges import check
    from earl.run import claims

    settings = read(config)
    claims.claim(settings, "score")
    given = {"pairs": pairs and str(pairs), "examples": examples, "minimum_accuracy": minimum}
    gate = (settings.judge_gate or JudgeGate()).model_copy(update={k: v for k, v in given.items() if v is not None})
    found = check.run(settings, gate, (price_in, price_out) if price_in or price_out else None)
    typer.echo(check.text(found))
    check.check(found, gate, settings.max_failed_fraction)
    if out is not None:
        check.write(found, out)


@app.command("again")
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


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="GPUs to split the model over; else by the size in its name, 4 for 72B.")
    ] = None,
    context_size: Annotated[int, typer.Option(min=1, help="Longest question and answer, in tokens.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    startup: Annotated[float, typer.Option(help="Seconds that the server may take to come up.")] = 1800.0,
) -> None:
    """Run a judge server, which several runs may share; what follows `--` goes to vLLM's server as it is."""
    from earl.config import defaults
    from earl.execution import gpus
    from earl.judges import server

    on_cpu = server.is_cpu_build()
    fields = {"reward_function_api_model_name": model, "dtype": dtype, "device": "cpu" if on_cpu else "cuda"}
    split = tensor_parallel_size or defaults.judge_gpus(fields)
    gpus.claim(0 if on_cpu else split)
    port = port or server.free_port()
    options = server.engine_options(revision, dtype, context_size, split, on_cpu)
    arguments = server.command(model, host, port, options, context.args)
    raise typer.Exit(server.serve(arguments, host, port, host_file, startup))
