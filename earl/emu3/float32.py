"""Logits in float32, of engines and learner alike, where the policy computes in bfloat16.

A bfloat16 number near 16 has neighbours 0.125 apart: logits that sampler and learner round each by itself would differ
by that where their hidden states differ in the last bits.
"""

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the logits [T, V] of hidden states [T, D] under a head [V, D] without a bias, see `product`."""
    return product(hidden, weight.T)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [T, D] @ right [D, V], in float32 where both are bfloat16, else in their own type.

    The product of two bfloat16 numbers is exact in float32, so that the sum alone is rounded.
    """
    if left.dtype != torch.bfloat16:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # torch has no such product on a CPU
