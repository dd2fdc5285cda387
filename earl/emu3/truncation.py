"""Truncated sampling: which ids top_k and top_p leave, in one place for the torch engine and the learner.

Imports torch alone. What is allowed at all is the grid's affair (`earl.emu3.grid`); this cuts what is left of it down.
"""

import torch
from torch import Tensor


def is_on(top_k: int, top_p: float) -> bool:
    """Return whether anything is cut off."""
    return top_k > 0 or top_p < 1


def kept_ids(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """bool [rows, ids]: the ids that are left of each row.

    First the `top_k` likeliest, of equal ones those with the lower ids; of these the smallest set of likeliest ones
    that have at least `top_p` of their probability (Holtzman et al. 2019, arXiv:1904.09751), at least one.

    Args:
        logprobs: float [rows, ids], normalised, after the temperature; -inf where an id is not allowed.
        top_k: -1 keeps all.
        top_p: 1 keeps all.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k > 0:
        keep[:, top_k:] = False
        ordered = torch.log_softmax(ordered.masked_fill(~keep, -torch.inf), -1)
    if top_p < 1:
        probabilities = ordered.double().exp()
        # An id stays while the ids before it have not reached top_p yet, so the likeliest one always stays.
        keep &= probabilities.cumsum(-1) - probabilities < top_p
    return torch.zeros_like(keep).scatter(-1, order, keep)
