"""Random access to tokenised data sets: folders of Parquet files, one Parquet file, or the reference's format.

Rows are read by row group, and a few groups are held; so millions of rows with images cost no more memory than some.
"""

import bisect
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from earl.data.example import CODEBOOK_SIZE, Dataset, Example, grid
from earl.data.reference import ReferenceDataset
from earl.errors import EarlError
from earl.files import manifest, tables

_HELD_BYTES = 64 * 2**20
_OPEN_FILES = 64
_GRIDS = ("original_tokens", "target_tokens")
_IMAGES = ("original", "target")
_TEXTS = ("dataset", "example_id", "task", "instruction", "reasoning")

__all__ = ["CODEBOOK_SIZE", "Example", "TokenisedDataset", "open_dataset"]


def open_dataset(path: Path | str, codebook_size: int | None = None, images: bool = True) -> Dataset:
    """Open a tokenised data set.

    Args:
        path: A sealed folder of Parquet files or one Parquet file, both of schema `earl.files.tables.TOKENISED`, or
            the reference's ``tokenized_datalist.json``.
        codebook_size: Number of visual tokens of the policy; token ids must lie below it. By default the number that
            the files themselves state.
        images: Whether examples bring the images beside their tokens; without, reading is quicker.

    Raises:
        EarlError: naming the file, and the column where there is one, when something is missing, damaged, of the
            wrong type, or the data set is empty.
    """
    path = Path(path)
    if path.suffix == ".json":
        return ReferenceDataset(path, codebook_size)
    return TokenisedDataset(path, codebook_size, images)


@dataclass(frozen=True)
class _Group:
    """One row group: where it stands in which file."""

    file: Path
    index: int
    start: int
    rows: int


