"""Random access to tokenised data sets: folders of Parquet files, one Parquet file, or the reference's format.

Rows are read by row group, and a few groups are held; so millions of rows with images cost no more memory than some.
"""

import bisect
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from earl.data.example import CODEBOOK_SIZE, Dataset, Example, grid
from earl.data.reference import ReferenceDataset
from earl.errors import EarlError
from earl.files import manifest, tables

_HELD_BYTES = 64 * 2**20
_IMAGES = ("original", "target")

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
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

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
        group = self._groups[index]
        within = row - (self._ends[index] - group.rows)
        values = self._table(index).slice(within, 1).to_pylist()[0]
        return self._example(values, f"{group.file}: row {group.start + within}")

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

    def _table(self, index: int) -> pa.Table:
        """Return a row group, held from an earlier call or read."""
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        group = self._groups[index]
        self._held[index] = tables.read_group(group.file, tables.TOKENISED, self._columns, group.index)
        while len(self._held) > 1 and sum(table.nbytes for table in self._held.values()) > _HELD_BYTES:
            self._held.popitem(last=False)
        return self._held[index]

    def _example(self, values: dict[str, Any], where: str) -> Example:
        def tokens(column: str) -> Any:
            return grid(values[column], f"{where}, column {column!r}", self._codebook_size)

        def image(column: str) -> bytes | None:
            return (values.get(column) or {}).get("bytes")

        reasoning = values["reasoning"]
        return Example(
            dataset=values["dataset"],
            example_id=values["example_id"],
            task=values["task"],
            instruction=values["instruction"],
            reasoning=None if reasoning is None else [(item["key"], item["value"]) for item in reasoning],
            original_tokens=tokens("original_tokens"),
            target_tokens=None if values["target_tokens"] is None else tokens("target_tokens"),
            original=image("original"),
            target=image("target"),
        )


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    manifest.check(path)
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise EarlError(f"{path}: holds no Parquet file; give the folder that `earl tokenise` wrote")
    return files
