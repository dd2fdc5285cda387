"""Grids of visual tokens: checked, and in the form in which Parquet files hold them.

A cell is a struct of height, width and the ids as bytes: row by row, little-endian unsigned integers of 1, 2 or 4
bytes, the fewest that hold the codebook. `numpy.frombuffer(ids, '<u2').reshape(height, width)` reads one of a codebook
of 32,768. A list of ids would cost Parquet a repetition level for each of them, which take longer to read than the ids.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from earl.files import tables
from earl.messages.errors import EarlError

_ITEMSIZES = (1, 2, 4)
_LONGEST = 2**16 - 1


def grid(values: object, where: str, codebook_size: int | None) -> np.ndarray:
    """Return visual tokens as int64 [H, W].

    Args:
        values: Nested lists or an array.
        where: File, row and column, for messages.
        codebook_size: Tokens must lie in 0..codebook_size-1; None where it is not known.

    Raises:
        EarlError: when they are no grid of integers, or one lies outside the codebook.
    """
    try:
        tokens = np.asarray(values)
    except ValueError as error:
        raise EarlError(f"{where}: the rows of tokens differ in length; tokenise the example again") from error
    except (TypeError, RuntimeError) as error:
        raise EarlError(f"{where}: is no array of integers ({error}); tokenise the example again") from error
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or 0 in tokens.shape:
        raise EarlError(
            f"{where}: is an array {list(tokens.shape)} of {tokens.dtype} where a grid [H, W] of integers is expected"
        )
    outside = (tokens < 0) | (tokens >= codebook_size) if codebook_size is not None else tokens < 0
    if outside.any():
        limit = "must not be negative" if codebook_size is None else f"must lie in 0..{codebook_size - 1}"
        raise EarlError(
            f"{where}: token id {tokens[outside][0]} {limit}; the data were tokenised with another vision tokenizer"
        )
    return tokens.astype(np.int64)


def stored(tokens: np.ndarray, codebook_size: int) -> dict[str, int | bytes]:
    """Return the cell of `earl.files.tables.TOKEN_GRID` for tokens [H, W].

    Raises:
        ValueError: when a token lies outside 0..codebook_size-1, or the codebook takes more than 32 bits.
    """
    if tokens.min() < 0 or tokens.max() >= codebook_size:
        raise ValueError(f"tokens in {tokens.min()}..{tokens.max()} of a codebook of {codebook_size}")
    height, width = tokens.shape
    return {"height": height, "width": width, "ids": tokens.astype(_kind(codebook_size)).tobytes()}


def _kind(codebook_size: int) -> np.dtype:
    return np.dtype(tables.smallest_unsigned(codebook_size - 1).to_pandas_dtype()).newbyteorder("<")


class StoredGrids:
    """A column of cells, some of which may be null. They are checked together, and one by one where that fails."""

    def __init__(self, column: pa.StructArray, codebook_size: int | None, where: Callable[[int], str]) -> None:
        """Take over a column.

        Args:
            column: Of type `earl.files.tables.TOKEN_GRID`.
            codebook_size: Tokens must lie below it; None where it is not known.
            where: Tells for messages where the cell of a row stands: file, row and column.
        """
        self._column = column
        self._codebook_size = codebook_size
        self._itemsizes = _ITEMSIZES if codebook_size is None else (_kind(codebook_size).itemsize,)
        self._where = where
        self._known = column.is_valid().to_pylist()
        parts = dict(zip(column.type.names, column.flatten(), strict=True))
        heights, widths = (
            (sizes.fill_null(0) if sizes.null_count else sizes).to_numpy().astype(np.int64)
            for sizes in (parts["height"], parts["width"])
        )
        ids = parts["ids"] if pa.types.is_binary(parts["ids"].type) else parts["ids"].cast(pa.binary())
        areas = heights * widths
        shaped = (heights > 0) & (widths > 0) & (np.maximum(heights, widths) <= _LONGEST)
        whole = np.count_nonzero(shaped) == len(column) - column.null_count
        places = np.frombuffer(ids.buffers()[1], np.int32, len(ids) + 1, ids.offset * np.dtype(np.int32).itemsize)
        itemsize = (places[-1] - places[0]) // max(areas.sum(), 1)
        if whole and itemsize in self._itemsizes and (np.diff(places) == areas * itemsize).all():
            count = (places[-1] - places[0]) // itemsize
            self._tokens = np.frombuffer(ids.buffers()[2], f"<u{itemsize}", count, places[0])
            self._sound = codebook_size is None or int(self._tokens.max()) < codebook_size
            self._heights, self._widths = heights.tolist(), widths.tolist()
            self._starts = ((places - places[0]) // itemsize).tolist()
        else:
            self._sound = False

    def __getitem__(self, row: int) -> np.ndarray | None:
        """Return tokens int64 [H, W] that are the caller's own, or None where the cell is null.

        Raises:
            EarlError: when the bytes are no grid of this height and width, or a token lies outside the codebook.
        """
        if not self._known[row]:
            return None
        if not self._sound:
            return self._checked(row)
        tokens = self._tokens[self._starts[row] : self._starts[row + 1]]
        return tokens.reshape(self._heights[row], self._widths[row]).astype(np.int64)

    def _checked(self, row: int) -> np.ndarray:
        cell = self._column[row].as_py()
        height, width, ids = cell["height"] or 0, cell["width"] or 0, cell["ids"] or b""
        itemsize = len(ids) // max(height * width, 1)
        if min(height, width) < 1 or itemsize not in self._itemsizes or len(ids) != height * width * itemsize:
            raise EarlError(
                f"{self._where(row)}: {len(ids)} bytes are no grid of {height} x {width} ids; "
                "tokenise the example again"
            )
        tokens = np.frombuffer(ids, f"<u{itemsize}").reshape(height, width)
        return grid(tokens, self._where(row), self._codebook_size)