class TokenisedDataset:
    """A tokenised data set in Parquet. See `open_dataset`."""

    def __init__(self, path: Path, codebook_size: int | None = None, images: bool = True) -> None:
        self.path = path
        self._columns = [name for name in tables.TOKENISED.names if images or name not in _IMAGES]
        self._codebook_size = codebook_size
        self._groups: list[_Group] = []
        metadata: dict[str, str] = {}
        for file in _members(path):
            with tables.open_table(file) as source:
                tables.check_columns(file, source.schema_arrow, tables.TOKENISED, self._columns)
                metadata = tables.metadata_of(source)
                rows = [source.metadata.row_group(index).num_rows for index in range(source.num_row_groups)]
            starts = accumulate(rows, initial=0)
            self._groups += [_Group(file, index, *place) for index, place in enumerate(zip(starts, rows, strict=False))]
            self._check_codebook(file, metadata)
        self._ends = list(accumulate(group.rows for group in self._groups))
        if not len(self):
            raise EarlError(f"{path}: the data set is empty; leave it out, or tokenise data with at least one row")
        self.name = metadata.get("dataset", path.stem)
        self._held: OrderedDict[int, _Rows] = OrderedDict()
        self._held_bytes = 0
        self._open: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Example:
        """Read one example.

        Raises:
            IndexError: when there is no such row.
            EarlError: naming file, row and column, when the row does not hold what it should.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        index = bisect.bisect_right(self._ends, row)
        return self._rows(index).example(row - (self._ends[index] - self._groups[index].rows))

    def _check_codebook(self, file: Path, metadata: dict[str, str]) -> None:
        stated = metadata.get(CODEBOOK_SIZE)
        if stated is None:
            return
        if not stated.isdigit():
            raise EarlError(f"{file}: metadata {CODEBOOK_SIZE} is {stated!r}, not a number; tokenise the data again")
        if self._codebook_size is None:
            self._codebook_size = int(stated)
        elif self._codebook_size != int(stated):
            raise EarlError(
                f"{file}: was tokenised with a codebook of {stated}, but {self._codebook_size} is expected; "
                "tokenise the data with the vision tokenizer of the policy"
            )

    def _rows(self, index: int) -> "_Rows":
        """Return a row group, held from an earlier call or read."""
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        group = self._groups[index]
        source = self._source(group.file)
        empty = tables.null_columns(source, tables.TOKENISED, group.index)
        columns = [name for name in self._columns if name not in empty]
        table = tables.read_group(group.file, source, tables.TOKENISED, columns, group.index)
        self._held[index] = _Rows(table, group, self._codebook_size)
        self._held_bytes += self._held[index].nbytes
        while len(self._held) > 1 and self._held_bytes > _HELD_BYTES:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        return self._held[index]

    def _source(self, file: Path) -> pq.ParquetFile:
        """Return an open file, whose footer takes longer to read than a row group."""
        if file not in self._open:
            self._open[file] = tables.open_table(file)
        self._open.move_to_end(file)
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return self._open[file]


class _Rows:
    """A row group in the form that rows are handed out from: what can be done for all of them is done once."""

    def __init__(self, table: pa.Table, group: _Group, codebook_size: int | None) -> None:
        """Take over a table of columns of `tables.TOKENISED`; those that hold nothing may be missing."""
        self.nbytes = table.nbytes
        known = set(table.column_names)
        absent = [None] * len(table)
        self._texts = [
            (*texts, None if reasoning is None else [(item["key"], item["value"]) for item in reasoning])
            for *texts, reasoning in zip(
                *(table.column(name).to_pylist() if name in known else absent for name in _TEXTS), strict=True
            )
        ]
        self._original, self._target = (
            _Grids(table.column(name).combine_chunks(), name, group, codebook_size) if name in known else absent
            for name in _GRIDS
        )
        self._images = [table.column(name) if name in known else None for name in _IMAGES]

    def example(self, row: int) -> Example:
        pictures = (None if column is None else (column[row].as_py() or {}).get("bytes") for column in self._images)
        return Example(*self._texts[row], self._original[row], self._target[row], *pictures)


class _Grids:
    """A column of lists of rows of tokens. Where all have one shape, they are checked together."""

    def __init__(self, column: pa.ListArray, name: str, group: _Group, codebook_size: int | None) -> None:
        self._name = name
        self._group = group
        self._codebook_size = codebook_size
        # A data set may know no targets.
        self._known = column.is_valid().to_pylist()
        lines = column.values
        self._lines = column.offsets.to_numpy()
        self._places = lines.offsets.to_numpy()
        self._tokens = lines.values.to_numpy(zero_copy_only=False)
        self._whole = self._stacked()
        self._sound = [False] * len(column)
        if self._whole is not None:
            flat = self._whole.reshape(len(column), -1)
            limit = np.inf if codebook_size is None else codebook_size
            self._sound = ((flat.min(axis=1) >= 0) & (flat.max(axis=1) < limit)).tolist()

    def __getitem__(self, index: int) -> np.ndarray | None:
        if self._sound[index]:
            return self._whole[index].astype(np.int64)
        if not self._known[index]:
            return None
        where = f"{self._group.file}: row {self._group.start + index}, column {self._name!r}"
        return grid(self._listed(index), where, self._codebook_size)

    def _stacked(self) -> np.ndarray | None:
        """Return the stored integers [rows, H, W], or None where shapes differ or there are no integers."""
        heights = np.diff(self._lines)
        widths = np.diff(self._places[self._lines[0] : self._lines[-1] + 1])
        one_shape = len(widths) and widths[0] and (heights == heights[0]).all() and (widths == widths[0]).all()
        if not one_shape or self._tokens.dtype.kind not in "iu":
            return None
        tokens = self._tokens[self._places[self._lines[0]] : self._places[self._lines[-1]]]
        return tokens.reshape(len(heights), heights[0], widths[0])

    def _listed(self, index: int) -> object:
        """Return an array [H, W], or a list where lines differ in length."""
        places = self._places[self._lines[index] : self._lines[index + 1] + 1]
        lines = [self._tokens[start:end] for start, end in pairwise(places)]
        return np.stack(lines) if len({len(line) for line in lines}) == 1 else lines


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    manifest.check(path)
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise EarlError(f"{path}: holds no Parquet file; give the folder that `earl tokenise` wrote")
    return files
