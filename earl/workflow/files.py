"""From a plan and wildcards to files. A rule waits for what these functions return.

An iteration that was complete when the plan was made is *old*. What is made from an old checkpoint does not become out
of date when rule `restore` brings the checkpoint back, so the rules take such inputs as `ancient()`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from earl import tracking
from earl.files import manifest, objects
from earl.messages.errors import EarlError
from earl.run import state
from earl.run.layout import Iteration
from earl.run.plan import Plan


@dataclass(frozen=True)
class Forced:
    """What the user has made again though it is up to date: ``--forceall``, ``--force``, ``--forcerun``."""

    everything: bool = False
    names: frozenset[str] = frozenset()
    """Files and rules."""

    def includes(self, rule: str, files: Iterable[str]) -> bool:
        return self.everything or rule in self.names or not self.names.isdisjoint(files)


@dataclass(frozen=True)
class Needed:
    """Inputs of a rule, and whether they are old."""

    files: list[str]
    is_old: bool = False


def finished(plan: Plan) -> list[str]:
    """Return the files that are there once all iterations and evaluations of a plan are done.

    Where none is left to train, the folder of the last one's metrics: no rule makes it, so nothing old is looked at.
    """
    last = plan.run.iteration(plan.last)
    if plan.segments:
        done = plan.run.segment(plan.last)
    elif plan.iterations:
        done = last.metrics
    else:
        done = last.metrics.parent if plan.last else state.start_record(last)
    return [done.as_posix(), *evaluations(plan, plan.evaluations)]


def sends(plan: Plan) -> list[str]:
    """Return the records of what is to be sent elsewhere."""
    return [(tracking.folder(plan.run) / f"{kind}-{index:06d}.json").as_posix() for kind, index in plan.sends()]


def sent_after(plan: Plan, index: int) -> list[str]:
    """Return what a send waits for: its iteration, or for the last one all there is of the run."""
    if index == plan.last:
        return [*finished(plan), plan.run.report.as_posix()]
    ends_segment = any(index == part[-1] for part in plan.segments)
    return [(plan.run.segment(index) if ends_segment else plan.run.iteration(index).metrics).as_posix()]


def shards(plan: Plan, index: int, kind: str) -> list[str]:
    """Return all shards of an iteration: its ``rollouts`` or its ``scores``."""
    path = getattr(plan.run.iteration(index), kind)
    return [path(shard).as_posix() for shard in range(plan.config.rollout_shards)]


def sampled_from(plan: Plan, index: int, rule: str, made: Iterable[str], forced: Forced) -> Needed:
    """Return what stands for the policy of an iteration, for a rule that makes these files from it."""
    return _checkpoint(plan, index, rule, made, forced, "policy")


def trained_from(plan: Plan, index: int, rule: str, made: Iterable[str], forced: Forced) -> Needed:
    """As `sampled_from`, for a rule that needs the trainer state, too."""
    return _checkpoint(plan, index, rule, made, forced, "policy", "trainer")


def _checkpoint(plan: Plan, index: int, rule: str, made: Iterable[str], forced: Forced, *folders: str) -> Needed:
    made = list(made)
    if index == 0:
        return start(plan)
    item = plan.run.iteration(index)
    if index > plan.newest:
        return Needed([item.metrics.as_posix()])
    # Snakemake makes anew what is made from a missing file. A policy that was dropped is needed only by what is
    # missing, too: to restore it for one stage must not repeat the others.
    if all(map(os.path.exists, made)) and not forced.includes(rule, made):
        return Needed([])
    return Needed([(item.path / folder / manifest.NAME).as_posix() for folder in folders], is_old=True)


def start(plan: Plan) -> Needed:
    """Return the record of the starting policy."""
    return Needed([state.start_record(plan.run.iteration(0)).as_posix()], is_old=plan.newest > 0)


def judge_check(plan: Plan) -> list[str]:
    """Return the report on the judge that a run needs before it starts, if its configuration asks for one."""
    return [plan.run.judge_check.as_posix()] if plan.config.judge_gate else []


def restored(plan: Plan, index: int) -> Iteration:
    """Return the iteration whose checkpoint rule `restore` brings back.

    Raises:
        EarlError: it has not been trained.
    """
    if not 0 < index <= plan.newest:
        raise EarlError(
            f"{plan.key}: iteration {index} has no checkpoint to restore, since complete iterations are 1 to "
            f"{plan.newest}; ask for {plan.run.iteration(index).metrics.as_posix()}"
        )
    return plan.run.iteration(index)


def check_stage(plan: Plan, index: int) -> None:
    """Refuse a stage of an iteration that this workflow does not make by stage.

    Raises:
        EarlError: with what to ask for instead.
    """
    if plan.by_segment and index > plan.newest:
        raise EarlError(
            f"{plan.key}: iteration {index} is not complete, and by segment the workflow makes it as a part of "
            f"{next((plan.run.segment(part[-1]).as_posix() for part in plan.segments if index in part), 'none')}; "
            "ask for that, or set granularity=stage"
        )
    if index > plan.last:
        raise EarlError(f"{plan.key}: there is no iteration {index}, since num_iterations is {plan.last}; raise it")
    metrics = plan.run.iteration(index).metrics
    shards = len(objects.read(metrics)["inputs"]["rollouts"]) if 0 < index <= plan.newest and metrics.is_file() else 0
    if shards not in (0, plan.config.rollout_shards):
        raise EarlError(
            f"{plan.key}: iteration {index} was made in {shards} shards; to make files of it again, set "
            f"rollout_shards={shards}"
        )


def before_segment(plan: Plan, last: int) -> Needed:
    """Return the record of the segment before the one that ends with iteration ``last``, or of the starting policy."""
    ends = [part[-1] for part in plan.segments]
    place = ends.index(last) if last in ends else 0
    return Needed([plan.run.segment(ends[place - 1]).as_posix()]) if place else start(plan)


def outdated_record(plan: Plan, last: int) -> list[str]:
    """Return the file whose making has a segment done again: its record is there, its iterations are not.

    As when some of them were removed by hand.
    """
    is_planned = any(last == part[-1] for part in plan.segments)
    record = plan.run.segment(last)
    return [record.with_suffix(".outdated").as_posix()] if is_planned and record.is_file() else []


def evaluations(plan: Plan, indices: Iterable[int]) -> list[str]:
    """Return the summaries of the planned evaluations of these iterations."""
    names = plan.evaluations
    return [plan.run.evaluation(name, i).summary.as_posix() for i in indices for name in names.get(i, [])]


def evaluations_before_pruning(plan: Plan, index: int) -> list[str]:
    """Return the evaluations of the policies that are dropped once iteration ``index`` is complete."""
    return evaluations(plan, state.Retention.of(plan.config).dropped_by(index))
