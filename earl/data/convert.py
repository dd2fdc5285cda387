"""Convert: the reference's pre-tokenised archives to a folder of tokenised Parquet files, every id checked."""

import json
import sys
from pathlib import Path
from typing import Any

from earl import code_version
from earl.data.example import CODEBOOK_SIZE, Example
from earl.data.grids import stored
from earl.data.reference import ReferenceDataset
from earl.data.shards import Reject, ShardWriter
from earl.files import atomic, manifest, tables
from earl.messages.errors import EarlError

ROWS_PER_FILE = 8192


def run(listing: Path, out: Path, codebook_size: int, dataset: str | None, max_rejected_fraction: float) -> None:
    """Convert one data set.

    Args:
        listing: The reference's ``tokenized_datalist.json``.
        out: The folder to write (`earl.data.shards`). What was written before a kill is kept while listing, settings
            and code are the same; the archives themselves are not compared.
        codebook_size: Of the vision tokenizer that made the archives; every token id must lie below it.
        dataset: The data set's name, which every row gets; by default the reference's.
        max_rejected_fraction: Share of the archives that may be missing, damaged or hold a wrong id.

    Raises:
        EarlError: when more archives than that cannot be used, naming the last one and its field.
    """
    from tqdm import tqdm

    source = ReferenceDataset(listing, codebook_size)
    metadata = {
        "dataset": dataset or source.name,
        CODEBOOK_SIZE: str(codebook_size),
        "listing_digest": manifest.digest_file(listing),
    }
    made_from = json.dumps(metadata | {"code_version": code_version()}, sort_keys=True)
    with (
        atomic.resumable_folder(out, made_from) as unfinished,
        tqdm(total=len(source), desc=f"convert {metadata['dataset']}", unit="example", file=sys.stderr) as progress,
    ):
        writer = ShardWriter(unfinished, metadata, len(source), max_rejected_fraction, with_images=False)
        for number, rows in enumerate(_windows(len(source))):
            if not writer.is_done(number):
                writer.write(number, *_columns(source, rows, metadata["dataset"], codebook_size))
            progress.update(len(rows))
        writer.finish()
    print(f"convert {metadata['dataset']}: {writer.text()}", file=sys.stderr)


def _windows(count: int) -> list[range]:
    return [range(start, min(start + ROWS_PER_FILE, count)) for start in range(0, count, ROWS_PER_FILE)]


def _columns(
    source: ReferenceDataset, rows: range, dataset: str, codebook_size: int
) -> tuple[dict[str, list], list[Reject]]:
    examples: list[Example] = []
    rejects: list[Reject] = []
    for row in rows:
        try:
            examples.append(source[row])
        except EarlError as problem:
            # The message begins with the archive's path, which has a column of its own.
            name = source.file(row)
            reason = str(problem).removeprefix(f"{name}: ")
            rejects.append(Reject(name.name, row, None, None, f"cannot be used: {reason}"))
    columns: dict[str, list[Any]] = {name: [] for name in tables.TOKENISED.names}
    for example in examples:
        columns["dataset"].append(dataset)
        for name in ("example_id", "task", "instruction"):
            columns[name].append(getattr(example, name))
        pairs = example.reasoning
        columns["reasoning"].append(None if pairs is None else [{"key": key, "value": text} for key, text in pairs])
        columns["original_tokens"].append(stored(example.original_tokens, codebook_size))
        columns["target_tokens"].append(stored(example.target_tokens, codebook_size))
        columns["original"].append(None)
        columns["target"].append(None)
    return columns, rejects
