"""Restore stage: bring back the policy of an iteration whose checkpoint was dropped or is damaged.

Training is a function of files that are kept, so it is replayed from the nearest earlier checkpoint over the stored
rollouts and scores. Neither a policy is sampled nor a judge asked, and the result must be, bit for bit, what
`metrics.json` says was there.
"""

import contextlib
import logging
import os
import shutil
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.config import freeze
from earl.config.load import read
from earl.execution import launch, processes, ranks, runtime
from earl.files import manifest
from earl.files.layout import Iteration, Run
from earl.messages.errors import EarlError
from earl.run import claims, replays, state
from earl.stages import train

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)


def run(run_path: Path, iteration: int) -> None:
    """Put `policy/` and `trainer/` of `iteration` back in place.

    The replay happens in a folder of its own below `<run>/restore.partial`, which is removed afterwards whatever
    happens; nothing else in the run changes until the replayed policy has been found equal to the recorded one.

    Raises:
        EarlError: no earlier checkpoint is left, an iteration was trained with another configuration, stored inputs are
            missing or changed, or a replayed policy differs from the recorded one.
    """
    files = Run(Path(run_path))
    target = files.iteration(iteration)
    if not target.metrics.is_file():
        raise EarlError(f"{target.metrics}: is missing, so there is no iteration {iteration} to restore")
    # Another one of the same iteration would remove what this one writes.
    with processes.lock(files.path / f".restore-{target.path.name}.lock"):
        _restore(files, target)


def _restore(files: Run, target: Iteration) -> None:
    iteration = target.index
    if _is_kept(target):
        log.info("restore: iteration %d has its checkpoint: %s", iteration, target.path)
        return
    config = read(files.config)
    start = _nearest_kept(config, files, iteration)
    _check_configuration(config, files, start + 1, iteration)
    log.info("restore: replaying iterations %d to %d from %s", start + 1, iteration, files.iteration(start).policy)
    for index in range(start + 1, iteration + 1):
        _check_inputs(files, index)
    claims.claim(config, "restore", max(_ranks(files.iteration(index)) for index in range(start + 1, iteration + 1)))
    scratch = Run(files.path / state.RESTORING / target.path.name)
    shutil.rmtree(scratch.path, ignore_errors=True)
    try:
        _link_record(files, scratch)
        linked = {0, start, state.reference_at(config, start + 1)}
        for index in linked:
            _link(files.iteration(index), scratch.iteration(index), ("policy", "trainer"))
        for stretch in _stretches(files, start + 1, iteration):
            _replay(config, files, scratch, stretch)
            needed = {*linked, stretch[-1], state.reference_at(config, stretch[-1] + 1)}
            for index in set(state.iterations(scratch)) - needed:
                _drop(scratch.iteration(index))
        _put_in_place(scratch.iteration(iteration), target)
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # Another iteration is being restored.
            scratch.path.parent.rmdir()


def _is_kept(iteration: Iteration) -> bool:
    """Whether training can go on from here: a whole policy and trainer, or the starting policy, sealed or not.

    A checkpoint that is damaged, or is not the one on record, counts as dropped.
    """
    if iteration.index == 0:
        return iteration.policy.is_dir()
    if not state.has_checkpoint(iteration):
        return False
    try:
        state.check_policy(Run(iteration.path.parents[1]), iteration.index)
        for folder in (iteration.policy, iteration.trainer):
            manifest.check(folder, deep=True)
    except EarlError as error:
        log.warning("restore: %s", error)
        return False
    return True


def _nearest_kept(config: "Config", files: Run, iteration: int) -> int:
    for index in range(iteration - 1, -1, -1):
        needed = {index, state.reference_at(config, index + 1)}
        if all(_is_kept(files.iteration(one)) for one in sorted(needed)):
            return index
    raise EarlError(
        f"{files.iteration(0).policy}: is missing, and no checkpoint is left before iteration {iteration}; "
        "put the starting policy back"
    )


def _recorded(iteration: Iteration) -> dict[str, Any]:
    return state.read_metrics(Run(iteration.path.parents[1]), iteration.index)


