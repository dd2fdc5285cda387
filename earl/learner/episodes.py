"""Episodes between files and learner: read rollouts with their scores, give each its reward, keep what was decided.

Shards are an accident of how an iteration was generated: rows are put in the order of their episode ids, so that the
same episodes in any number of shards give the same bytes afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from earl.emu3 import grid as grid_rules
from earl.emu3 import sequence
from earl.emu3.vocabulary import Vocabulary
from earl.files import manifest, tables
from earl.files.layout import Iteration
from earl.learner import advantage, logprobs
from earl.learner.batches import Episode
from earl.messages.errors import EarlError
from earl.statistics import rewards

if TYPE_CHECKING:
    from earl.config.schema import Config

ROLLOUT_COLUMNS = (
    "episode_id",
    "group_id",
    "prompt_token_ids",
    "completion_token_ids",
    "behavior_logprobs",
    "finish_reason",
    "completion_text",
)
SCORE_COLUMNS = ("episode_id", "status", *rewards.SUB_SCORES, "ground_score")
TOO_LONG = "longer than the learner takes"
ZERO_VARIANCE = "the rewards of its group are all equal"
SURPLUS = "enough groups before it are usable"
REWARD = "reward"
SCORES = ("viescore", *rewards.COMPONENTS)
"""Scores whose means are metrics."""


@dataclass(frozen=True)
class Outcome:
    """What training makes of one scored rollout."""

    row: dict[str, Any]  # ROLLOUT_COLUMNS and SCORE_COLUMNS; of a failed judgement `failure`, the judge's words
    reward: float | None  # None: the judgement failed
    reason: str | None  # why it is not used, or None where it is
    components: Mapping[str, float] = field(default_factory=dict)  # of the reward, by the names of advantage_components
    advantage: float | None = None

    @property
    def used(self) -> bool:
        return self.reason is None

    @property
    def compared(self) -> bool:
        """Whether its reward counts in its group: of what is used, and of what is masked only after comparing."""
        return self.used or self.reason in (ZERO_VARIANCE, SURPLUS)


@dataclass(frozen=True)
class Source:
    """Scored rollouts of an iteration and the digests of the files they came from."""

    rows: list[dict[str, Any]]
    rollouts: list[str]
    scores: list[str]
    rubrics: str | None  # digest of what the judge was asked by; None where it has no rubrics
    left_out: int = 0  # prompts that were too long to be sampled
    passed_over: int = 0  # prompts that a curriculum has passed over


def read(
    iteration: Iteration, shards: int, policy_digest: str, expected: range, columns: Sequence[str] = ROLLOUT_COLUMNS
) -> Source:
    """Read the rollouts and scores of an iteration, in the order of their episode ids.

    Args:
        policy_digest: digest of the policy that must have generated them.
        expected: how many episodes the shards may hold together, as `earl.stages.rounds.episodes` says.
        columns: of the rollouts, `episode_id` among them.

    Raises:
        EarlError: a file is missing, damaged or holds a value out of range; rollouts of another policy or iteration,
            scores of other rollouts or by other rubrics than those beside them; episodes doubled, missing or too few.
    """
    rows, rollout_digests, score_digests, rubrics = [], [], [], {}
    for shard in range(shards):
        rollouts, scores = iteration.rollouts(shard), iteration.scores(shard)
        rollout_rows = tables.read_table(rollouts, tables.ROLLOUTS, columns).to_pylist()
        score_rows = tables.read_table(scores, tables.SCORES, SCORE_COLUMNS).to_pylist()
        _add_failures(score_rows, scores)
        rollout_digests.append(manifest.digest_file(rollouts))
        score_digests.append(manifest.digest_file(scores))
        _check_metadata(rollouts, "iteration", str(iteration.index), "of another iteration; generate them again")
        _check_metadata(rollouts, "policy_digest", policy_digest, "of another policy; generate and score them again")
        _check_metadata(scores, "rollouts_digest", rollout_digests[-1], f"not of {rollouts}; score them again")
        rubrics[tables.read_metadata(scores).get("rubrics_digest")] = scores
        rows += _joined(rollout_rows, score_rows, scores)
    if len(rubrics) > 1:
        raise EarlError(
            f"{', '.join(map(str, rubrics.values()))}: were scored by different rubrics; score all shards again"
        )
    _check_complete(rows, iteration, expected)
    ordered = sorted(rows, key=lambda row: row["episode_id"])
    # Every shard tells of all prompts up to its round's last.
    told = [tables.read_metadata(iteration.rollouts(shard)) for shard in range(shards)]
    counts = (max(int(one.get(name, 0)) for one in told) for name in (tables.LEFT_OUT, tables.PASSED_OVER))
    return Source(ordered, rollout_digests, score_digests, *rubrics, *counts)


def _check_metadata(path: Path, key: str, expected: str, remedy: str) -> None:
    found = tables.read_metadata(path).get(key)
    if found is None:
        raise EarlError(f"{path}: its metadata has no {key}; run the stage that writes it again")
    if found != expected:
        raise EarlError(f"{path}: {key} is {found}, not {expected}: these are {remedy}")


def _add_failures(rows: list[dict], path: Path) -> None:
    """Give each failed judgement what the judge said of it: a model's `failure`, a program's `raw`."""
    failed = [index for index, row in enumerate(rows) if row["status"] == "failed"]
    if not failed:
        return
    with tables.open_table(path) as source:
        said = source.read(columns=[name for name in ("failure", "raw") if name in source.schema_arrow.names])
    for index in failed:
        rows[index]["failure"] = next((text for column in said.columns if (text := column[index].as_py())), None)


def _joined(rollouts: list[dict], scores: list[dict], path: Path) -> list[dict]:
    by_id = {row["episode_id"]: row for row in scores}
    ids = {row["episode_id"] for row in rollouts}
    if unlike := sorted(ids ^ by_id.keys()):
        raise EarlError(f"{path}: column 'episode_id': {unlike[0]} stands in rollouts or scores alone; score again")
    return [{**row, **by_id[row["episode_id"]]} for row in rollouts]


def _check_complete(rows: list[dict], iteration: Iteration, expected: range) -> None:
    ids = [row["episode_id"] for row in rows]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise EarlError(f"{iteration.path}/rollouts: episode {double} is doubled; remove what is left of other shards")
    if len(ids) not in expected:
        more = f", and a further round has {expected.step}, up to {expected[-1]}" if len(expected) > 1 else ""
        raise EarlError(
            f"{iteration.path}/rollouts: shards hold {len(ids)} episodes, but episodes_per_iteration is "
            f"{expected.start}{more}; check rollout_shards, or generate them again"
        )


def reward_all(source: Source, config: "Config", where: str) -> list[Outcome]:
    """Give every episode its reward and its advantage within the group.

    With `zero_variance_groups: mask`, groups that have no preference are not used; none may be left then. With
    `dynamic_sampling`, neither are those after the first `usable_groups` that have one.

    Raises:
        EarlError: more judgements failed than `max_failed_fraction` allows, or no episode can be used; `where` is
            named then.
    """
    outcomes = judged(source, config, where)
    if not any(outcome.used for outcome in outcomes):
        raise EarlError(f"{where}: none of {len(outcomes)} episodes can be used: {outcomes[0].reason}")
    if config.zero_variance_groups == "mask":
        outcomes = _masked(outcomes)
    if config.dynamic_sampling is not None:
        outcomes = _first_groups(outcomes, config.dynamic_sampling.usable_groups)
    return [
        replace(outcome, advantage=value if outcome.used else None)
        for outcome, value in zip(outcomes, _advantages(outcomes, config).tolist(), strict=True)
    ]


def judged(source: Source, config: "Config", where: str) -> list[Outcome]:
    """Give every episode its reward.

    Raises:
        EarlError: as `reward_all`, but for iterations of which no episode can be used.
    """
    outcomes = [_outcome(row, config, where) for row in source.rows]
    failed = [outcome.row.get("failure") for outcome in outcomes if outcome.reward is None]
    words = next(filter(None, failed), None)
    rewards.check_failed_fraction(len(failed), len(outcomes), config.max_failed_fraction, where, words)
    return outcomes


def usable_groups(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the ids of the groups that can be learned from, in the order of their prompts.

    Their rewards, or where `advantage_components` names some one of these, are not all equal.
    """
    equal = torch.stack(list(_equal_groups(outcomes).values())).all(0).tolist()
    names = dict.fromkeys(outcome.row["group_id"] for outcome in outcomes)
    usable = [name for name, same in zip(names, equal, strict=True) if not same]
    return sorted(usable, key=lambda name: (len(name), name))  # Of numbers with as many digits, or more.


