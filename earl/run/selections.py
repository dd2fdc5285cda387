"""Selections from the rollouts of a run (`stage:select/<name>`): which iterations they are of, and where these lie."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from earl.files.layout import Run
from earl.run import replays, state

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.config.sections import Selection
    from earl.run.plan import Plan


def iterations(wanted: "Selection", newest: int) -> range:
    """Return the iterations to select from where ``newest`` is the newest complete one."""
    return range(wanted.first_iteration, (wanted.last_iteration or newest) + 1)


def inputs(wanted: "Selection", plans: "Iterable[Plan]") -> list[Path]:
    """Return what stands for the rollouts and scores: of an iteration that is still to be made, what its job writes.

    Of a complete one these are folders, which are as old as their newest file and which no rule makes.
    """
    plan = _plan_of(wanted, plans)
    run = plan.run if plan else Run(Path(wanted.run))
    to_be_made = _to_be_made(plan)
    found: list[Path] = []
    for index in iterations(wanted, plan.last if plan else state.newest_complete(run)):
        stored = replays.iteration_of(run, index)
        folders = [stored.rollouts(0).parent, stored.scores(0).parent]
        found += [to_be_made[index]] if index in to_be_made else folders
    return list(dict.fromkeys(found))


def problem(config: "Config", name: str, plans: "Iterable[Plan]") -> tuple[str, str] | None:
    """Return the field that is wrong where the run will not have these iterations, and what is wrong with it."""
    wanted, field = config.selections[name], f"selections.{name}.run"
    if _same(wanted.run, Path(config.base_exp_dir) / config.run_name):
        return field, (
            f"is {wanted.run!r}, this very run, which cannot start from what it has sampled itself; give this "
            "experiment a run_name of its own"
        )
    plan = _plan_of(wanted, plans)
    newest = plan.last if plan else state.newest_complete(Run(Path(wanted.run)))
    if not newest:
        return field, (
            f"is {wanted.run!r}, which has no complete iteration; train it first, or name its experiment beside this "
            "one: experiment=<it>,<this>"
        )
    last = wanted.last_iteration or wanted.first_iteration
    if last > newest:
        which = "first" if wanted.last_iteration is None else "last"
        return f"selections.{name}.{which}_iteration", f"is {last}, but {wanted.run} ends with {newest}; lower it"
    run = plan.run if plan else Run(Path(wanted.run))
    made = (index for index in iterations(wanted, newest) if index not in _to_be_made(plan))
    missing = next((path for index in made for path in _files(run, index) if not path.is_file()), None)
    if missing is not None:
        return field, (
            f"is {wanted.run!r}, but {missing} is missing; make it again (snakemake {missing}), or select from other "
            "iterations"
        )
    return None


def _files(run: Run, index: int) -> Iterator[Path]:
    """Yield what is read of a complete iteration: its metrics, rollouts and scores."""
    yield run.iteration(index).metrics
    stored = replays.iteration_of(run, index)
    for shard in range(len(state.read_metrics(run, index)["inputs"]["rollouts"])):
        yield stored.rollouts(shard)
        yield stored.scores(shard)


def _to_be_made(plan: "Plan | None") -> dict[int, Path]:
    """Return the iterations that a plan makes, each with what its job writes."""
    if plan is None:
        return {}
    found = {index: plan.run.segment(part[-1]) for part in plan.segments for index in part}
    return found | {index: plan.run.iteration(index).metrics for index in plan.iterations}


def _plan_of(wanted: "Selection", plans: "Iterable[Plan]") -> "Plan | None":
    return next((plan for plan in plans if _same(wanted.run, plan.run.path)), None)


def _same(one: Path | str, other: Path | str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
