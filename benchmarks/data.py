"""Size and load time of tokenised data: the reference's archives, one pickle an example, beside ours.

The archives are made up in the reference's form, of its usual size: two grids of 32 x 32 ids as int64 tensors, an
instruction, and optionally a chain of thought. Ids are drawn uniformly, the worst case for any compression. Loading is
measured from files that the system has in memory, in examples per CPU second: row by row in order, shuffled, and
shuffled with the rows' groups forgotten at once, as in a data set much larger than what is held; and whole files into
arrays, which an archive an example cannot do any other way than row by row.

    python benchmarks/data.py --examples 8192
    python benchmarks/data.py --unpacking       # what a grid costs in other ways to store it
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from earl.data import tokenised
from earl.data.grids import stored
from earl.data.tokenised import open_dataset
from earl.files import tables
from earl.stages import convert

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


def rate(load: Callable[[Iterable[int]], None], rows: Iterable[int], count: int, repeats: int) -> float:
    """Return examples per CPU second, the median of repeats after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.process_time()
        load(rows)
        found.append(count / (time.process_time() - start))
    return statistics.median(found[1:])


def measure(folder: Path, examples: int, repeats: int, reasoning: bool) -> list[str]:
    """Return the rows of the table for one kind of data set."""
    listing = write_archives(folder / "original", examples, reasoning)
    start = time.process_time()
    convert.run(listing, folder / "ours", CODES, "made-up", 0.0)
    seconds = time.process_time() - start
    features = folder / "original" / "feature"

    def original(rows: Iterable[int]) -> None:
        for row in rows:
            torch.load(features / f"{row}.pth", weights_only=False)

    def ours(rows: Iterable[int]) -> None:
        dataset = open_dataset(folder / "ours")
        for row in rows:
            dataset[row]

    def ours_unheld(rows: Iterable[int]) -> None:
        held, tokenised._HELD_BYTES = tokenised._HELD_BYTES, 0
        ours(rows)
        tokenised._HELD_BYTES = held

    def ours_whole(_: Iterable[int]) -> None:
        for file in sorted((folder / "ours").glob("*.parquet")):
            table = pq.read_table(file, use_threads=False)
            for name in ("original_tokens", "target_tokens"):
                for chunk in table.column(name).chunks:
                    np.frombuffer(chunk.field("ids").buffers()[2], "<u2").reshape(-1, SIDE, SIDE)

    in_order = range(examples)
    shuffled = np.random.default_rng(1).permutation(examples).tolist()
    kinds = {
        "original": (features, (original,) * 3),
        "ours": (folder / "ours", (ours, ours, ours_unheld)),
    }
    figures = {
        name: (
            *(number / examples for number in size(path)),
            *(
                rate(load, rows, examples, repeats)
                for load, rows in zip(loads, (in_order, shuffled, shuffled), strict=True)
            ),
            rate(ours_whole if name == "ours" else original, in_order, examples, repeats),
        )
        for name, (path, loads) in kinds.items()
    }
    label = "with reasoning" if reasoning else "without"
    lines = [
        f"| {label} | {name} | " + " | ".join(f"{value:,.0f}" for value in values) + " |"
        for name, values in figures.items()
    ]
    ratios = [a / b for a, b in zip(figures["original"][:2], figures["ours"][:2], strict=True)]
    ratios += [b / a for a, b in zip(figures["original"][2:], figures["ours"][2:], strict=True)]
    lines.append(f"| {label} | ratio | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")
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
        "bytes with height and width, as stored": pa.array([stored(grid, CODES) for grid in grids], tables.TOKEN_GRID),
    }


def unpacking(rows: int = 64, repeats: int = 100) -> None:
    """Print the least CPU time in microseconds, and the bytes, that a grid of a row group takes, by way to store it."""
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unpacking", action="store_true")
    arguments = parser.parse_args()
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
