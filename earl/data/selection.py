"""Which rows of a raw data set are its pairs: by their values, by chance, and put together from two rows each.

In the order of `datasets`: ``filter``, then ``shuffle(seed)`` and ``select(range(rows))``. Rows keep the order of their
files. Everything is a function of the files and these settings.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from earl.data import cells, places, row_files
from earl.data.cells import Unreadable
from earl.data.places import Place
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.sections import RawDataset

Value = str | int | bool
_SHOWN = 10
_REMEDY = "name one of its columns, or a field or an item in one"


@dataclass(frozen=True)
class Selection:
    """What the entry of ``raw_datasets`` says; see the fields of these names in `earl.config.sections.RawDataset`."""

    filter: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    """Place and the values of which one has to stand there."""
    subset: tuple[int, int] | None = None
    """Seed and number of rows."""
    pairing: tuple[str, str] | None = None
    """Places of a row's own id, and of the id of the row that holds its original image."""

    @classmethod
    def of(cls, entry: "RawDataset") -> "Selection":
        """Return the selection of an entry of ``raw_datasets``."""
        return cls(
            filter={name: wanted if isinstance(wanted, list) else [wanted] for name, wanted in entry.filter.items()},
            subset=entry.subset and (entry.subset.seed, entry.subset.rows),
            pairing=entry.pairing and (entry.pairing.image_id, entry.pairing.original_id),
        )

    @property
    def is_everything(self) -> bool:
        """Whether every row is taken as it stands."""
        return not (self.filter or self.subset or self.pairing)

    def settings(self) -> dict[str, Any]:
        """Return what it depends on, as JSON knows it."""
        return asdict(self)

    def places(self, file: Path, schema: pa.Schema) -> dict[str, Place]:
        """Return where the places that are named here are in a file, by their text.

        Raises:
            EarlError: naming file, place and the columns that there are.
        """
        named = {f"filter.{place}": place for place in self.filter}
        if self.pairing:
            named |= dict(zip(("pairing.image_id", "pairing.original_id"), self.pairing, strict=True))
        return {place: places.find(file, schema, place, name, _REMEDY) for name, place in named.items()}


def rows(files: Sequence[Path], counts: Sequence[int], selection: Selection) -> "tuple[np.ndarray, Originals | None]":
    """Return the selected rows, numbered through all files and ascending, and where their originals stand.

    Raises:
        EarlError: when a filter keeps no row, a subset is larger than what it is drawn from, two rows have one id, or
            no row names an original.
    """
    values = _values(files, selection)
    chosen = np.arange(sum(counts))
    originals = None
    if selection.pairing:
        originals = Originals(files, counts, *(values[place] for place in selection.pairing), *selection.pairing)
        chosen = originals.edits()
    for place, wanted in selection.filter.items():
        kept = [row for row in chosen.tolist() if _matches(values[place][row], wanted)]
        if not kept:
            found = _listed(values[place][row] for row in chosen.tolist())
            raise EarlError(f"{files[0]}: filter.{place} is {_listed(wanted)}, but no row has it; there is {found}")
        chosen = np.array(kept)
    if selection.subset:
        seed, count = selection.subset
        if count > len(chosen):
            raise EarlError(f"{files[0]}: subset.rows is {count}, but there are only {len(chosen)} rows to draw from")
        # As `datasets` does it, whose generator and permutation are numpy's.
        chosen = np.sort(chosen[np.random.default_rng(seed).permutation(len(chosen))[:count]])
    return chosen, originals


def _values(files: Sequence[Path], selection: Selection) -> dict[str, list[Any]]:
    """Return the values at each place that a selection names, of all rows of all files."""
    values: dict[str, list[Any]] = {}
    for file in files:
        with row_files.open_file(file) as source:
            found = selection.places(file, source.schema)
        read = row_files.read_values(file, sorted({place.column for place in found.values()})) if found else []
        for name, place in found.items():
            values.setdefault(name, []).extend(place.value(row) for row in read)
    return values


class Originals:
    """Pairs of a data set that has one image a row: an edit names the row of its original."""

    def __init__(
        self,
        files: Sequence[Path],
        counts: Sequence[int],
        image_ids: Sequence[Any],
        original_ids: Sequence[Any],
        image_id: str,
        original_id: str,
    ) -> None:
        self._files = files
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._original_ids = [_id(value) for value in original_ids]
        self._rows: dict[str, int] = {}
        for number, value in enumerate(image_ids):
            name = _id(value)
            if isinstance(name, str) and self._rows.setdefault(name, number) != number:
                raise EarlError(f"{files[0]}: rows {self._rows[name]} and {number} both have {image_id} {name!r}")
        if not any(name is not None for name in self._original_ids):
            raise EarlError(f"{files[0]}: pairing.original_id is {original_id!r}, which is empty in every row")

    def edits(self) -> np.ndarray:
        """Return the rows that hold an edit."""
        return np.array([number for number, name in enumerate(self._original_ids) if name is not None])

    def problem(self, row: int) -> str | None:
        """Return why a row has no original, None where it has one."""
        name = self._original_ids[row]
        if isinstance(name, Unreadable):
            return f"no original: its id cannot be read: {name.reason}"
        return None if name in self._rows else f"no original: no row has the id {name}"

    def read(self, rows: Sequence[int], place_in: Callable[[Path], Place]) -> dict[int, Any]:
        """Return what stands at a place, which may differ from file to file, of the originals of some rows, by row."""
        wanted = {row: self._rows[self._original_ids[row]] for row in rows if self.problem(row) is None}
        numbers = np.unique(list(wanted.values())).astype(np.int64)
        found: dict[int, Any] = {}
        for index in np.unique(np.searchsorted(self._starts, numbers, side="right") - 1).tolist():
            start, end = self._starts[index : index + 2].tolist()
            inside = numbers[(numbers >= start) & (numbers < end)] - start
            place = place_in(self._files[index])
            for part, table in row_files.read(self._files[index], inside, [place.column], len(inside)):
                values = (place.value(row) for row in cells.rows(table))
                found |= dict(zip((start + number for number in part), values, strict=True))
        return {row: found[original] for row, original in wanted.items()}


def _matches(value: Any, wanted: Sequence[Value]) -> bool:
    # True is 1 in Python, and no number in a configuration.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


def _listed(values: Iterable[Any]) -> str:
    shown = sorted({repr(value) for value in values})
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _id(value: Any) -> str | Unreadable | None:
    """Return an id as text; None where there is none, which pandas writes as NaN and CSV as an empty text."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Unreadable):
        return value
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
