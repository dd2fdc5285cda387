"""Size and load time of tokenised data: the reference's archives, one pickle an example, beside ours.

The archives are made up in the reference's form, of its usual size: two grids of 32 x 32 ids as int64 tensors, an
instruction, and optionally a chain of thought. Ids are drawn uniformly, the worst case for any compression. Loading is
measured from files that the system has in memory, in examples per CPU second: row by row in order, shuffled, and
shuffled with the rows' groups forgotten at once, as in a data set much larger than what is held; and whole files into
arrays of the stored ids, unchecked, which an archive an example cannot do any other way than row by row. Both are read
in turn; figures are medians, ratios those of the pairs, with the least and the greatest.

    python benchmarks/data.py --examples 8192
    python benchmarks/data.py --unpacking       # what a grid costs in other ways to store it
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from earl.data import convert, shards, tokenised
from earl.data.grids import stored
from earl.data.tokenised import open_dataset
from earl.files import tables

SIDE, CODES = 32, 32768
WORDS = (
    "remove",
    "add",
    "the",
    "a",
    "red",
    "cat",
    "dog",
    "left",
    "of",
    "table",
    "next",
    "to",
    "colour",
    "house",
    "sky",
)


def write_archives(folder: Path, examples: int, reasoning: bool) -> Path:
    """Write a data set in the reference's form and return its listing."""
    rng = np.random.default_rng(0)
    (folder / "feature").mkdir(parents=True)
    (folder / "list").mkdir()
    names = [f"{index}.pth" for index in range(examples)]
    for index, name in enumerate(names):
        grids = torch.from_numpy(rng.integers(0, CODES, (2, SIDE, SIDE)))
        thought = {"scene": words(rng, 60), "target": f"{words(rng, 6)} [12, 40, 200, 180]", "plan": words(rng, 60)}
        example = {
            "edit_id": str(index),
            "original_image": grids[0].clone(),
            "edited_image": grids[1].clone(),
            "instruction": words(rng, 10),
            "CoT": thought if reasoning else {},
        }
        torch.save(example, folder / "feature" / name)
    listing = folder / "list" / "tokenized_datalist.json"
    listing.write_text(json.dumps({"prefix": str(folder / "feature"), "path_list": names}))
    return listing


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), count))


