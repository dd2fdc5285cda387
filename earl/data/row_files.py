"""Rows of Parquet and Arrow files, by their number: only what is wanted is read.

Arrow files are those of Hugging Face's `datasets` (``save_to_disk`` and its cache): record batches in the streaming
format, or in the file format. They are mapped into memory, a record batch is what a row group is in Parquet.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from earl.data import cells
from earl.files import manifest, remedies, tables
from earl.messages.errors import EarlError

ARROW = ".arrow"
_FILE_FORMAT = b"ARROW1"


class RowFile(Protocol):
    """A file whose rows stand in groups."""

    schema: pa.Schema
    group_rows: list[int]

    def group(self, index: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a group in batches of at most ``rows``."""

    def digest(self) -> str:
        """Return a SHA-256 over the content; of Parquet, over the footer, where sizes and extremes stand."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_file(path: Path) -> RowFile:
    """Open a file of rows, which is Arrow where its name ends in ``.arrow`` and Parquet otherwise.

    Raises:
        EarlError: when it is missing or damaged.
    """
    return _Arrow(path) if path.suffix == ARROW else _Parquet(path)


def read(
    path: Path, wanted: Sequence[int] | np.ndarray, columns: Sequence[str], rows: int
) -> Iterator[tuple[list[int], pa.Table]]:
    """Yield the wanted rows of a file as tables of ``rows`` rows, the last one of what is left, with their numbers.

    Args:
        path: A Parquet or Arrow file.
        wanted: Numbers of rows in the file, ascending.
        columns: Those to read.
        rows: Rows at once.

    Raises:
        EarlError: naming the file and how far it could be read, when it is damaged.
    """
    numbers = np.asarray(wanted, dtype=np.int64)
    done = 0
    held: list[pa.RecordBatch] = []
    with open_file(path) as source:
        ends = np.cumsum(source.group_rows)
        try:
            for index in np.unique(np.searchsorted(ends, numbers, side="right")).tolist():
                start = int(ends[index]) - source.group_rows[index]  # number of the next row
                for batch in source.group(index, columns, rows):
                    inside = numbers[(numbers >= start) & (numbers < start + len(batch))] - start
                    start += len(batch)
                    if len(inside):
                        held.append(batch if len(inside) == len(batch) else batch.take(pa.array(inside)))
                    while sum(map(len, held)) >= rows:
                        table = pa.Table.from_batches(held)
                        yield numbers[done : done + rows].tolist(), table.slice(0, rows)
                        done += rows
                        held = table.slice(rows).to_batches()
                    if start > numbers[-1]:
                        break
        except (pa.ArrowInvalid, OSError) as error:
            raise EarlError(f"{path}: is damaged after row {start} ({error}); download it again") from error
    if held:
        yield numbers[done:].tolist(), pa.Table.from_batches(held)


def count(path: Path) -> int:
    """Return how many rows a file has, without reading them."""
    with open_file(path) as source:
        return sum(source.group_rows)


def read_values(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the values of some columns of all rows; what cannot be read is `earl.data.cells.Unreadable`."""
    return [row for _, table in read(path, range(count(path)), columns, 2**14) for row in cells.rows(table)]


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = tables.open_table(path, remedies.GIVEN)
        self.schema = self._source.schema_arrow
        found = self._source.metadata
        self.group_rows = [found.row_group(index).num_rows for index in range(found.num_row_groups)]

    def group(self, index: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        yield from self._source.iter_batches(rows, row_groups=[index], columns=list(columns))

    def digest(self) -> str:
        return manifest.digest_footer(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()


class _Arrow:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._map = pa.memory_map(str(path))
            head = self._map.read(len(_FILE_FORMAT))
            self._map.seek(0)
            if head == _FILE_FORMAT:
                reader = pa.ipc.open_file(self._map)
                self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(self._map)
                self._batches = list(reader)
        except FileNotFoundError as error:
            raise EarlError(f"{path}: does not exist; {remedies.GIVEN.missing}") from error
        except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError, OSError) as error:
            damaged = f"is not a complete Arrow file ({error}); {remedies.GIVEN.damaged}"
            raise EarlError(f"{path}: {_other_than_arrow(path) or damaged}") from error
        self.schema = reader.schema
        self.group_rows = [len(batch) for batch in self._batches]

    def group(self, index: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        batch = self._batches[index].select(list(columns))
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise EarlError(f"{self._path}: record batch {index} is damaged ({error}); download it again") from error
        for start in range(0, len(batch), rows):
            yield batch.slice(start, rows)

    def digest(self) -> str:
        return manifest.digest_file(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _other_than_arrow(path: Path) -> str | None:
    with path.open("rb") as stream:
        is_arrow = _FILE_FORMAT.startswith(stream.read(len(_FILE_FORMAT)))  # or it is cut
    return None if is_arrow else remedies.described(path)
