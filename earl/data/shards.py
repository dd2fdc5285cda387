"""Writing a tokenised data set shard by shard, so that a killed writer goes on where it stopped.

::

    data/0000.parquet         rows that were kept, schema `earl.files.tables.TOKENISED`, and nothing else: readers of
                              Parquet folders take whatever else there is for rows, or stop at it
    _rejected/0000.parquet    rows that were not kept, and why
    summary.json              how many of both, by reason
    README.md                 tells `datasets` that rows are in data/ alone, here or on the hub
    manifest.json             seals the folder
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from earl.files import atomic, manifest, tables
from earl.messages.errors import EarlError

DATA = "data"
REJECTED = "_rejected"
SUMMARY = "summary.json"
CARD = f"---\nconfigs:\n- config_name: default\n  data_files: {DATA}/*.parquet\n---\n"
# Of a row group, the least that a reader reads. Each costs a quarter of a millisecond beside its rows: many make order
# quick, few a row from anywhere. Images of 256 x 256 pixels take longer than that.
ROWS_OF_TOKENS = 128
ROWS_WITH_IMAGES = 32


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    file: str
    row: int
    example_id: str | None
    column: str | None
    reason: str


class ShardWriter:
    """Fills the folder of one tokenised data set; a shard that is there already is not written again."""

    def __init__(
        self, folder: Path, metadata: Mapping[str, str], rows: int, max_rejected_fraction: float, with_images: bool
    ) -> None:
        """Begin, or go on.

        Args:
            folder: From `earl.files.atomic.resumable_folder`.
            metadata: For every shard.
            rows: How many the data set has, kept or rejected.
            max_rejected_fraction: Share of ``rows`` that may be rejected.
            with_images: Whether rows hold images beside their tokens, of which few make a row group large.
        """
        self.folder = folder
        self.rejected: Counter[str] = Counter()
        self.kept = 0
        self._metadata = metadata
        self._rows = rows
        self._allowed = int(max_rejected_fraction * rows)
        self._rows_per_group = ROWS_WITH_IMAGES if with_images else ROWS_OF_TOKENS

    def is_done(self, number: int) -> bool:
        """Return whether a shard is there, and count it."""
        if not self._shard(number).is_file():
            return False
        with tables.open_table(self._shard(number)) as shard:
            kept = shard.metadata.num_rows
        rejects = []
        if self._reject_file(number).is_file():
            rows = tables.read_table(self._reject_file(number), tables.REJECTED).to_pylist()
            rejects = [Reject(**row) for row in rows]
        self._count(kept, rejects)
        return True

    def write(self, number: int, columns: Mapping[str, Sequence], rejects: Sequence[Reject]) -> None:
        """Write one shard, its rejected rows first: the shard says that both are there.

        Raises:
            EarlError: when more rows are rejected by now than may be.
        """
        if rejects:
            values = {name: [getattr(reject, name) for reject in rejects] for name in tables.REJECTED.names}
            self._reject_file(number).parent.mkdir(exist_ok=True)
            tables.write_table(self._reject_file(number), tables.REJECTED, values, {})
        self._shard(number).parent.mkdir(exist_ok=True)
        tables.write_table(
            self._shard(number), tables.TOKENISED, columns, self._metadata, rows_per_group=self._rows_per_group
        )
        self._count(len(columns["example_id"]), rejects)

    def finish(self) -> str:
        """Write the summary and seal the folder; return its digest.

        Raises:
            EarlError: when no row was kept.
        """
        if not self.kept:
            raise EarlError(f"{self.folder}: no row is left; {self._reasons()}")
        summary = {"rows": self._rows, "kept": self.kept, "rejected": dict(sorted(self.rejected.items()))}
        atomic.write_text(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        atomic.write_text(self.folder / "README.md", CARD)
        return manifest.seal(self.folder)

    def text(self) -> str:
        """Return the counts as a line for people."""
        return f"{self.kept:,} of {self._rows:,} rows kept" + (f"; {self._reasons()}" if self.rejected else "")

    def _count(self, kept: int, rejects: Sequence[Reject]) -> None:
        self.kept += kept
        self.rejected.update(reject.reason.partition(":")[0] for reject in rejects)
        if self.rejected.total() > self._allowed:
            last = rejects[-1]
            column = f", column {last.column!r}" if last.column else ""
            raise EarlError(
                f"{self._reasons()}, more than max_rejected_fraction allows ({self._allowed} of {self._rows}); the "
                f"last is {last.file}: row {last.row}{column}: {last.reason}. Repair or remove the rows that "
                f"{self.folder / REJECTED} lists, or raise max_rejected_fraction"
            )

    def _reasons(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        total = self.rejected.total()
        return f"{total} {'row' if total == 1 else 'rows'} rejected ({counts})"

    def _shard(self, number: int) -> Path:
        return self.folder / DATA / f"{number:04d}.parquet"

    def _reject_file(self, number: int) -> Path:
        return self.folder / REJECTED / f"{number:04d}.parquet"
