"""Columns of stored grids, wherever they begin, and what may not be stored."""

import numpy as np
import pyarrow as pa
import pytest

from earl.data.grids import StoredGrids, stored
from earl.files import tables
from earl.messages.errors import EarlError


def where(row: int) -> str:
    return f"row {row}"


@pytest.mark.parametrize("codebook_size", [200, 32768, 2**20])
@pytest.mark.parametrize("known", [True, False])
def test_any_part_of_a_column_with_nulls(codebook_size: int, known: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (1, 7), None, (4, 4), (3, 2), None, (1, 1)]
    grids = [None if shape is None else rng.integers(0, codebook_size, shape) for shape in shapes]
    cells = [None if grid is None else stored(grid, codebook_size) for grid in grids]
    column = pa.array(cells, tables.TOKEN_GRID)
    for start in range(len(grids)):
        for end in range(start + 1, len(grids) + 1):
            found = StoredGrids(column[start:end], codebook_size if known else None, where)
            for row, grid in enumerate(grids[start:end]):
                assert (found[row] is None) == (grid is None)
                assert grid is None or (found[row].dtype == np.int64 and np.array_equal(found[row], grid))


@pytest.mark.parametrize("size", [-2, 0, 2**40])
def test_sizes_that_no_grid_has(size: int) -> None:
    kind = pa.struct([("height", pa.int64()), ("width", pa.int64()), ("ids", pa.binary())])
    column = pa.array(
        [{"height": size, "width": size, "ids": b"1234"}, {"height": 2, "width": 2, "ids": b"1234"}], kind
    )
    with pytest.raises(EarlError, match="row 0: 4 bytes are no grid"):
        StoredGrids(column, 256, where)[0]
    assert StoredGrids(column, 256, where)[1].tolist() == [[49, 50], [51, 52]]


@pytest.mark.parametrize(("token", "codebook_size"), [(256, 256), (-1, 256), (0, 2**32 + 1)])
def test_a_token_that_does_not_fit_is_not_stored(token: int, codebook_size: int) -> None:
    with pytest.raises(ValueError, match=r"codebook|32 bits"):
        stored(np.array([[token]]), codebook_size)
