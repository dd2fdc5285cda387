"""The state of a run folder: how far it is, which checkpoints it keeps, and how to go back.

Nothing here loads a model or reads Parquet: the workflow asks these questions at every start, also when thousands of
iterations are done.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.emu3 import adapter
from earl.execution import processes
from earl.files import manifest, objects, remedies
from earl.files.layout import Iteration, Run, iteration_name
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config


STAGE = "stage"
"""What a stage says of itself in the lock file of those who write."""


RESTORING = "restore.partial"
"""Folder of a run in which checkpoints are made again, each in one of its own."""


def reference_of(index: int, refresh_every: int | None) -> int:
    """Return the iteration whose policy is the reference while ``index`` trains; 0 is the starting policy.

    Args:
        index: of an iteration, from 1 on.
        refresh_every: `reference_refresh_iterations`.
    """
    return (index - 1) // refresh_every * refresh_every if refresh_every else 0


def reference_at(config: "Config", index: int) -> int:
    """Return `reference_of` by the configuration."""
    return reference_of(index, config.reference_refresh_iterations)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints (``policy`` and ``trainer``) of a run stay on disk.

    The newest checkpoint, and that of the iteration before it, stay to resume from, and so do the references that
    training needs from there, multiples of ``refresh_every``. Of the others, the latest multiple of ``save_every`` is
    kept, every multiple of ``keep_every`` (None: every multiple of ``save_every``), and the last iteration. Iteration 0
    is a link and always stays.
    """

    save_every: int | None
    keep_every: int | None
    last: int
    refresh_every: int | None = None

    @classmethod
    def of(cls, config: "Config") -> "Retention":
        return cls(
            config.save_checkpoints_every_n_iterations,
            config.keep_checkpoints_every_n_iterations,
            config.num_iterations,
            config.reference_refresh_iterations,
        )

    def saves(self, index: int) -> bool:
        """Return whether the checkpoint of iteration ``index`` is kept beyond the next one, for a while or for good."""
        every = (self.save_every, self.keep_every, self.refresh_every)
        return index == self.last or any(n and index % n == 0 for n in every)

    def keeps(self, index: int, newest: int) -> bool:
        """Return whether the checkpoint of iteration ``index`` stays when ``newest`` is the newest checkpoint."""
        if index == 0 or index >= newest - 1 or index == self.last:
            return True
        keep_every = self.save_every if self.keep_every is None else self.keep_every
        if keep_every and index % keep_every == 0:
            return True
        if index in (reference_of(newest, self.refresh_every), reference_of(newest + 1, self.refresh_every)):
            return True
        return bool(self.save_every) and index == newest - newest % self.save_every

    def dropped_by(self, newest: int) -> list[int]:
        """Return the iterations, at most three, whose checkpoints go after ``newest`` where every iteration has one."""
        candidates = {newest - 2, reference_of(newest - 1, self.refresh_every)}
        if self.save_every:
            candidates.add((newest - 1) - (newest - 1) % self.save_every)
        return sorted(i for i in candidates if i > 0 and self.keeps(i, newest - 1) and not self.keeps(i, newest))


@contextmanager
def exclusive(run: Run) -> Iterator[None]:
    """Keep a workflow from working on the run, and wait for one that is just ending.

    A stage is started by the workflow that holds the lock, and goes on under it.

    Raises:
        EarlError: when a workflow is working on the run.
    """
    if processes.in_workflow():
        yield
        return
    with processes.lock(lock_file(run)):
        yield


@contextmanager
def writing(run: Run, alone: bool, what: str = STAGE, patience: float = 10.0) -> Iterator[None]:
    """Write iterations of a run: by a segment ``alone``, by stages together with other stages.

    ``what`` says who writes, and ``patience`` how many seconds to wait for others.

    A workflow that is killed may leave jobs on a cluster. The next one finds those of its own kind again; here it meets
    those of the other kind, which would write the same files.

    Raises:
        EarlError: when the other kind is at work.
    """
    what = f"{what} on {socket.gethostname()}"
    with processes.lock(writing_lock(run), patience, shared=not alone, what=what):
        yield


def segment_name(last: int) -> str:
    """Return what a segment that ends with iteration ``last`` says of itself in the lock file."""
    return f"segment {iteration_name(last)}"


