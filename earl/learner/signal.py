"""How much of a gradient is signal: the cosine between the gradients of two halves of an optimizer step's groups.

Independent halves agree only in what the rewards teach. With s the squared norm of the expected gradient of a half, and
n the expected squared norm of its noise, the cosine is about s / (s + n): near 1 where a step knows its way, near 0
where it is mostly noise. Then larger batches or better rewards help more than a larger rate.
"""

from typing import TYPE_CHECKING

import torch

from earl.execution.ranks import Ranks

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

SAMPLED = 2**24
"""Elements of the gradient that a rank compares, evenly spaced over those that it holds, so that it costs little."""


class Halves:
    """Takes the gradient of the first half while a step's micro-batches accumulate."""

    def __init__(self, policy: "Emu3ForCausalLM", rounds: int) -> None:
        """
        Args:
            rounds: of micro-batches, one on each rank, until the gradient is whole. Of one there are no halves.
        """
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        held = sum(_local(parameter).numel() for parameter in self._parameters)
        self._stride = -(-held // SAMPLED)
        self._left = rounds // 2
        self._first: torch.Tensor | None = None

    def accumulated(self) -> None:
        """Say that the gradients of another round have been added."""
        self._left -= 1
        if self._left == 0:
            self._first = self._gradient()

    def cosine(self, team: Ranks) -> float | None:
        """Return the cosine, of what all ranks hold; None where there are no halves or one has no gradient."""
        if self._first is None:
            return None
        second = self._gradient() - self._first
        products = (self._first @ second, self._first @ self._first, second @ second)
        sums = [sum(values) for values in zip(*team.gather([product.item() for product in products]), strict=True)]
        norms = (sums[1] * sums[2]) ** 0.5
        return sums[0] / norms if norms else None

    def _gradient(self) -> torch.Tensor:
        """float64 [S]: a copy of the sampled elements of this rank's part of the gradient; 0 where there is none."""
        parts, offset = [], 0
        for parameter in self._parameters:
            held = _local(parameter)
            start = -offset % self._stride
            places = slice(start, None, self._stride)
            if parameter.grad is None:
                parts.append(held.new_zeros(held.flatten()[places].shape, dtype=torch.double))
            else:
                parts.append(_local(parameter.grad).flatten()[places].double())
            offset += held.numel()
        return torch.cat(parts)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
