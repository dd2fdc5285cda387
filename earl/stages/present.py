"""Whether the files of an iteration or an evaluation are there and of the policy in question.

Told by what the files say of themselves, never by their age. A damaged file counts as missing, with a warning: it is
made again.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config import freeze
from earl.files import manifest, objects, tables
from earl.files.layout import Evaluation, Iteration, iteration_name
from earl.messages.errors import EarlError
from earl.stages.generate import wanted

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.run.curriculum import Ledger
    from earl.stages.rounds import Earlier

log = logging.getLogger(__name__)


def rollouts(
    config: "Config",
    iteration: Iteration,
    shard: int,
    policy_digest: str,
    earlier: "Earlier | None" = None,
    ledger: "Ledger | None" = None,
) -> bool:
    """Return whether a shard's rollouts are there: of this policy and these prompts, by this ledger.

    Args:
        earlier: what the rounds before that of the shard have come to; see `earl.stages.generate.run`.
    """
    path = iteration.rollouts(shard)
    told = _metadata(path)
    expected = {"policy_digest": policy_digest} | (earlier.metadata() if earlier else {})
    if expected.items() - told.items() or told.get(tables.LEDGER) != (ledger and ledger.digest):
        return False
    # With another rollout_shards, a file of this name holds other prompts.
    try:
        groups = tables.read_table(path, tables.ROLLOUTS, ("group_id",))["group_id"].unique().to_pylist()
    except EarlError as error:
        log.warning("%s", error)
        return False
    if groups != [f"{iteration_name(iteration.index)}-{index:04d}" for index in wanted(config, shard, earlier)]:
        return False
    _warn_of_change(path, told, config)
    return True


def scores(config: "Config", rollouts: Path, scores: Path) -> bool:
    """Return whether the scores of rollouts are there: of these very rollouts."""
    told = _metadata(scores)
    if not told or told.get("rollouts_digest") != manifest.digest_file(rollouts):
        return False
    _warn_of_change(scores, told, config)
    return True


def evaluation_rollouts(config: "Config", name: str, files: Evaluation, policy_digest: str) -> bool:
    """Return whether the rollouts of an evaluation are there: of this policy, sampled as configured."""
    told = _metadata(files.rollouts)
    wanted = json.dumps(freeze.sampling(config, name))
    return (told.get("policy_digest"), told.get(tables.SAMPLING)) == (policy_digest, wanted)


def evaluation(config: "Config", name: str, files: Evaluation, policy_digest: str) -> bool:
    """Return whether an evaluation is done: its summary is of this policy, sampled as configured."""
    if not all(path.is_file() for path in (files.rollouts, files.scores, files.table, files.summary)):
        return False
    try:
        told = objects.read(files.summary)
    except EarlError as error:
        log.warning("%s", error)
        return False
    return told.get("policy_digest") == policy_digest and freeze.sampling_of(told) == freeze.sampling(config, name)


def _metadata(path: Path) -> dict[str, str]:
    try:
        return tables.read_metadata(path) if path.is_file() else {}
    except EarlError as error:
        log.warning("%s", error)
        return {}


def _warn_of_change(path: Path, told: dict[str, str], config: "Config") -> None:
    """Say that a file is used though the configuration was another one: its change has been accepted, as by stage."""
    if told.get("config_digest") != freeze.config_digest(config):
        log.warning("%s: was made with another configuration and is used; remove it to have it made again", path)