def writing_to(out: Path, run: Run) -> AbstractContextManager[None]:
    """Return :func:`writing` for a stage whose output lies in the run, and nothing for one that lies elsewhere."""
    inside = out.resolve().is_relative_to(run.path.resolve())
    return writing(run, alone=False) if inside else nullcontext()


def writing_lock(run: Run) -> Path:
    """Return the file that those who write iterations hold locked; see :func:`writing`."""
    return run.path / ".writing.lock"


def lock_file(run: Run) -> Path:
    """Return the file that the one workflow working on a run holds locked."""
    return run.path / ".lock"


def iterations(run: Run) -> list[int]:
    """Return the numbers of all iteration folders in ascending order: one directory listing, no look inside.

    Raises:
        EarlError: something in the path of the run is a file.
    """
    try:
        with os.scandir(run.path / "iterations") as entries:
            return sorted(int(entry.name) for entry in entries if entry.name.isdigit())
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise EarlError(
            f"{run.path}: a file stands where a folder has to be; give another base_exp_dir or run_name, or move it"
        ) from error


def has_checkpoint(iteration: Iteration) -> bool:
    """Return whether policy and trainer state are there, whole. Iteration 0 has no trainer state."""
    if iteration.index == 0:
        return start_record(iteration).is_file() and iteration.policy.is_dir()
    return (iteration.policy / manifest.NAME).is_file() and (iteration.trainer / manifest.NAME).is_file()


def newest_complete(run: Run) -> int:
    """Return the newest iteration that has been trained, by its ``train/metrics.json``; 0 when none has.

    Its checkpoint may be gone, or never have been written.
    """
    return next((i for i in reversed(iterations(run)) if i and run.iteration(i).metrics.is_file()), 0)


def newest_checkpoint(run: Run) -> int:
    """Return the newest trained iteration with a whole policy and trainer state; 0 stands for the starting policy."""
    for index in reversed(iterations(run)):
        iteration = run.iteration(index)
        if index and iteration.metrics.is_file() and has_checkpoint(iteration):
            return index
    return 0


def start_record(iteration: Iteration) -> Path:
    """Return the file that says what iteration 0's policy is."""
    return iteration.path / "start.json"


def has_started(run: Run) -> bool:
    """Return whether a run has a starting policy on record, or, damaged, has lost that record and has trained."""
    return start_record(run.iteration(0)).is_file() or newest_complete(run) > 0


def start(run: Run, policy: Path) -> None:
    """Make ``iterations/000000/policy`` a link to the starting policy, and record its digest beside it.

    The link is relative to a policy beside the run, in the same ``base_exp_dir``, which may move as a whole, and
    absolute to one elsewhere. The record, not the link, is what the workflow takes for the stage's output: an output
    may be removed and written again, and removing files below the link would damage the policy itself.

    Raises:
        EarlError: when ``policy`` is not a folder with a model, or not the one that trained iterations started from.
    """
    if not (policy / "config.json").is_file():
        remedies.check_policy_folder(policy)
        raise EarlError(
            f"{policy}: is not a model folder (it has no config.json); set model_path to a folder that "
            "transformers can load, or to a stage such as stage:sft/<name>"
        )
    adapter.check_full(policy)
    first, digest = run.iteration(0), manifest.digest_folder(policy)
    _check_same_start(run, policy, digest)
    first.path.mkdir(parents=True, exist_ok=True)
    target = _link_target(run, policy)
    temporary = first.path / f".policy.tmp-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, first.policy)
    objects.write(start_record(first), {"policy": target, "policy_digest": digest})


def _link_target(run: Run, policy: Path) -> str:
    base, target = run.path.resolve().parent, policy.resolve()
    return os.path.relpath(target, run.iteration(0).path.resolve()) if target.is_relative_to(base) else str(target)


def _check_same_start(run: Run, policy: Path, digest: str) -> None:
    """Refuse a starting policy that is not the one that trained iterations started from, whatever records are left."""
    record = start_record(run.iteration(0))
    if not run.iteration(1).metrics.is_file():
        return
    for path, before in recorded_policies(run, 0).items():
        if before != digest:
            raise EarlError(
                f"{policy}: is policy {digest[:12]}, but {run.path} was trained from {before[:12]} (see {path}); "
                f"put that one back, or give a new run_name; to train them all again: earl rewind --run {run.path} "
                f"--iteration 1, then remove {record}"
            )


