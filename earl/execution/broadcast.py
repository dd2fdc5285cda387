"""Weights from the ranks that train to all ranks of a program."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from earl.execution.ranks import Ranks

if TYPE_CHECKING:
    import torch

Weights = Iterable[tuple[str, "torch.Tensor"]]


def to_all(weights: Weights | None, world: Ranks, team: Ranks | None) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield, on every rank of the world, the weights that its first rank has; all go through them together.

    Args:
        weights: by name, whole; None on the ranks outside the team.
        team: the first ranks of the world, all of which have the weights; None on the others.
    """
    import torch
    import torch.distributed as dist

    if team is not None and team.size == world.size:
        yield from weights or ()
        return
    own = iter(weights or ())
    while True:
        named = next(own, None)
        told = world.of_first(None if named is None else (named[0], named[1].shape, named[1].dtype))
        if told is None:
            return
        name, shape, dtype = told
        weight = torch.empty(shape, dtype=dtype, device=world.device) if named is None else named[1].contiguous()
        # As bytes: not every backend knows every type.
        dist.broadcast(weight.view(-1).view(torch.uint8), src=0, group=world.group)
        yield name, weight
