"""One tokenised example, whatever file it came from."""

from typing import NamedTuple, Protocol

import numpy as np

CODEBOOK_SIZE = "codebook_size"
"""Metadata of tokenised files: how many codes the vision tokenizer has."""
TOKENIZER_DIGEST = "tokenizer_digest"
"""Metadata of files with completions: the digest of ``tokenizer.json``, which gave their text its ids."""


class Example(NamedTuple):
    """An image pair with its instruction, as visual tokens; a tuple, since one is made for each row read."""

    dataset: str
    example_id: str
    task: str | None
    instruction: str
    reasoning: list[tuple[str, str]] | None
    """(key, text) pairs in their order; boxes in pixels are in those of the images here."""
    original_tokens: np.ndarray
    """int64 [H, W], codebook indices."""
    target_tokens: np.ndarray | None
    """int64 [H, W], codebook indices of the ground-truth edit; None where the data set knows none."""
    original: bytes | None
    """Encoded image, None where the data set holds tokens alone."""
    target: bytes | None
    chosen: np.ndarray | None = None
    """int64 [L], of a completion that was sampled: the ids of all that follows the instruction."""
    rejected: np.ndarray | None = None
    """int64 [M], of a worse one."""


class Dataset(Protocol):
    """Random access to examples: nothing but the one that is asked for needs to be in memory."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...


def is_unicode(text: str) -> bool:
    """Return whether a text can be written: JSON and pickles may hold halves of surrogate pairs, no file may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_words(text: str) -> bool:
    """Return whether there is anything to see in a text: more than spaces and characters without a shape."""
    return any(character.isprintable() and not character.isspace() for character in text)