def check_start(run: Run) -> None:
    """Check that the link of a run that has started leads to its starting policy, as far as that costs nothing.

    The content of one that nobody has sealed is compared where it is read anyway; see :func:`check_policy`.

    Raises:
        EarlError: it leads to nothing, or to another policy.
    """
    first = run.iteration(0)
    if not start_record(first).is_file():
        return
    if not first.policy.is_dir():
        target = os.readlink(first.policy) if first.policy.is_symlink() else "nothing"
        raise EarlError(
            f"{first.policy}: is a link to {target}, where no folder is; put the starting policy back, or link it "
            f"where it is now: earl start --run {run.path} --policy <its folder>"
        )
    check_policy(run, 0)


def recorded_policies(run: Run, index: int) -> dict[Path, str]:
    """Return the digests that the policy of an iteration has on record, by the file that says so."""
    found = {}
    if index:
        if run.iteration(index).metrics.is_file():
            found[run.iteration(index).metrics] = read_metrics(run, index)["policy_digest"]
        return found
    if (record := start_record(run.iteration(0))).is_file():
        found[record] = str(objects.read(record).get("policy_digest"))
    if run.iteration(1).metrics.is_file():
        found[run.iteration(1).metrics] = read_metrics(run, 1)["inputs"]["policy"]
    return found


def check_policy(run: Run, index: int, digest: str | None = None) -> None:
    """Compare the policy of an iteration with what is on record of it, before anything is made from it.

    Args:
        digest: of its folder; None: that of its manifest, and nothing is compared where it has none.

    Raises:
        EarlError: it is another policy.
    """
    policy = run.iteration(index).policy
    if digest is None:
        if not (policy / manifest.NAME).is_file():
            return
        digest = manifest.digest_folder(policy)
    for path, before in recorded_policies(run, index).items():
        if digest != before:
            remedy = (
                f"remove {policy} and {run.iteration(index).trainer}, and have them made again: earl restore --run "
                f"{run.path} --iteration {index}"
                if index
                else f"link that one again: earl start --run {run.path} --policy <its folder>, or give a new run_name"
            )
            raise EarlError(f"{policy}: is policy {digest[:12]}, but {path} says {before[:12]}; {remedy}")


def check_reference(run: Run, config: "Config", index: int) -> None:
    """Check that the reference that training iteration ``index`` needs is there, where it is a trained policy.

    Raises:
        EarlError: it is gone, or is another policy than the one on record.
    """
    reference = reference_at(config, index)
    folder = run.iteration(reference).policy
    if reference and not folder.is_dir():
        raise EarlError(
            f"{folder}: is missing, but reference_refresh_iterations makes it the reference of iteration {index}; have "
            f"it made again: earl restore --run {run.path} --iteration {reference}"
        )
    check_policy(run, reference)


def read_metrics(run: Run, index: int) -> dict[str, Any]:
    """Return the metrics of an iteration that has some.

    Raises:
        EarlError: they are damaged.
    """
    path = run.iteration(index).metrics
    remedy = f"train from there again: earl rewind --run {run.path} --iteration {index}"
    found = objects.read(path, remedy)
    inputs = found.get("inputs")
    if not isinstance(found.get("policy_digest"), str) or not isinstance(inputs, dict) or "policy" not in inputs:
        raise EarlError(f"{path}: lacks policy_digest or inputs; {remedy}")
    return found


