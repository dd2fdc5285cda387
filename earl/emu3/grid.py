"""The grid constraint: which tokens may follow, as a pure function of position.

With ``k`` tokens generated after the completion's ``img`` and an original of ``H`` x ``W`` visual tokens::

    before img          text          (any id below the first visual one)
    k mod (W+1) = W     eol
    k = (W+1) H         eof, then eoi, then eos
    otherwise           visual        (any visual id)

Rollout engines constrain with `kind_at`, the learner finds the same kinds again with `kinds_of_completion`: a
learner that normalises over another support than the sampler computes a wrong ratio.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from earl.emu3.vocabulary import Vocabulary

TEXT, VISUAL, EOL, EOF, EOI, EOS = range(6)
FIRST_FORCED = EOL
"""Kinds from here on allow a single id: the token is forced, and its log-prob is 0."""
FREE = -1
"""No constraint: any id of the tokenizer. Never a kind of a position; the last row of `forbidden_table`."""


def kind_at(k, height, width):
    """Return the kind allowed at each position.

    Args:
        k: Number of tokens generated after ``img``, -1 before it; any shape, integers. NumPy array or torch tensor.
        height: Rows H of the original's token grid; broadcasts with ``k``.
        width: Columns W, likewise.

    Returns:
        Array of kinds in ``k``'s type and (broadcast) shape. After ``eos`` the kind stays EOS.
    """
    end = (width + 1) * height
    inside = (k >= 0) * (k < end)
    row_ends = inside * (k % (width + 1) == width)
    # Arithmetic instead of branches: the same expression runs on NumPy arrays and on device tensors.
    kind = inside * VISUAL + row_ends * (EOL - VISUAL)
    after = (k - end).clip(0, 2)
    return kind + (k >= end) * (EOF + after)


def shortest_completion(grid: tuple[int, int]) -> int:
    """Return the tokens of the shortest whole completion for a grid (H, W): img, H rows, eof, eoi, eos."""
    height, width = grid
    return 1 + height * (width + 1) + 3


def kinds_of_completion(token_ids: Sequence[int], grid: tuple[int, int], vocabulary: "Vocabulary") -> np.ndarray:
    """Return int8 [L]: the kind that was allowed where each token of a completion was sampled."""
    ids = np.asarray(token_ids)
    found = np.flatnonzero(ids == vocabulary.img)
    start = found[0] + 1 if len(found) else len(ids)
    k = np.arange(len(ids)) - start
    return np.where(k < 0, TEXT, kind_at(np.maximum(k, 0), *grid)).astype(np.int8)


def forced_ids(vocabulary: "Vocabulary") -> dict[int, int]:
    """Return the single allowed id of each forced kind."""
    return {EOL: vocabulary.eol, EOF: vocabulary.eof, EOI: vocabulary.eoi, EOS: vocabulary.eos}


def free_ranges(vocabulary: "Vocabulary") -> dict[int, tuple[int, int]]:
    """Return the first and last (exclusive) of the allowed ids of each kind that leaves a choice."""
    return {TEXT: (0, vocabulary.first_visual), VISUAL: (vocabulary.first_visual, vocabulary.size)}


def allowed_masks(vocabulary: "Vocabulary") -> np.ndarray:
    """Return bool [6, vocabulary size]: row ``kind`` marks the ids that kind allows."""
    masks = np.zeros((6, vocabulary.size), dtype=bool)
    for kind, (first, last) in free_ranges(vocabulary).items():
        masks[kind, first:last] = True
    for kind, token_id in forced_ids(vocabulary).items():
        masks[kind, token_id] = True
    return masks


def forbidden_table(vocabulary: "Vocabulary", size: int) -> "torch.Tensor":
    """Return bool [7, size], indexed by kind: the ids to mask out of logits over ``size`` ids.

    A model may have more ids than its tokenizer, for alignment; those are never allowed, not even by `FREE`.
    """
    import torch

    table = torch.ones(7, size, dtype=torch.bool)
    table[:FREE, : vocabulary.size] = ~torch.from_numpy(allowed_masks(vocabulary))
    table[FREE, : vocabulary.size] = False
    return table