def _first_groups(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """Leave out the episodes of usable groups after the first ``count``."""
    surplus = set(usable_groups(outcomes)[count:])
    return [
        replace(outcome, reason=SURPLUS) if outcome.used and outcome.row["group_id"] in surplus else outcome
        for outcome in outcomes
    ]


def _masked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Leave out the episodes of groups that have no preference."""
    equal = torch.stack(list(_equal_groups(outcomes).values())).all(0)
    in_equal = equal[group_index([outcome.row for outcome in outcomes])].tolist()
    return [
        replace(outcome, reason=ZERO_VARIANCE) if outcome.used and masked else outcome
        for outcome, masked in zip(outcomes, in_equal, strict=True)
    ]


def _equal_groups(outcomes: Sequence[Outcome]) -> dict[str, torch.Tensor]:
    """bool [G] for everything that advantages are made of: True where it is the same in all of a group's episodes.

    A group is of no use where all are: it has no preference then.
    """
    groups = group_index([outcome.row for outcome in outcomes])
    compared = torch.tensor([outcome.compared for outcome in outcomes])
    components = next((outcome.components for outcome in outcomes if outcome.compared), {})
    return {
        name: advantage.zero_std_groups(_column(outcomes, name), groups, compared)
        for name in sorted(components) or [REWARD]
    }


def _advantages(outcomes: Sequence[Outcome], config: "Config") -> torch.Tensor:
    """float64 [N]: of the rewards, or of their components where `advantage_components` names some."""
    groups = group_index([outcome.row for outcome in outcomes])
    used = torch.tensor([outcome.used for outcome in outcomes])
    weights = config.advantage_components
    if not weights:
        return advantage.group_advantages(_column(outcomes, REWARD), groups, used, config.advantage)
    # In the order of their names, since a sum in another order may round otherwise.
    components = torch.stack([_column(outcomes, name) for name in sorted(weights)], 1)
    weights = [weights[name] for name in sorted(weights)]
    return advantage.component_advantages(components, weights, groups, used, config.advantage)


def _column(outcomes: Sequence[Outcome], name: str) -> torch.Tensor:
    """float64 [N]: the reward or one of the components; 0 where there is none, of episodes that are not used."""
    values = [outcome.reward if name == REWARD else outcome.components.get(name) for outcome in outcomes]
    return torch.tensor([value or 0.0 for value in values], dtype=torch.float64)


def _outcome(row: dict[str, Any], config: "Config", where: str) -> Outcome:
    reward = reward_of(row, config.reward_final_reward, where)
    components = {name: reward_of(row, name, where) for name in config.advantage_components}
    if reward is None:
        return Outcome(row, None, rewards.JUDGEMENT_FAILED)
    return Outcome(row, reward, TOO_LONG if _too_long(row, config) else None, components)


def reward_of(row: dict[str, Any], which: str, where: str) -> float | None:
    """Return `rewards.episode_reward`; its errors name the episode, and `where` its iteration lies."""
    try:
        return rewards.episode_reward(row, which)
    except EarlError as error:
        raise EarlError(f"{where}/scores: episode {row['episode_id']}: {error}") from error


def _too_long(row: dict[str, Any], config: "Config") -> bool:
    limits = (("prompt_token_ids", config.max_prompt_len), ("completion_token_ids", config.max_completion_len))
    return any(limit is not None and len(row[name]) > limit for name, limit in limits)


def group_index(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """int64 [N]: 0..G-1 by group id, in the order of first appearance."""
    groups: dict[str, int] = {}
    return torch.tensor([groups.setdefault(row["group_id"], len(groups)) for row in rows])


def support(config: "Config", vocabulary: Vocabulary) -> logprobs.Support:
    """What the learner normalises log-probs over, by `logprob_support`.

    `sampled` and `split_vocab` take the ranges of `earl.emu3.grid`: a completion that obeys it, which
    `learner_episodes` checks, has a visual target exactly where visual ids alone were allowed.
    """
    match config.resolved_logprob_support:
        case "full":
            return logprobs.FULL
        case "split_vocab":
            return logprobs.split_vocab((vocabulary.first_visual, vocabulary.size))
    parts = tuple(grid_rules.free_ranges(vocabulary).values())
    return logprobs.Support(
        parts if config.emu3_use_logit_processor else ((0, vocabulary.size),), config.top_k, config.top_p
    )


def learner_episodes(
    outcomes: Sequence[Outcome], vocabulary: Vocabulary, constrained: bool, where: str
) -> list[Episode]:
    """Return the used episodes as the loop takes them.

    Args:
        constrained: whether the sampler was held to the grid (`emu3_use_logit_processor`); its forced tokens are
            then marked.

    Raises:
        EarlError: ids outside the vocabulary, or that the grid does not allow there; log-probs and tokens of unequal
            number.
    """
    allowed = grid_rules.allowed_masks(vocabulary) if constrained else None
    return [_learner_episode(outcome, vocabulary, allowed, where) for outcome in outcomes if outcome.used]


def _learner_episode(outcome: Outcome, vocabulary: Vocabulary, allowed: np.ndarray | None, where: str) -> Episode:
    row = outcome.row
    prompt, completion = (_ids(row, name, vocabulary, where) for name in ("prompt_token_ids", "completion_token_ids"))
    behavior = np.array(row["behavior_logprobs"], dtype=np.float32)
    if len(behavior) != len(completion):
        raise EarlError(
            f"{where}/rollouts: episode {row['episode_id']}: column 'behavior_logprobs' has {len(behavior)} values for "
            f"{len(completion)} completion tokens; generate it again"
        )
    forced = np.zeros(len(completion), dtype=bool)
    if allowed is not None:
        size = sequence.grid_of_prompt(prompt, vocabulary)
        kinds = grid_rules.kinds_of_completion(completion, size, vocabulary)
        forced = kinds >= grid_rules.FIRST_FORCED
        if not (obeys := allowed[kinds, completion]).all():
            raise EarlError(
                f"{where}/rollouts: episode {row['episode_id']}: token {obeys.argmin()} of column "
                "'completion_token_ids' is not allowed there by the grid, to which emu3_use_logit_processor holds the "
                "sampler; generate it again, or with the field as it was then"
            )
    return Episode(row["episode_id"], row["group_id"], prompt, completion, forced, behavior, outcome.advantage)


def _ids(row: dict[str, Any], name: str, vocabulary: Vocabulary, where: str) -> np.ndarray:
    ids = np.array(row[name], dtype=np.int64)
    if not len(ids):
        raise EarlError(f"{where}/rollouts: episode {row['episode_id']}: column {name!r} is empty; generate it again")
    if ids.min() < 0 or ids.max() >= vocabulary.size:
        wrong = ids[(ids < 0) | (ids >= vocabulary.size)][0]
        raise EarlError(
            f"{where}/rollouts: episode {row['episode_id']}: column {name!r} holds token id {wrong}, outside the "
            f"policy's 0..{vocabulary.size - 1}; generate it again"
        )
    return ids


def write(path: Path, outcomes: Sequence[Outcome], metadata: dict[str, str]) -> None:
    """Write `train/episodes.parquet`: reward, advantage, used or why not."""
    columns = {
        "episode_id": [outcome.row["episode_id"] for outcome in outcomes],
        "group_id": [outcome.row["group_id"] for outcome in outcomes],
        "reward": [outcome.reward for outcome in outcomes],
        "advantage": [outcome.advantage for outcome in outcomes],
        "used": [outcome.used for outcome in outcomes],
        "reason": [outcome.reason for outcome in outcomes],
        "viescore": [_viescore(outcome.row) for outcome in outcomes],
        "completion_tokens": [len(outcome.row["completion_token_ids"]) for outcome in outcomes],
        "prompt_digest": [sequence.digest(outcome.row["prompt_token_ids"]) for outcome in outcomes],
    }
    tables.write_table(path, tables.EPISODES, columns, metadata)


def _viescore(row: dict[str, Any]) -> float | None:
    known = all(row[name] is not None for name in rewards.SUB_SCORES)
    return rewards.viescore(row) if known else None


def metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Metrics of the episodes: rewards and scores 0..10, fractions 0..1 of all episodes, lengths in tokens.

    Rewards are those of all episodes that were compared, so that masking groups does not change their mean. VIEScore,
    its parts and sub-scores are means over all episodes but those whose judgement failed, and count 0, as the reward
    does, where there is no finished image. `truncated_fraction` did not end by themselves, `no_image_fraction` did and
    hold no image, `reasoning_fraction` hold reasoning before the image.
    """
    rows = [outcome.row for outcome in outcomes]
    used = [outcome for outcome in outcomes if outcome.used]
    got = np.array([outcome.reward for outcome in outcomes if outcome.compared])
    lengths = np.array([len(row["completion_token_ids"]) for row in rows])
    truncated = [row["finish_reason"] != "stop" for row in rows]
    no_image = [row["status"] == "no_image" and not cut for row, cut in zip(rows, truncated, strict=True)]
    failed = sum(outcome.reward is None for outcome in outcomes)
    equal = _equal_groups(outcomes)
    zero_std = torch.stack(list(equal.values())).all(0)
    return {
        "reward_mean": float(got.mean()),
        "reward_std": float(got.std()),
        **{f"{name}_mean": _mean_score(rows, name) for name in SCORES},
        "zero_std_fraction": float(zero_std.double().mean()),
        **{f"zero_std_fraction_{name}": float(each.double().mean()) for name, each in equal.items() if name != REWARD},
        "failed_fraction": failed / len(outcomes),
        "truncated_fraction": sum(truncated) / len(outcomes),
        "no_image_fraction": sum(no_image) / len(outcomes),
        "reasoning_fraction": sum(bool(sequence.reasoning_of(row["completion_text"])) for row in rows) / len(rows),
        "completion_length_mean": float(lengths.mean()),
        "completion_length_max": int(lengths.max()),
        "episodes": len(outcomes),
        "used_episodes": len(used),
        "failed_episodes": failed,
        "too_long_episodes": sum(outcome.reason == TOO_LONG for outcome in outcomes),
        "zero_variance_episodes": sum(outcome.reason == ZERO_VARIANCE for outcome in outcomes),
        "surplus_episodes": sum(outcome.reason == SURPLUS for outcome in outcomes),
        "groups": len(zero_std),
        "usable_groups": int((~zero_std).sum()),
        "trained_groups": len({outcome.row["group_id"] for outcome in used}),
        "completion_tokens": int(sum(len(outcome.row["completion_token_ids"]) for outcome in used)),
    }


def warnings(outcomes: Sequence[Outcome], wanted: int | None = None) -> list[str]:
    """Return why an iteration teaches nothing, or less than it should, in words; nothing where it does.

    Args:
        wanted: `usable_groups` of `dynamic_sampling`.
    """
    found = []
    if all(outcome.row["status"] == "no_image" for outcome in outcomes if outcome.reward is not None):
        found.append("no completion holds a finished image")
    if bool(torch.stack(list(_equal_groups(outcomes).values())).all()):
        found.append("no group's rewards differ, so no episode has an advantage")
    elif wanted is not None and len(usable_groups(outcomes)) < wanted:
        found.append(f"after all rounds, fewer than the {wanted} groups of dynamic_sampling.usable_groups are usable")
    return found


def _mean_score(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean over the episodes whose judgement did not fail; None where the judge was not asked for this score."""
    judged = [row for row in rows if row["status"] == "ok"]
    if not judged or any(row[part] is None for row in judged for part in rewards.PARTS[name]):
        return None
    found = [rewards.episode_reward(row, name) for row in rows]
    return float(np.mean([score for score in found if score is not None]))