def _check_configuration(config: "Config", files: Run, first: int, last: int) -> None:
    """Refuse to train again what another configuration trained: it would end in another policy."""
    digest = freeze.config_digest(config)
    others = [
        index
        for index in range(first, last + 1)
        if _recorded(files.iteration(index)).get("config_digest", digest) != digest
    ]
    if others:
        together = others[1:] == list(range(others[0] + 1, others[-1] + 1))
        named = f"{others[0]} to {others[-1]}" if together else ", ".join(map(str, others))
        were = f"iterations {named} were" if others[1:] else f"iteration {others[0]} was"
        raise EarlError(
            f"{files.iteration(others[0]).metrics}: {were} trained with another configuration than the present one "
            "and cannot be made again with it; go back to the old values of the fields that changed "
            "(accept_changes=true takes them) and restore, or train again from there: "
            f"earl rewind --run {files.path} --iteration {others[0]}"
        )


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


def _stretches(files: Run, first: int, last: int) -> list[list[int]]:
    """Return the iterations in stretches that are trained at once: those of one process together, others alone.

    Each is trained by as many ranks as then: sums over another number of them differ in the last bits.
    """

    def key(index: int) -> int:
        return 0 if _ranks(files.iteration(index)) == 1 else index

    return [list(stretch) for _, stretch in groupby(range(first, last + 1), key)]


def _ranks(iteration: Iteration) -> int:
    return _recorded(iteration).get("ranks", 1)


def _replay(config: "Config", files: Run, scratch: Run, stretch: list[int]) -> None:
    """Train iterations again; the last one gets a checkpoint, and so does the reference of the one after it."""
    for index in stretch:
        _link(files.iteration(index), scratch.iteration(index), ("rollouts", "scores"))
    processes = _ranks(files.iteration(stretch[0]))
    if processes > 1:
        _train_by(processes, config, files, scratch, stretch[0])
        return
    with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as team:
        learner = train.load(config, scratch, stretch[0] - 1, team)
        kept = {stretch[-1], state.reference_at(config, stretch[-1] + 1)}
        for index in stretch:
            shards = _files(files.iteration(index))
            train.step(config, scratch, learner, team, checkpoint=index in kept, shards=shards)
            _compare(files.iteration(index), scratch.iteration(index))


def _train_by(processes: int, config: "Config", files: Run, scratch: Run, index: int) -> None:
    freeze.write(config.in_files(_files(files.iteration(index))), scratch.config, accept_changes=True)
    arguments = ["train", "--config", scratch.config, "--iteration", index, "--run", scratch.path]
    if launch.launch(config, [str(argument) for argument in arguments], processes):
        raise EarlError(f"{scratch.iteration(index).path}: training again by {processes} ranks failed, see above")
    _compare(files.iteration(index), scratch.iteration(index))


def _files(iteration: Iteration) -> int:
    return len(_recorded(iteration)["inputs"]["rollouts"])


def _compare(before: Iteration, again: Iteration) -> None:
    recorded, replayed = _recorded(before), _recorded(again)
    if replayed["policy_digest"] != recorded["policy_digest"]:
        raise EarlError(
            f"{before.metrics}: replaying iteration {before.index} gave another policy than the one on record. "
            f"{train.differences(replayed, recorded)}. Replay with the code and configuration of then"
        )


def _link(source: Iteration, target: Iteration, names: tuple[str, ...]) -> None:
    target.path.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source.path / name).exists():
            (target.path / name).symlink_to((source.path / name).resolve())


def _link_record(files: Run, scratch: Run) -> None:
    """A replay says in a file where the rollouts and scores lie that it is trained on."""
    record = replays.record_file(files)
    if record.is_file():
        scratch.path.mkdir(parents=True)
        replays.record_file(scratch).symlink_to(record.resolve())


def _drop(iteration: Iteration) -> None:
    """Bound the disk: of a replay in progress only the newest checkpoint is needed, and its reference."""
    for folder in (iteration.policy, iteration.trainer):
        if folder.is_dir():
            shutil.rmtree(folder)


def _put_in_place(source: Iteration, target: Iteration) -> None:
    # The policy last: an iteration that has one is taken for restored.
    for name in ("trainer", "policy"):
        shutil.rmtree(target.path / name, ignore_errors=True)
        os.rename(source.path / name, target.path / name)
        log.info("restore: %s", target.path / name)
