"""From episodes to the tensors that a model takes: mini-batches of whole groups, micro-batches of some episodes.

All of it is a function of the episodes and their ids, so that every rank makes the same plan and takes its share.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from earl.execution.ranks import Ranks, rounds
from earl.learner import objective, packing

if TYPE_CHECKING:
    from earl.learner.settings import Settings


@dataclass(frozen=True)
class Episode:
    """One used episode. P prompt tokens, L completion tokens."""

    episode_id: str
    group_id: str
    prompt: np.ndarray  # int64 [P]
    completion: np.ndarray  # int64 [L]
    forced: np.ndarray  # bool [L], the sampler had no choice
    behavior_logprobs: np.ndarray  # float32 [L]
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def mini_batches(episodes: Sequence[Episode], steps: int) -> list[list[Episode]]:
    """Cut the episodes into `steps` parts of whole groups, as even as can be; fewer where there are fewer groups."""
    groups: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda episode: episode.episode_id):
        groups.setdefault(episode.group_id, []).append(episode)
    if not groups:
        return []
    names, steps = sorted(groups), min(steps, len(groups))
    bounds = [len(names) * step // steps for step in range(steps + 1)]
    return [
        [episode for name in names[start:end] for episode in groups[name]] for start, end in itertools.pairwise(bounds)
    ]


@dataclass(frozen=True)
class MicroBatch:
    """Some episodes, and their T counted completion tokens as flat tensors.

    Their ids are B right-padded rows of S, or with `groups` one packed row.
    """

    episode_ids: list[str]
    groups: list[packing.Group] | None
    input_ids: Tensor  # int64 [B, S]
    position_ids: Tensor  # int64 [B, S]
    sequences: Tensor  # int64 [T], episode of each counted token
    places: Tensor  # int64 [T], place among the B * S whose logits predict it
    positions: Tensor  # int64 [T], place in its completion
    targets: Tensor  # int64 [T]
    advantages: Tensor  # float32 [T]
    lengths: Tensor  # float32 [T], `length` of the token's episode
    behavior_logprobs: Tensor  # float32 [T]


def micro_batches(
    episodes: Sequence[Episode], settings: "Settings", team: Ranks, description: str | None = None
) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield a rank's share of an optimizer step's micro-batches, and whether each counts: see `ranks.rounds`.

    Without a description no progress is shown.
    """
    cut = cut_episodes(episodes, settings, team.size)
    count = -(-len(cut) // team.size)
    silent = description is None or not team.first
    shares = tqdm(rounds(cut, team), description, count, unit="batch", leave=False, disable=silent)
    for part, counts in shares:
        yield collate(part, settings, team.device), counts


def rounds_of(episodes: Sequence[Episode], settings: "Settings", team: Ranks) -> int:
    """Return how many micro-batches each rank takes of an optimizer step."""
    return -(-len(cut_episodes(episodes, settings, team.size)) // team.size)


def cut_episodes(episodes: Sequence[Episode], settings: "Settings", ranks: int) -> list[list[Episode]]:
    """Cut the episodes into parts of at most `settings.micro_batch`, of fewer where a rank would otherwise get none.

    Those of a group are together where they are packed, else those of like length, the longest first, to pad little.
    With `settings.whole_groups` no group is cut, though it have more episodes than that. A part in which no token
    counts is left out: its loss and gradient are 0.
    """
    units = mini_batches(episodes, len(episodes)) if settings.whole_groups else [[episode] for episode in episodes]
    size = max(1, min(settings.micro_batch // max(map(len, units)), -(-len(units) // ranks)))
    by_group = settings.packed
    units.sort(key=lambda unit: (unit[0].group_id if by_group else -max(map(len, unit)), unit[0].episode_id))
    parts = ([one for unit in units[start : start + size] for one in unit] for start in range(0, len(units), size))
    return [part for part in parts if any(len(counted_positions(episode, settings)) for episode in part)]


def collate(episodes: Sequence[Episode], settings: "Settings", device: torch.device) -> MicroBatch:
    input_ids, position_ids, groups, starts = (packed_rows if settings.packed else padded_rows)(episodes)
    parts = []
    for index, (episode, (prompt_end, completion_start)) in enumerate(zip(episodes, starts, strict=True)):
        counts = counted_positions(episode, settings)
        parts.append(
            (
                np.full(len(counts), index),
                # The prompt's last token predicts the completion's first, each other one its successor.
                np.where(counts == 0, prompt_end, completion_start + counts) - 1,
                counts,
                episode.completion[counts],
                np.full(len(counts), episode.advantage, dtype=np.float32),
                np.full(len(counts), length(episode, settings), dtype=np.float32),
                episode.behavior_logprobs[counts],
            )
        )
    flat = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    tensors = (torch.from_numpy(array).to(device) for array in (input_ids, position_ids, *flat))
    return MicroBatch([episode.episode_id for episode in episodes], groups, *tensors)


Rows = tuple[np.ndarray, np.ndarray, list[packing.Group] | None, list[tuple[int, int]]]
"""input_ids and position_ids [B, S], the groups, and for each episode where, among the B * S places, its prompt ends
and its completion starts."""


def padded_rows(episodes: Sequence[Episode]) -> Rows:
    # Any id pads: under the causal mask nothing to the left sees the right end, and no logits are taken there.
    length = max(len(episode) for episode in episodes)
    input_ids = np.zeros((len(episodes), length), dtype=np.int64)
    ends = []
    for row, episode in enumerate(episodes):
        input_ids[row, : len(episode)] = np.concatenate([episode.prompt, episode.completion])
        ends.append(row * length + len(episode.prompt))
    return input_ids, np.arange(length)[None], None, [(end, end) for end in ends]


def packed_rows(episodes: Sequence[Episode]) -> Rows:
    packed = packing.pack([(episode.prompt, episode.completion) for episode in episodes])
    starts = [(group.prompt.stop, own.start) for group in packed.groups for own in group.completions]
    return packed.input_ids[None], packed.position_ids[None], packed.groups, starts


def counted_positions(episode: Episode, settings: "Settings") -> np.ndarray:
    """int64: the positions of the completion whose tokens count in the sum of the loss."""
    mask = objective.token_mask(
        torch.from_numpy(episode.completion), torch.from_numpy(episode.forced), settings.visual_range, settings.counted
    )
    return mask.nonzero().squeeze(1).numpy()


def length(episode: Episode, settings: "Settings") -> int:
    """Completion tokens of the kind that trains, forced ones included: what a loss is divided by."""
    mask = objective.kind_mask(torch.from_numpy(episode.completion), settings.visual_range, settings.counted)
    return int(mask.sum())
