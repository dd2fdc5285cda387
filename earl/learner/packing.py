"""Packing without padding: many sequences in one row, and a prompt that several completions share computed once.

    input_ids     prompt A   completion A0   completion A1   prompt B   completion B0
    position_ids  0 .. P-1   P .. P+L0-1     P .. P+L1-1     0 ..       ..

Under the block mask (see `attention`) a prompt sees itself, a completion its prompt and itself, each causally, so that
every token gets the hidden state that it has in a sequence of its own. With N completions of L tokens to a prompt of P
this takes P + N L tokens through the layers instead of N (P + L): little more than half for prompts with an image as
large as the completions'.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """Where a prompt and its completions lie in the row."""

    prompt: slice
    completions: list[slice]


class Packed(NamedTuple):
    """A row of S tokens."""

    input_ids: np.ndarray  # int64 [S]
    position_ids: np.ndarray  # int64 [S], place in prompt and completion together
    groups: list[Group]


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Packed:
    """Pack (prompt, completion) pairs in their order; neighbours with equal prompts share one."""
    ids, positions, groups, last_prompt, end = [], [], [], None, 0
    for prompt, completion in sequences:
        if last_prompt is None or not np.array_equal(prompt, last_prompt):
            groups.append(Group(slice(end, end + len(prompt)), []))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            last_prompt, end = prompt, end + len(prompt)
        groups[-1].completions.append(slice(end, end + len(completion)))
        ids.append(completion)
        positions.append(len(prompt) + np.arange(len(completion)))
        end += len(completion)
    return Packed(np.concatenate(ids), np.concatenate(positions), groups)
