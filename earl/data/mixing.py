"""Mixing data sets by coefficients, and the prompts of an iteration.

Nothing is held but the sizes: a row of the mixture is computed from its number, a random subset is the front of a
keyed permutation, and an iteration's prompts follow from (seed, iteration). So memory does not grow with the data,
and going on with a run replays no draws. Errors do not say which field names the data sets: callers do.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, islice

from earl.messages.errors import EarlError
from earl.statistics import seeds

Row = tuple[int, int]
"""Index of a data set, and of a row in it."""
_ROUNDS = 8


@dataclass(frozen=True)
class Part:
    """One data set's share of a mixture: all of its rows ``repeats`` times, then ``extra`` random ones."""

    size: int
    repeats: int
    extra: int

    def __len__(self) -> int:
        return self.size * self.repeats + self.extra

    @property
    def distinct(self) -> int:
        """Number of different rows."""
        return self.size if self.repeats else self.extra


@dataclass(frozen=True)
class Mixture:
    """A sequence of rows of several data sets, as long as the parts together; item i is (data set, row)."""

    parts: tuple[Part, ...]
    seed: int

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        dataset = bisect.bisect_right(self._ends, index)
        part = self.parts[dataset]
        index -= self._ends[dataset] - len(part)
        whole = part.size * part.repeats
        if index < whole:
            return dataset, index % part.size
        return dataset, permuted(index - whole, part.size, "mixture", self.seed, dataset)

    @property
    def distinct(self) -> int:
        """Number of different rows."""
        return sum(part.distinct for part in self.parts)

    def rows(self) -> Iterator[Row]:
        """Yield the different rows, one data set after the other."""
        for dataset, part in enumerate(self.parts):
            extra = (permuted(index, part.size, "mixture", self.seed, dataset) for index in range(part.extra))
            yield from ((dataset, row) for row in (range(part.size) if part.repeats else extra))


def mixture(sizes: Sequence[int], coefficients: Sequence[float], seed: int) -> Mixture:
    """Mix data sets.

    Args:
        sizes: Rows of each data set.
        coefficients: One for each, c > 0: c >= 1 repeats the rows floor(c) times and adds a random fraction
            c - floor(c) of them, c < 1 takes a random fraction c, both to the nearest row. An empty list upsamples
            every data set to the largest.
        seed: Which rows the random fractions hold.

    Raises:
        EarlError: for an empty data set, coefficients of another number than data sets, one that is not positive, or
            a mixture without rows.
    """
    if not sizes:
        raise EarlError("there is no data set to draw from")
    if coefficients and len(coefficients) != len(sizes):
        raise EarlError(
            f"{len(coefficients)} coefficients for {len(sizes)} data sets; give one for each, or an empty list to "
            "upsample all to the largest"
        )
    for index, size in enumerate(sizes):
        if size < 1:
            raise EarlError(f"data set {index} has no rows; remove it or make it again")
    for coefficient in coefficients:
        if not 0 < coefficient < float("inf"):
            raise EarlError(f"the coefficient {coefficient} is not a positive number")
    # The shortest decimal text is what the user wrote: 3.7 means 37/10, though the nearest float is a little more.
    shares = [Fraction(repr(c)) for c in coefficients] or [Fraction(max(sizes), size) for size in sizes]
    parts = tuple(_part(size, share) for size, share in zip(sizes, shares, strict=True))
    if not sum(map(len, parts)):
        raise EarlError("the coefficients leave no row of any data set; raise them")
    return Mixture(parts, seed)


def draws(mixture: Mixture, seed: int, iteration: int) -> Iterator[Row]:
    """Yield the different rows of a mixture in the order of an iteration's draws, from (seed, iteration) alone.

    No row comes twice, though its data set be repeated in the mixture; a repeated data set comes first more often.
    """
    seen: set[Row] = set()
    for index in range(len(mixture)):
        row = mixture[permuted(index, len(mixture), "prompts", seed, iteration)]
        if row not in seen:
            seen.add(row)
            yield row


def prompts(mixture: Mixture, seed: int, iteration: int, count: int) -> list[Row]:
    """Draw the prompts of an iteration: the first ``count`` of `draws`.

    Raises:
        EarlError: when the mixture has fewer different rows than ``count``.
    """
    check_rows(mixture.distinct, count)
    return list(islice(draws(mixture, seed, iteration), count))


def check_rows(rows: int, count: int) -> None:
    """Raise an EarlError where prompts cannot be drawn without replacement."""
    if rows < count:
        raise EarlError(
            f"there are {rows} different rows, but {count} prompts are to be drawn without replacement; add data or "
            "lower the number of prompts"
        )


def permuted(index: int, size: int, *key: int | str) -> int:
    """Return where a permutation of 0..size-1 that is given by ``key`` sends ``index``.

    A Feistel network permutes the next power of four; outcomes beyond ``size`` are sent through it again, which
    leaves a permutation of the rest.
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (seeds.seed("permuted", *key, number, right) & mask)
        index = (left << bits) | right
        if index < size:
            return index


def _part(size: int, share: Fraction) -> Part:
    repeats = int(share)
    # Half a row counts as one.
    extra = int((share - repeats) * size + Fraction(1, 2))
    return Part(size, repeats + extra // size, extra % size)
