"""Advantages: what an episode's reward says beside those of the other samples of its prompt. Imports torch alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards: Tensor, groups: Tensor, used: Tensor, kind: str = "mean_std") -> Tensor:
    """Advantage of each episode relative to the other samples of its prompt.

    "mean_std"       A = (r - mean) / (std + 1e-4) with the mean and *population* standard deviation of the used
                     episodes of the group (GRPO, Shao et al. 2024, arXiv:2402.03300; the epsilon and the population
                     form are those of nano-aha-moment).
    "mean"           A = r - mean (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783): a group whose rewards hardly differ
                     then weighs little instead of as much as any other.
    "leave_one_out"  A = r - mean of the *other* used episodes of the group (RLOO, Ahmadian et al. 2024,
                     arXiv:2402.14740), which is n / (n - 1) (r - mean) for a group of n: a baseline that does not
                     depend on the episode's own reward, so the policy gradient stays unbiased.

    Args:
        kind: one of the above.
        rewards: float [N], any unit; values of unused episodes are ignored.
        groups: int64 [N], group index 0..G-1 of each episode.
        used: bool [N], False for an episode that must influence neither its group nor the loss.

    Returns:
        float64 [N], in units of the rewards where they are not divided; 0 for unused episodes and for those of
        `zero_std_groups`.
    """
    equal = zero_std_groups(rewards, groups, used)
    rewards = torch.where(used, rewards.double(), 0.0)
    # Rounding in the mean must not give a group of equal rewards an advantage, which Adam would scale up.
    weight = (used & ~equal[groups]).double()
    zeros = torch.zeros(len(equal), dtype=torch.float64, device=rewards.device)
    count = zeros.index_add(0, groups, used.double()).clamp(min=1.0)
    mean = zeros.index_add(0, groups, rewards) / count
    deviation = (rewards - mean[groups]) * weight
    if kind == "mean":
        return deviation
    if kind == "leave_one_out":
        return deviation * (count / (count - 1).clamp(min=1.0))[groups]
    std = (zeros.index_add(0, groups, deviation**2) / count).sqrt()
    return deviation / (std[groups] + EPSILON)


def component_advantages(
    components: Tensor, weights: Sequence[float], groups: Tensor, used: Tensor, kind: str = "mean_std"
) -> Tensor:
    """Advantage of each component of the reward by itself, weighed, summed, and scaled to unit size.

        A = sum_k w_k A_k / (std + 1e-4),   A_k = `group_advantages` of component k

    with the population standard deviation of the sum over all used episodes, whose mean is 0 since that of each group
    is. With "mean_std" this is GDPO (Liu et al. 2026, arXiv:2601.05242): a component that varies little counts as much
    as one that varies a lot, and two ways to the same total do not look alike. A component in which a group's used
    episodes are all equal adds nothing there; the others go on.

    Args:
        components: float [N, K]; values of unused episodes are ignored.
        weights: K of them.
        groups, used, kind: as of `group_advantages`.

    Returns:
        float64 [N]; 0 for unused episodes.
    """
    parts = [group_advantages(component, groups, used, kind) for component in components.T]
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    std = total[used].square().mean().sqrt() if bool(used.any()) else total.new_zeros(())
    return total / (std + EPSILON)


def zero_std_groups(rewards: Tensor, groups: Tensor, used: Tensor) -> Tensor:
    """bool [G]: True where the used rewards of a group are all equal, or fewer than two are used.

    Such a group has no preference to teach: its advantages are 0 whatever the epsilon.
    """
    size = int(groups.max()) + 1
    low = torch.full((size,), float("inf"), dtype=torch.float64, device=rewards.device)
    kept, index = rewards.double()[used], groups[used]
    highest = (-low).scatter_reduce(0, index, kept, "amax")
    lowest = low.scatter_reduce(0, index, kept, "amin")
    return highest <= lowest
