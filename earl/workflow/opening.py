"""What happens before the first job: experiments become plans, and runs are locked for this workflow alone."""

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO

from earl import tracking
from earl.config import freeze, load, paths
from earl.estimate import fit, gpus
from earl.estimate.cases import NotSimulated
from earl.execution import processes
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan as planning
from earl.run import preflight, segments, state
from earl.run.plan import Plan
from earl.run.unreached import unreached
from earl.workflow.settings import Settings
from earl.workflow.shared import Shared


def make_plans(
    settings: Settings,
    is_main: bool = True,
    stages_run_here: bool = True,
    resources: gpus.Resources = lambda rule: {},
) -> dict[str, Plan]:
    """Return what is to be done, by run folder.

    Args:
        is_main: this process plans, and does not run a job of another one's plan; so it checks what the plan needs.
        stages_run_here: stages run in the environment of this process, so that what is not installed here is missing.

    Raises:
        EarlError: a configuration is wrong or differs from that of its run, or what is left of a run is sure to fail;
            of every experiment at once.
    """
    plans: list[Plan] = []
    sources: list[load.Loaded] = []
    problems: list[str] = []
    experiments: list[load.Loaded] = []
    for path in settings.experiment:
        with _kept(problems):
            experiments.append(load.load(path, settings.set, load.WORKFLOW))
    for loaded in planning.spelled_alike(experiments):
        with _kept(problems):
            run = Run(planning.folder(loaded.config))
            if not settings.accept_changes:
                freeze.check(loaded.config, run.config, load.WORKFLOW)
            freeze.check_evaluations(loaded.config, run)
            plans.append(planning.plan(loaded.config, settings.granularity == "segment"))
            sources.append(loaded)
    for plan, loaded in zip(plans, sources, strict=True) if is_main else ():
        with _kept(problems):
            _check(plan, loaded, stages_run_here, plans, resources if settings.check_memory else None)
    by_run: dict[str, Plan] = {}
    with _kept(problems):
        by_run = planning.by_run(plans)
    if problems:
        raise EarlError("\n\n".join(problems))
    return by_run


@contextmanager
def _kept(problems: list[str]) -> Iterator[None]:
    """Put what stops one experiment on a list, so that the others are looked at, too."""
    try:
        yield
    except EarlError as error:
        if str(error) not in problems:  # Such as a wrong `set=`, which is the same for all.
            problems.append(str(error))


def _check(
    plan: Plan, loaded: load.Loaded, stages_run_here: bool, plans: Sequence[Plan], resources: gpus.Resources | None
) -> None:
    """Stop where what is left of a run is sure to fail; say what is left, and what it will only miss."""
    started = state.start_record(plan.run.iteration(0)).is_file()
    if not started or plan.segments or plan.iterations or plan.evaluations:
        preflight.check(plan.config, loaded.origin, started, stages_run_here, plans)
        if resources is not None:
            _check_memory(plan, loaded, stages_run_here, resources)
    tracking.check_hub(plan.config)
    print(plan.text(), file=sys.stderr)
    for field, message in unreached(plan.config):
        print(f"{plan.key}: field {field} {message}", file=sys.stderr)
    for name, references in paths.trained_on(plan.config).items():
        common = ", ".join(references)
        print(f"{plan.key}: evaluations.{name} is of {common}, which is trained on, too: not held out", file=sys.stderr)
    if plan.segments and (idle := segments.idle_ranks(plan.config, segments.processes(plan.config))):
        print(f"{plan.key}: {idle}", file=sys.stderr)
    if missing := tracking.missing(plan.config):
        print(f"{plan.key}: {missing}", file=sys.stderr)


def _check_memory(plan: Plan, loaded: load.Loaded, stages_run_here: bool, resources: gpus.Resources) -> None:
    """Stop where a stage does not fit on its GPUs. Costs nothing where none is used, or nobody knows what they hold."""
    if plan.config.device == "cpu":
        return
    machine = gpus.here() if stages_run_here else gpus.Asked(None, None)

    def asked(rule: str) -> gpus.Asked:
        return gpus.asked(resources(rule)).or_of(machine)

    try:
        fit.refuse(plan.config, fit.check(plan.config, plan.by_segment, asked), loaded.origin)
    except NotSimulated as error:
        print(f"{plan.key}: whether it fits on its GPUs was not checked: {error}", file=sys.stderr)


def hold(
    plans: Mapping[str, Plan], shared: Shared, settings: Settings, outputs: Collection[str]
) -> list[IO[str] | None]:
    """Lock what is to be written, and write each run's configuration where the stages read it.

    Where another workflow has meanwhile made what was to be made, plan again, as called; this does not return then.

    Args:
        outputs: what the jobs of this call write; `--until` or a target leaves out some of what the plans need.

    Returns:
        The locks. They end with this process, in whatever way it ends.

    Raises:
        EarlError: another workflow is writing to a run, or its configuration has changed.
    """
    missing, locks = shared.missing(outputs), []
    for path in missing:
        made = partial(os.path.exists, shared.file_of(path))
        locks.append(processes.lock_unless(made, path.parent / f".{path.name}.lock", path.as_posix()))
    locks += [processes.lock(state.lock_file(plan.run)) for plan in plans.values()]
    have_waited = [_wait_for_writers(plan) for plan in plans.values()]
    is_outdated = any(have_waited) or any(state.newest_complete(plan.run) != plan.newest for plan in plans.values())
    if is_outdated or shared.missing(outputs) != missing:
        os.execv(sys.executable, sys.orig_argv)
    for plan in plans.values():
        freeze.write(plan.config, plan.run.config, accept_changes=settings.accept_changes)
    return locks


def _wait_for_writers(plan: Plan) -> bool:
    """Wait for jobs that an earlier workflow has left and this plan does not have; return whether there were any.

    Those that it has are found by the executor: by segment the segment that comes first, by stage all stages.
    """
    path = state.writing_lock(plan.run)
    mine = state.segment_name(plan.segments[0][-1]) if plan.segments else state.STAGE
    is_told = False
    while processes.try_lock(path) is None:
        holder = processes.holder_of(path)
        if f"({mine} on " in holder:
            return is_told
        if not is_told:
            print(
                f"{plan.key}: waiting for process {holder} of an earlier workflow, which this plan does not have; "
                "the plan is made again when it ends, or is cancelled",
                file=sys.stderr,
                flush=True,
            )
            is_told = True
        time.sleep(0.5)
    return is_told