def _remove(folder: Path) -> bool:
    """Remove a folder, its manifest first: one that is half removed must not pass for whole."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
    return True


def _drop_checkpoint(iteration: Iteration) -> bool:
    return any([_remove(iteration.trainer), _remove(iteration.policy)])


def prune(run: Run, retention: Retention, after: int | None = None) -> list[int]:
    """Remove the checkpoints that need not be kept; return their iterations. The newest one always stays.

    Args:
        run: the run.
        retention: which ones stay.
        after: the iteration that has just become complete, by stage: only what it makes superfluous goes, in constant
            time. ``None`` looks at the whole run, and clears away what killed stages left half-written; no stage
            may be running then.
    """
    if after is not None:
        return [index for index in retention.dropped_by(after) if _drop_checkpoint(run.iteration(index))]
    for index in iterations(run):
        _clear_leftovers(run.iteration(index))
    shutil.rmtree(run.path / RESTORING, ignore_errors=True)
    return prune_before(run, retention, newest_checkpoint(run))


def prune_before(run: Run, retention: Retention, newest: int) -> list[int]:
    """Remove the checkpoints before ``newest``, the newest one, that need not be kept; return their iterations."""
    gone = [index for index in iterations(run) if index < newest and not retention.keeps(index, newest)]
    return [index for index in gone if _drop_checkpoint(run.iteration(index))]


def _clear_leftovers(iteration: Iteration) -> None:
    """Remove temporary files and folders of stages that were killed while writing."""
    for pattern in (".*.tmp-*", ".*.old-*"):
        for path in [*iteration.path.glob(pattern), *iteration.path.glob(f"*/{pattern}")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def rewind(run: Run, index: int) -> list[int]:
    """Forget what was trained in iteration ``index`` and after it; return the iterations that lost it.

    Rollouts and scores stay: those of ``index`` are used again. The later ones come from policies that are gone, so
    they are sampled anew. Evaluations of these policies go too. Where the checkpoint before ``index`` is gone, it is
    restored by whatever trains next.

    Raises:
        EarlError: when neither iteration ``index`` nor a later one has been trained.
    """
    trained = [i for i in iterations(run) if i >= index and (run.iteration(i).path / "train").is_dir()]
    if not 1 <= index <= max(trained, default=0):
        raise EarlError(f"{run.path}: iteration {index} has not been trained; `earl status` shows what there is")
    # From the newest backwards: a stop in between leaves a run that has only gone back less far.
    for i in reversed(trained):
        for path in _evaluation_files(run, i):
            path.unlink()
        run.iteration(i).metrics.unlink(missing_ok=True)
        _drop_checkpoint(run.iteration(i))
        shutil.rmtree(run.iteration(i).path / "train")
    return trained


def _evaluation_files(run: Run, index: int) -> Iterator[Path]:
    return (run.path / "evaluations").glob(f"*/{iteration_name(index)}.*")


@dataclass(frozen=True)
class Status:
    """How far a run is: what ``earl status`` prints."""

    run: Run
    started: bool
    newest: int
    last: int
    checkpoints: list[int]
    checkpoint_bytes: int
    evaluations: dict[str, list[int]]
    problems: list[str]
    """What is wrong with the starting policy and the checkpoints, as far as names and sizes tell."""

    def text(self) -> str:
        """Return the status as lines for a terminal."""
        if not self.started:
            return f"{self.run.path}: has not started; {self.last} iterations are planned"
        usable = [index for index in self.checkpoints if index <= self.newest]
        newest = f"newest checkpoint {usable[-1]}" if usable else "no checkpoint"
        lines = [
            f"complete     {self.newest} of {self.last}, {newest}",
            f"checkpoints  {', '.join(map(str, self.checkpoints)) or 'none'} ({self.checkpoint_bytes / 1e6:.1f} MB)",
        ]
        lines += [f"evaluated    {name}: {', '.join(map(str, done))}" for name, done in self.evaluations.items()]
        lines += [f"problem      {problem}" for problem in self.problems]
        return "\n".join(lines)


def status(run: Run, last: int) -> Status:
    """Return how far ``run`` is on its way to iteration ``last``."""
    kept = [i for i in iterations(run) if has_checkpoint(run.iteration(i))]
    folders = [folder for i in kept if i for folder in (run.iteration(i).policy, run.iteration(i).trainer)]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    evaluated = {
        folder.name: sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit())
        for folder in sorted((run.path / "evaluations").glob("*/"))
    }
    return Status(run, has_started(run), newest_complete(run), last, kept, size, evaluated, _problems(run, folders))


def _problems(run: Run, checkpoints: list[Path]) -> list[str]:
    found = []
    for check in (partial(check_start, run), *(partial(manifest.check, folder) for folder in checkpoints)):
        try:
            check()
        except EarlError as error:
            found.append(str(error))
    return found
