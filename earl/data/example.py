"""One tokenised example, whatever file it came from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from earl.errors import EarlError

CODEBOOK_SIZE = "codebook_size"
"""Metadata of tokenised files: how many codes the vision tokenizer has."""


@dataclass(frozen=True, eq=False)
class Example:
    """An image pair with its instruction, as visual tokens."""

    dataset: str
    example_id: str
    task: str | None
    instruction: str
    reasoning: list[tuple[str, str]] | None
    """(key, text) pairs in their order; boxes in the text are in pixels of the images here."""
    original_tokens: np.ndarray
    """int64 [H, W], codebook indices."""
    target_tokens: np.ndarray | None
    """int64 [H, W], codebook indices of the ground-truth edit; None where the data set knows none."""
    original: bytes | None
    """Encoded image, None where the data set holds tokens alone."""
    target: bytes | None


class Dataset(Protocol):
    """Random access to examples: nothing but the one that is asked for needs to be in memory."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...


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
