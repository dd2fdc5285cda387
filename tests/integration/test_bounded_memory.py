"""A million examples are mixed, sampled and read without being held."""

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from earl.data import mixing
from earl.data.tokenised import open_dataset
from earl.files import tables

ROWS = 1_000_000


def peak_of(work) -> int:
    """Return the most bytes that Python held at once while it worked, beyond what there was before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_mixing_and_sampling_hold_no_rows() -> None:
    def sample() -> None:
        mixture = mixing.mixture([ROWS, 300_000, 50_000], [1.55, 0.7, 6], seed=0)
        assert len(mixture) == 1_550_000 + 210_000 + 300_000
        # Rows from all over: whole repeats, random fractions, the last one.
        for index in islice(range(len(mixture)), 0, None, 1000):
            mixture[index]
        for iteration in range(20):
            mixing.prompts(mixture, 0, iteration, 16)

    sample()
    # A list of two million numbers would take 16 MB.
    assert peak_of(sample) < 100_000


@pytest.mark.slow
def test_rows_of_a_million_are_read_in_bounded_memory(tmp_path: Path) -> None:
    ids = pa.array(np.arange(ROWS) % 251, pa.uint8()).view(pa.binary(1)).cast(pa.binary())
    ones = pa.array(np.ones(ROWS, np.uint16))
    grids = pa.StructArray.from_arrays([ones, ones, ids], ["height", "width", "ids"])
    names = pa.array(np.arange(ROWS)).cast(pa.string())
    columns = {
        name: pa.nulls(ROWS, field.type) for name, field in zip(tables.TOKENISED.names, tables.TOKENISED, strict=True)
    }
    columns |= {"dataset": pa.array(["d"] * ROWS), "example_id": names, "instruction": names}
    columns |= {"original_tokens": grids, "target_tokens": grids}
    path = tmp_path / "a.parquet"
    tables.write_table(path, tables.TOKENISED, columns, {"codebook_size": "256"}, rows_per_group=512)
    del columns, names, grids, ids, ones
    before = pa.total_allocated_bytes()

    def read() -> None:
        dataset = open_dataset(path)
        assert len(dataset) == ROWS
        mixture = mixing.mixture([ROWS], [1.0], seed=0)
        for iteration in range(30):
            for _, row in mixing.prompts(mixture, 0, iteration, 16):
                example = dataset[row]
                assert (example.example_id, example.original_tokens.tolist()) == (str(row), [[row % 251]])
        assert pa.total_allocated_bytes() - before < 96 * 2**20

    # The rows themselves, as Python objects, would take hundreds of megabytes.
    assert peak_of(read) < 96 * 2**20
