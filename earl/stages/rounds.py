"""Rounds of sampling: an iteration's own prompts and, with `dynamic_sampling`, others while too few groups are usable.

DAPO (arXiv 2503.14476) samples until its batch is full of groups whose rewards differ. Here every round that there may
be is files, `rollout_shards` of them, after those of the round before. The prompts of a round are the next draws of the
iteration, whether earlier ones were needed or not. One that is not needed has files without rows: whether it is follows
from the scores of the rounds before it and the fields of the reward, and its rollouts record which scores these were.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from earl.files import tables
from earl.files.layout import Iteration
from earl.learner import episodes
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config

_COLUMNS = ("episode_id", "group_id", "prompt_token_ids", "completion_token_ids", "finish_reason")


@dataclass(frozen=True)
class Earlier:
    """What the rounds before a further one have come to."""

    usable: int
    """Usable groups."""
    wanted: int
    """Of `dynamic_sampling`."""
    scores: list[str]
    """Digests of their files of scores."""

    @property
    def is_enough(self) -> bool:
        return self.usable >= self.wanted

    def metadata(self) -> dict[str, str]:
        """Return what the rollouts of the round record."""
        return {tables.USABLE: str(self.usable), tables.DECIDED_BY: json.dumps(self.scores)}


def earlier(config: "Config", iteration: Iteration, number: int, policy_digest: str) -> Earlier | None:
    """Read what the rounds before round ``number`` have come to; None of an iteration's first round.

    Args:
        policy_digest: digest of the policy that the iteration samples from.

    Raises:
        EarlError: as `episodes.read` and `episodes.judged`.
    """
    if number == 0 or config.dynamic_sampling is None:
        return None
    source = episodes.read(iteration, number * config.rollout_shards, policy_digest, counts(config, number), _COLUMNS)
    usable = len(episodes.usable_groups(episodes.judged(source, config, str(iteration.path))))
    return Earlier(usable, config.dynamic_sampling.usable_groups, source.scores)


def counts(config: "Config", rounds: int) -> range:
    """Return how many episodes an iteration may have after so many rounds: those of the first, and of some others."""
    samples = config.generations_per_sample
    first, last = (config.prompts_of_round(number) for number in (0, rounds - 1))
    return range(first.stop * samples, last.stop * samples + 1, len(last) * samples)


def sampled(config: "Config", groups: int) -> int:
    """Return how many rounds an iteration of so many groups has sampled."""
    return 1 + (groups - config.prompts_per_iteration) // len(config.prompts_of_round(config.rounds - 1))


def check(config: "Config", iteration: Iteration, source: episodes.Source) -> None:
    """Check that the further rounds of an iteration were sampled, or not, by the scores and fields of now.

    Args:
        source: what was read of the iteration.

    Raises:
        EarlError: by other scores, or for another number of usable groups.
    """
    scores, needed = source.scores, 0
    shards = len(scores) // config.rounds
    for shard in range(shards, len(scores)):
        path = iteration.rollouts(shard)
        told, before = tables.read_metadata(path), scores[: shard // shards * shards]
        if told.get(tables.DECIDED_BY) != json.dumps(before):
            raise EarlError(
                f"{path}: whether this round is needed was decided by other scores of the rounds before it than are "
                "there now; generate and score it again"
            )
        needed += shard % shards == 0 and int(told[tables.USABLE]) < config.most_trained_groups
    if len(source.rows) != counts(config, config.rounds)[needed]:
        raise EarlError(
            f"{iteration.path}/rollouts: {needed} further rounds are needed for the {config.most_trained_groups} "
            f"groups of dynamic_sampling.usable_groups, but shards hold {len(source.rows)} episodes; generate and "
            "score the further rounds again"
        )