def size(folder: Path) -> tuple[int, int]:
    """Return the bytes of a folder's files, and those that they take on the disk."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats), sum(stat.st_blocks * 512 for stat in stats)


def rate(load: Callable[[Sequence[int]], None], rows: Sequence[int]) -> float:
    """Return examples per CPU second."""
    start = time.process_time()
    load(rows)
    return len(rows) / (time.process_time() - start)


def measure(folder: Path, examples: int, repeats: int, reasoning: bool) -> list[str]:
    """Return the rows of the table for one kind of data set."""
    listing = write_archives(folder / "original", examples, reasoning)
    start = time.process_time()
    convert.run(listing, folder / "ours", CODES, "made-up", 0.0)
    seconds = time.process_time() - start
    features = folder / "original" / "feature"

    def original(rows: Sequence[int]) -> None:
        for row in rows:
            torch.load(features / f"{row}.pth", weights_only=False)

    def ours(rows: Sequence[int]) -> None:
        dataset = open_dataset(folder / "ours")
        for row in rows:
            dataset[row]

    def ours_unheld(rows: Sequence[int]) -> None:
        held, tokenised._HELD_BYTES = tokenised._HELD_BYTES, 0
        ours(rows)
        tokenised._HELD_BYTES = held

    def ours_whole(_: Sequence[int]) -> None:
        for file in sorted((folder / "ours" / "data").glob("*.parquet")):
            table = pq.read_table(file, use_threads=False)
            for name in ("original_tokens", "target_tokens"):
                ids = [chunk.field("ids").buffers()[2] for chunk in table.column(name).chunks]
                assert sum(len(np.frombuffer(part, "<u2").reshape(-1, SIDE, SIDE)) for part in ids) == len(table)

    in_order = range(examples)
    shuffled = np.random.default_rng(1).permutation(examples).tolist()
    loads = ((in_order, ours), (shuffled, ours), (shuffled, ours_unheld), (in_order, ours_whole))
    # In turn, since a machine's speed drifts; the first pair warms up.
    pairs = [[(rate(original, rows), rate(load, rows)) for _ in range(repeats + 1)][1:] for rows, load in loads]
    sizes = [size(path) for path in (features, folder / "ours")]
    label = "with reasoning" if reasoning else "without"
    lines = []
    for index, name in enumerate(("original", "ours")):
        values = [number / examples for number in sizes[index]]
        values += [statistics.median(pair[index] for pair in found) for found in pairs]
        lines.append(f"| {label} | {name} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    ratios = [f"{theirs / own:.1f}" for theirs, own in zip(*sizes, strict=True)]
    for found in pairs:
        quotients = sorted(own / theirs for theirs, own in found)
        ratios.append(f"{statistics.median(quotients):.1f} ({quotients[0]:.1f} to {quotients[-1]:.1f})")
    lines.append(f"| {label} | ratio | " + " | ".join(ratios) + " |")
    lines.append(f"converting: {examples / seconds:,.0f} examples per CPU second")
    return lines


def stored_ways(rows: int) -> dict[str, pa.Array]:
    """Return the same grids in the ways in which a column may hold them."""
    grids = np.random.default_rng(0).integers(0, CODES, (rows, SIDE, SIDE)).astype("<u2")

    def lists(values: pa.Array, size: int, required: bool) -> pa.Array:
        offsets = pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32))
        element = pa.field("element", values.type, nullable=not required)
        return pa.ListArray.from_arrays(offsets, values, type=pa.list_(element))

    flat = pa.array(grids.reshape(-1))
    return {
        "lists of lists": lists(lists(flat, SIDE, False), SIDE, False),
        "lists of lists without nulls": lists(lists(flat, SIDE, True), SIDE, True),
        "one list": lists(flat, SIDE * SIDE, False),
        "one list without nulls": lists(flat, SIDE * SIDE, True),
        "bytes": pa.array([grid.tobytes() for grid in grids]),
        "bytes with height and width": pa.array([stored(grid, CODES) for grid in grids], tables.TOKEN_GRID),
    }


def unpacking(rows: int = 64, repeats: int = 100) -> None:
    """Print the least CPU time in microseconds, and the bytes, that a grid of a row group takes, by way to store it.

    All with Zstandard, so that they differ in nothing else.
    """
    print("| a grid as | µs | bytes |", "|---|---|---|", sep="\n")
    for name, column in stored_ways(rows).items():
        file = io.BytesIO()
        # Of lists, the bytes of each id are put apart: the two that are always 0 vanish in the compression.
        split = ["grid" + ".list.element" * str(column.type).count("list<")] if "list" in name else False
        pq.write_table(
            pa.table({"grid": column}),
            file,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=split,
            write_statistics=False,
            write_page_checksum=True,
        )
        source = pq.ParquetFile(pa.BufferReader(file.getvalue()), page_checksum_verification=True)
        found = []
        for _ in range(repeats):
            start = time.process_time()
            source.read_row_group(0, use_threads=False)
            found.append(time.process_time() - start)
        print(f"| {name} | {min(found) / rows * 1e6:.1f} | {len(file.getvalue()) / rows:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows-per-group", type=int, default=shards.ROWS_OF_TOKENS)
    parser.add_argument("--unpacking", action="store_true")
    arguments = parser.parse_args()
    shards.ROWS_OF_TOKENS = arguments.rows_per_group
    if arguments.unpacking:
        unpacking()
        return
    torch.set_num_threads(1)
    print("| | | bytes an example | on the disk | in order | shuffled | shuffled, nothing held | whole files |")
    print("|---|---|---|---|---|---|---|---|")
    for reasoning in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(measure(Path(folder), arguments.examples, arguments.repeats, reasoning)), flush=True)


if __name__ == "__main__":
    main()
