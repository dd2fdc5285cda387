"""Restore stage: bring back the policy of an iteration whose checkpoint was dropped or is damaged.

Training is a function of files that are kept, so it is replayed from the nearest earlier checkpoint over the stored
rollouts and scores. Neither a policy is sampled nor a judge asked, and the result must be, bit for bit, what
`metrics.json` says was there.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl import code_version
from earl.config import freeze
from earl.config.load import read
from earl.execution import launch
from earl.files import manifest
from earl.messages.errors import EarlError
from earl.run import replays, state
from earl.run.layout import Iteration, Run
from earl.stages import train

if TYPE_CHECKING:
    from earl.config.schema import Config

SCRATCH = "restore.partial"

log = logging.getLogger(__name__)


def run(run_path: Path, iteration: int) -> None:
    """Put `policy/` and `trainer/` of `iteration` back in place.

    The replay happens in `<run>/restore.partial`, which is removed afterwards whatever happens; nothing else in the
    run changes until the replayed policy has been found equal to the recorded one.

    Raises:
        EarlError: no earlier checkpoint is left, stored inputs are missing or changed, or a replayed policy differs
            from the recorded one.
    """
    files = Run(Path(run_path))
    target = files.iteration(iteration)
    if _is_kept(target):
        log.info("restore: iteration %d has its checkpoint: %s", iteration, target.path)
        return
    config = read(files.config)
    start = _nearest_kept(files, iteration)
    log.info("restore: replaying iterations %d to %d from %s", start + 1, iteration, files.iteration(start).policy)
    for index in range(start + 1, iteration + 1):
        _check_inputs(files, index)
    scratch = Run(files.path / SCRATCH)
    shutil.rmtree(scratch.path, ignore_errors=True)
    try:
        _link_record(files, scratch)
        for index in sorted({0, start}):
            _link(files.iteration(index), scratch.iteration(index), ("policy", "trainer"))
        for index in range(start + 1, iteration + 1):
            _replay(config, files, scratch, index)
            if index - 1 > start:
                _drop(scratch.iteration(index - 1))
        _put_in_place(scratch.iteration(iteration), target)
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)


def _is_kept(iteration: Iteration) -> bool:
    """Whether training can go on from here: a whole policy and trainer, or the starting policy, sealed or not.

    A damaged checkpoint counts as dropped.
    """
    if iteration.index == 0:
        return iteration.policy.is_dir()
    if not state.has_checkpoint(iteration):
        return False
    try:
        for folder in (iteration.policy, iteration.trainer):
            manifest.check(folder, deep=True)
    except EarlError as error:
        log.warning("restore: %s", error)
        return False
    return True


def _nearest_kept(files: Run, iteration: int) -> int:
    for index in range(iteration - 1, -1, -1):
        if _is_kept(files.iteration(index)):
            return index
    raise EarlError(
        f"{files.iteration(0).policy}: is missing, and no checkpoint is left before iteration {iteration}; "
        "put the starting policy back"
    )


def _recorded(iteration: Iteration) -> dict[str, Any]:
    try:
        return json.loads(iteration.metrics.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise EarlError(
            f"{iteration.metrics}: cannot be read ({error}), so iteration {iteration.index} cannot be checked after a "
            "replay; run the iteration again"
        ) from error


def _check_inputs(files: Run, index: int) -> None:
    """The stored rollouts and scores must be those that the iteration was trained on."""
    inputs = _recorded(files.iteration(index))["inputs"]
    for name in ("rollouts", "scores"):
        for shard, expected in enumerate(inputs[name]):
            path = getattr(replays.iteration_of(files, index), name)(shard)
            found = manifest.digest_file(path)
            if found != expected:
                raise EarlError(
                    f"{path}: its digest is {found}, but iteration {index} was trained on {expected}; "
                    "put the old file back, or run the iterations from here again"
                )


def _replay(config: "Config", files: Run, scratch: Run, index: int) -> None:
    recorded = _recorded(files.iteration(index))
    _link(files.iteration(index), scratch.iteration(index), ("rollouts", "scores"))
    _train(config, scratch, index, len(recorded["inputs"]["rollouts"]), recorded.get("ranks", 1))
    replayed = _recorded(scratch.iteration(index))
    if replayed["policy_digest"] != recorded["policy_digest"]:
        raise EarlError(
            f"{files.iteration(index).metrics}: replaying iteration {index} gave policy "
            f"{replayed['policy_digest']}, but {recorded['policy_digest']} is recorded. "
            f"Code: {code_version()} now, {recorded['code_version']} then. "
            f"Configuration: {replayed['config_digest']} now, {recorded['config_digest']} then. "
            "Replay with the code and configuration of then"
        )


def _train(config: "Config", scratch: Run, index: int, shards: int, processes: int) -> None:
    """Train by as many ranks as then: sums over another number of them differ in the last bits."""
    if processes == 1:
        train.run(config, scratch.path, index, shards)
        return
    freeze.write(config.model_copy(update={"rollout_shards": shards}), scratch.config, accept_changes=True)
    arguments = ["train", "--config", scratch.config, "--iteration", index, "--run", scratch.path]
    if launch.launch(config, [str(argument) for argument in arguments], processes):
        raise EarlError(f"{scratch.iteration(index).path}: training again by {processes} ranks failed, see above")


def _link(source: Iteration, target: Iteration, names: tuple[str, ...]) -> None:
    target.path.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source.path / name).exists():
            (target.path / name).symlink_to((source.path / name).resolve())


def _link_record(files: Run, scratch: Run) -> None:
    """A replay says in a file where the rollouts and scores lie that it is trained on."""
    record = replays.record_file(files)
    if record.is_file():
        scratch.path.mkdir()
        replays.record_file(scratch).symlink_to(record.resolve())


def _drop(iteration: Iteration) -> None:
    """Bound the disk: of a replay in progress only the newest checkpoint is needed."""
    for folder in (iteration.policy, iteration.trainer):
        shutil.rmtree(folder)


def _put_in_place(source: Iteration, target: Iteration) -> None:
    # The policy last: an iteration that has one is taken for restored.
    for name in ("trainer", "policy"):
        shutil.rmtree(target.path / name, ignore_errors=True)
        os.rename(source.path / name, target.path / name)
        log.info("restore: %s", target.path / name)
