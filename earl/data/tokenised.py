"""Random access to tokenised data sets: folders of Parquet files, one Parquet file, or the reference's format.

Rows are read by row group, and a few groups are held; so millions of rows with images cost no more memory than some.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from earl.data.example import CODEBOOK_SIZE, TOKENIZER_DIGEST, Dataset, Example
from earl.data.grids import StoredGrids
from earl.data.reference import ReferenceDataset
from earl.data.shards import DATA
from earl.files import manifest, remedies, tables
from earl.messages.errors import EarlError

_HELD_BYTES = 64 * 2**20
_OPEN_FILES = 64
_GRIDS = ("original_tokens", "target_tokens")
_IMAGES = ("original", "target")
_COLUMNS = (*tables.TOKENISED.names, *tables.COMPLETIONS)
"""In the order of the fields of `Example`."""

__all__ = ["CODEBOOK_SIZE", "Example", "TokenisedDataset", "open_dataset"]


def open_dataset(
    path: Path | str, codebook_size: int | None = None, images: bool = True, tokenizer: str | None = None
) -> Dataset:
    """Open a tokenised data set.

    Args:
        path: A sealed folder that holds Parquet files or `earl.data.shards.DATA` with them, this one in it, or one
            Parquet file, all of schema `earl.files.tables.TOKENISED` or `PREFERRED`; or the reference's
            ``tokenized_datalist.json``.
        codebook_size: Number of visual tokens of the policy; token ids must lie below it. By default the number that
            the files themselves state.
        images: Whether examples bring the images beside their tokens; without, reading is quicker.
        tokenizer: Digest of the policy's ``tokenizer.json``; completions must have been sampled with it. By default
            they may be of any.

    Raises:
        EarlError: naming the file, and the column where there is one, when something is missing, damaged, of the
            wrong type, or the data set is empty.
    """
    path = Path(path)
    if path.suffix == ".json":
        return ReferenceDataset(path, codebook_size)
    return TokenisedDataset(path, codebook_size, images, tokenizer)


@dataclass(frozen=True)
class _Group:
    """One row group: where it stands in which file."""

    file: Path
    index: int
    start: int
    rows: int
    columns: list[str]
    """Those that hold anything and are wanted."""

    def where(self, column: str, row: int) -> str:
        """Return how messages name a cell of this group."""
        return f"{self.file}: row {self.start + row}, column {column!r}"


class TokenisedDataset:
    """A tokenised data set in Parquet. See `open_dataset`."""

    def __init__(
        self,
        path: Path,
        codebook_size: int | None = None,
        images: bool = True,
        tokenizer: str | None = None,
    ) -> None:
        self.path = path
        wanted = [name for name in tables.TOKENISED.names if images or name not in _IMAGES]
        self._codebook_size = codebook_size
        self._groups: list[_Group] = []
        metadata: dict[str, str] = {}
        for file in _members(path):
            with tables.open_table(file, remedies.TOKENISED) as source:
                sampled = [name for name in tables.COMPLETIONS if name in source.schema_arrow.names]
                columns = [*wanted, *sampled]
                tables.check_columns(file, source.schema_arrow, tables.PREFERRED, columns, remedies.TOKENISED)
                metadata = tables.metadata_of(source)
                self._groups += _groups(file, source, columns)
            self._check_codebook(file, metadata)
            _check_tokenizer(file, metadata, tokenizer)
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
        table = tables.read_group(
            group.file, source, tables.PREFERRED, group.columns, group.index, group.start, remedies.TOKENISED
        )
        self._held[index] = _Rows(table, group, self._codebook_size)
        self._held_bytes += self._held[index].nbytes
        while len(self._held) > 1 and self._held_bytes > _HELD_BYTES:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        return self._held[index]

    def _source(self, file: Path) -> pq.ParquetFile:
        """Return an open file, whose footer takes longer to read than a row group."""
        if file not in self._open:
            self._open[file] = tables.open_table(file, remedies.TOKENISED)
        self._open.move_to_end(file)
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return self._open[file]


class _Rows:
    """A row group in the form that rows are handed out from: what can be done for all of them is done once.

    What is held for long are strings and buffers alone. A tuple for each row would have Python's garbage collector
    walk through all objects of the process every few thousand rows, which takes longer than reading them.
    """

    def __init__(self, table: pa.Table, group: _Group, codebook_size: int | None) -> None:
        """Take over a table of columns of `_COLUMNS`; those that hold nothing may be missing."""
        (batch,) = table.combine_chunks().to_batches()
        self.nbytes = batch.get_total_buffer_size()
        self._columns = [_cells(batch, name, group, codebook_size) for name in _COLUMNS]

    def example(self, row: int) -> Example:
        return Example(*[cells[row] for cells in self._columns])


class _Column(Protocol):
    """Values of a column by row."""

    def __getitem__(self, row: int) -> Any: ...


def _cells(batch: pa.RecordBatch, name: str, group: _Group, codebook_size: int | None) -> _Column:
    if name not in batch.schema.names:
        return [None] * len(batch)
    column = batch.column(name)
    if name in _GRIDS:
        return StoredGrids(column, codebook_size, partial(group.where, name))
    if name in _IMAGES:
        return _Pictures(column)
    if name == "reasoning":
        return _Reasoning(column, partial(group.where, name))
    if name in tables.COMPLETIONS:
        return _Ids(column)
    return column.to_pylist()


class _Pictures:
    def __init__(self, column: pa.StructArray) -> None:
        self._column = column

    def __getitem__(self, row: int) -> bytes | None:
        return (self._column[row].as_py() or {}).get("bytes")


class _Ids:
    def __init__(self, column: pa.ListArray) -> None:
        self._column = column

    def __getitem__(self, row: int) -> np.ndarray:
        return self._column[row].values.to_numpy().astype(np.int64)


class _Reasoning:
    def __init__(self, column: pa.ListArray, where: Callable[[int], str]) -> None:
        self._known = column.is_valid().to_pylist()
        self._starts = column.offsets.to_numpy().tolist()
        self._keys, self._texts = (column.values.field(name).to_pylist() for name in ("key", "value"))
        for texts in (self._keys, self._texts):
            if None in texts:
                row = bisect.bisect_right(self._starts, texts.index(None)) - 1
                raise EarlError(f"{where(row)}: has a key or a text that is null; tokenise the example again")

    def __getitem__(self, row: int) -> list[tuple[str, str]] | None:
        if not self._known[row]:
            return None
        pairs = slice(self._starts[row], self._starts[row + 1])
        return list(zip(self._keys[pairs], self._texts[pairs], strict=True))


def _check_tokenizer(file: Path, metadata: dict[str, str], expected: str | None) -> None:
    stated = metadata.get(TOKENIZER_DIGEST)
    if None not in (stated, expected) and stated != expected:
        raise EarlError(
            f"{file}: its completions were sampled with another tokenizer ({stated[:12]}) than the policy's "
            f"({expected[:12]}), so their ids mean something else; take a policy with the tokenizer of that run"
        )


def _groups(file: Path, source: pq.ParquetFile, wanted: list[str]) -> Iterator[_Group]:
    start = 0
    for index, columns in enumerate(tables.filled_columns(source, tables.PREFERRED, wanted)):
        rows = source.metadata.row_group(index).num_rows
        yield _Group(file, index, start, rows, columns)
        start += rows


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    rows = path / DATA if (path / DATA).is_dir() else path
    sealed = path.parent if path.name == DATA and not (path / manifest.NAME).is_file() else path
    if not (sealed / manifest.NAME).is_file():
        raise EarlError(
            f"{path}: has no {manifest.NAME}, so it is no tokenised data set, or not a complete one; "
            f"{remedies.TOKENISED.wrong}"
        )
    remedies.refuse_pointers(rows)
    manifest.check(sealed)
    files = sorted(rows.glob("*.parquet"))
    if not files:
        raise EarlError(f"{path}: holds no Parquet file; give the folder that `earl tokenise` wrote")
    return files
