"""From what the judge said to one reward an episode. Plain Python: no torch, no files.

Rewards live here, in the train stage, and not with the judge: `reward_final_reward` can then be changed and only
training reruns.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config

SUB_SCORES = ("edit_success", "overedit", "naturalness", "artifacts")
FINAL_REWARDS = {
    "viescore": SUB_SCORES,
    "ground_score": ("ground_score",),
    "sqrt(viescore_pqxground_score)": ("naturalness", "artifacts", "ground_score"),
}
"""Options of `reward_final_reward`, with the sub-scores that each is made of."""
COMPONENTS = {
    "semantic_consistency": ("edit_success", "overedit"),
    "perceptual_quality": ("naturalness", "artifacts"),
    **{name: (name,) for name in (*SUB_SCORES, "ground_score")},
}
"""What advantages may be computed of one by one: the least of these sub-scores."""
PARTS = {**COMPONENTS, **FINAL_REWARDS}
"""Every score that can be computed of an episode, with the sub-scores that it needs."""
ASKED_BY = dict.fromkeys(SUB_SCORES, "reward_compute_viescore") | {"ground_score": "reward_compute_ground_score"}
"""The field that has a judge model asked for a sub-score."""
JUDGEMENT_FAILED = "judgement failed"


def needed(config: "Config") -> dict[str, tuple[str, str]]:
    """Return the sub-scores that training needs, each with the field that needs it and this field's value."""
    wanted = [("reward_final_reward", config.reward_final_reward)]
    wanted += [("advantage_components", name) for name in config.advantage_components]
    return {score: (field, which) for field, which in reversed(wanted) for score in PARTS[which]}


def viescore(scores: Mapping[str, float]) -> float:
    """VIEScore overall, 0..10: sqrt(min(SC) * min(PQ)) (Ku et al. 2023, arXiv:2312.14867).

    SC = (edit_success, overedit; 10 = minimal overediting), PQ = (naturalness, artifacts; 10 = none).
    """
    return math.sqrt(component(scores, "semantic_consistency") * component(scores, "perceptual_quality"))


def component(scores: Mapping[str, float], name: str) -> float:
    """One of `COMPONENTS`, 0..10: the least of the scores that it is made of."""
    return float(min(scores[part] for part in COMPONENTS[name]))


def final_reward(scores: Mapping[str, Any], which: str) -> float:
    """Reward 0..10 of a judged episode by the option `reward_final_reward`, or one of its `COMPONENTS`.

    Args:
        scores: the sub-scores, 0..10 each; only those the option needs have to be there.
        which: "viescore", "ground_score", "sqrt(viescore_pqxground_score)" = sqrt(min(PQ) * ground_score), or a name
            of `COMPONENTS`.

    Raises:
        EarlError: unknown option; a sub-score that the option needs is missing, not a number or outside 0..10.
    """
    if which not in PARTS:
        raise EarlError(f"reward_final_reward: unknown option {which!r}; known: {', '.join(PARTS)}")
    for name in PARTS[which]:
        _check_score(name, scores.get(name), which)
    if which == "viescore":
        return viescore(scores)
    if which in COMPONENTS:
        return component(scores, which)
    return math.sqrt(component(scores, "perceptual_quality") * scores["ground_score"])


def _check_score(name: str, value: Any, which: str) -> None:
    if value is None:
        raise EarlError(f"score {name} is missing, and the reward {which!r} needs it; score again with it")
    if not 0.0 <= value <= 10.0:
        raise EarlError(f"score {name} is {value}, outside 0..10; run the score stage again")


def episode_reward(episode: Mapping[str, Any], which: str) -> float | None:
    """Reward of one episode, or None where it cannot be known because the judgement failed.

    An episode that did not stop by itself, or whose completion holds no decodable image, earns 0, and 0 in every
    component: that is the policy's doing. A failed judgement is not, so no reward is made up for it.

    Args:
        episode: `finish_reason` of the rollout, `status` of its score ("ok", "failed", "no_image"), the sub-scores.
        which: as of `final_reward`.
    """
    if episode["finish_reason"] != "stop" or episode["status"] == "no_image":
        return 0.0
    if episode["status"] == "failed":
        return None
    return final_reward(episode, which)


def check_failed_fraction(failed: int, episodes: int, limit: float, where: str, words: str | None = None) -> float:
    """Fraction of episodes whose judgement failed; EarlError with the figures where it is above `limit`.

    Args:
        words: what the judge said of one that failed; the message quotes it.
    """
    fraction = failed / episodes
    if fraction > limit:
        raise EarlError(
            f"{where}: the judge failed on {failed} of {episodes} episodes ({fraction:.1%}), more than "
            f"max_failed_fraction = {limit}; of the first it says: {words or 'nothing'}. Mend the judge, then "
            "ask again (earl judge again --run <the run's folder>) and start again"
        )
    return fraction
