"""`earl convert`: models and data of other formats."""

from pathlib import Path
from typing import Annotated

import typer

from earl.cli.options import Output

app = typer.Typer(help="Models and data of other formats, turned into ours.", no_args_is_help=True)


@app.command("model")
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
    from earl.emu3 import published
    from earl.files.hub_names import Conversion

    published.make(Conversion(source, revision, tokenizer, vision), out)


@app.command("data")
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
    from earl.data import convert as stage

    stage.run(listing, out, codebook_size, dataset, max_rejected_fraction)
