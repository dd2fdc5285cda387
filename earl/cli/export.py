"""`earl export`: a policy for others."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import Output
from earl.messages.errors import EarlError

app = typer.Typer()


class Dtype(StrEnum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def export(
    out: Output,
    run: Annotated[Path | None, typer.Option(help="Folder of the run whose policy it is.")] = None,
    iteration: Annotated[int | None, typer.Option(min=0, help="Of the run; by default the newest on disk.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Instead of --run: folder of a policy.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="With --policy: the experiment that it was trained by; by default that of its run."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; by default as they are.")] = None,
    causal_lm: Annotated[
        bool, typer.Option(help="Write the language model a second time, for AutoModelForCausalLM.")
    ] = True,
) -> None:
    """Write a policy with vision tokenizer, processor and model card, for transformers and vLLM without EARL."""
    from earl.stages import export as stage

    options = stage.Options(dtype and dtype.value, causal_lm)
    if run is not None and policy is None and config is None:
        stage.of_run(run, iteration, out, options)
    elif policy is not None and run is None and iteration is None:
        stage.of_folder(policy, config, out, options)
    else:
        raise EarlError("give either --run, with or without --iteration, or --policy, with or without --config")
