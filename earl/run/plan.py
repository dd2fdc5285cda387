"""What the workflow has to do for one run: which iterations, in which windows, and which evaluations.

Planning every iteration at once costs time and memory that grow with the run. So one plan covers a window: it starts
at the newest complete iteration, ``start``, whose policy is taken as given, and ends at ``stop``. Where more than one
window remains, the workflow plans a chain of windows and each window plans its own iterations.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config.evaluate import RUN_NAME
from earl.messages.errors import EarlError
from earl.run import replays, state
from earl.run.layout import Run, iteration_name

if TYPE_CHECKING:
    from earl.config.load import Loaded
    from earl.config.schema import Config

NOTHING = r"(?!)"
"""Regular expression that matches nothing: the constraint of a wildcard that has no value in this plan."""


@dataclass(frozen=True)
class Plan:
    """The part of a run that is planned now: iterations ``start + 1`` to ``stop``.

    ``single`` is the number of the one iteration that the user wants to run a stage of again, or ``None``.
    """

    run: Run
    config: "Config"
    start: int
    stop: int
    single: int | None = None

    @property
    def key(self) -> str:
        """The run folder as text, the workflow's wildcard ``run``."""
        return self.run.path.as_posix()

    @property
    def retention(self) -> state.Retention:
        return state.Retention.of(self.config)

    @property
    def iterations(self) -> range:
        return range(self.start + 1, self.stop + 1)

    @cached_property
    def windows(self) -> list[range]:
        """The planned iterations, cut after every multiple of ``config.segment_length``, wherever the plan starts.

        So a window that a stop left half done is the same one, with the same end, for a workflow that starts anew.
        """
        length = self.config.segment_length
        cuts = [*range(self.start - self.start % length + length, self.stop, length), self.stop]
        starts = [self.start, *cuts[:-1]]
        return [range(first + 1, last + 1) for first, last in zip(starts, cuts, strict=True) if first < last]

    @cached_property
    def evaluations(self) -> dict[int, list[str]]:
        """The evaluations to make, by iteration: those of planned iterations, and older ones that are missing.

        An older one is planned only while the policy it needs is on disk.
        """
        if self.single is not None:
            return {self.single: list(self.config.evaluations)}
        planned: dict[int, list[str]] = {}
        for name, evaluation in self.config.evaluations.items():
            every = evaluation.every_n_iterations
            for index in sorted({*range(0, self.stop + 1, every), self.config.num_iterations}):
                if index <= self.stop and (index > self.start or self._is_pending(name, index)):
                    planned.setdefault(index, []).append(name)
        return planned

    def sends(self, whole: bool, chain: bool) -> list[tuple[str, int]]:
        """Return what is sent elsewhere, and after which iterations: (``wandb`` or ``hub``, iteration).

        Args:
            whole: the plan ends the run, so the last send belongs to it.
            chain: nothing is sent between iterations: windows make them, and send what is theirs if they can.
        """
        if self.single is not None or not self.stop:
            return []
        config = self.config
        every = {"wandb": config.wandb_every_n_iterations if config.wandb_mode == "online" else None}
        every |= {"hub": config.push_to_hub_every_n_iterations if config.push_to_hub else None}
        wanted = {"wandb": config.wandb_mode != "disabled", "hub": config.push_to_hub}
        between = [] if chain else [index for index in self.iterations if index < config.num_iterations]
        sends = [(kind, index) for index in between for kind, n in every.items() if n and index % n == 0]
        return sends + [(kind, self.stop) for kind, on in wanted.items() if on and whole]

    def _is_pending(self, name: str, index: int) -> bool:
        if self.run.evaluation(name, index).summary.is_file():
            return False
        return index in (0, self.start) or state.has_checkpoint(self.run.iteration(index))

    def dependents(self) -> str:
        """Say what the results of the single iteration flow into."""
        index = self.single
        later = [i for i in state.iterations(self.run) if index is not None and i > index]
        lines = [
            f"iteration {index} of {self.key} alone is planned. What depends on its stages:",
            f"  rollouts/<shard>  -> scores/<shard> -> train -> policy of iteration {index}",
        ]
        if later:
            lines.append(f"  policy            -> iterations {later[0]} to {later[-1]}, and their evaluations")
        lines.append(f"  policy            -> evaluations of iteration {index}, and the report")
        lines.append(f"To train again from here on: earl rewind --run {self.key} --iteration {index}, and go on.")
        return "\n".join(lines)


def plan(config: "Config", last: int | None = None, single: int | None = None) -> Plan:
    """Return what is left to do of a run, or the part of it that ``last`` or ``single`` names.

    Args:
        config: the run's resolved configuration.
        last: plan one window, from the newest complete iteration to this one.
        single: plan this one iteration, whatever comes after it.

    Raises:
        EarlError: when ``single`` is not an iteration of the run, the starting policy is gone but needed, or what is
            trained again has scores that do not hold what the reward is made of.
    """
    run = Run(Path(config.base_exp_dir) / config.run_name)
    if single is not None:
        newest = state.newest_complete(run)
        if not 0 <= single <= newest:
            raise EarlError(f"iteration={single}: {run.path} has complete iterations 1 to {newest}; choose one of them")
        state.check_start(run)
        return Plan(run, config, max(single - 1, 0), single, single)
    start = state.newest_complete(run)
    if start < config.num_iterations and (start == 0 or config.kl_coeff):  # what is trained next needs it
        state.check_start(run)
    replays.check_scores(run, config, last=max(state.iterations(run), default=0), first=start + 1)
    if last is not None:
        return Plan(run, config, min(start, last), last)
    return Plan(run, config, start, max(start, config.num_iterations))


def spelled_alike(experiments: "Sequence[Loaded]") -> "list[Loaded]":
    """Return experiments whose `base_exp_dir` is one text where it is one folder, however each spells it.

    So runs meet in what they share. The first spelling is taken, relative to the working folder where it is below.
    """
    spellings: dict[str, Path] = {}
    found = []
    for loaded in experiments:
        path = Path(loaded.config.base_exp_dir)
        short = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        spelling = spellings.setdefault(os.path.realpath(path), short)
        config = loaded.config.model_copy(update={"base_exp_dir": spelling.as_posix()})
        found.append(replace(loaded, config=config))
    return found


def choose(plans: Sequence[Plan]) -> dict[str, Plan]:
    """Return the plans by run folder.

    Raises:
        EarlError: when two experiments would write to the same folder.
    """
    chosen: dict[str, Plan] = {}
    for item in plans:
        if item.key in chosen:
            raise EarlError(
                f"{item.key}: two of the experiments have this run folder; give each a run_name of its own. "
                f"Where {RUN_NAME} names them all, unset {RUN_NAME}: each is named after its file then"
            )
        chosen[item.key] = item
    return chosen


def alternation(values: Sequence[str]) -> str:
    """Return a regular expression that matches exactly ``values``."""
    return "|".join(re.escape(value) for value in values) or NOTHING


def constraint(indices: dict[str, Sequence[int]], between: str) -> str:
    """Return the regular expression of the wildcard ``run`` for files ``{run}/<between>/{step}...``.

    Runs of one plan have different windows, so what may follow depends on the run: each run's name is followed by a
    look-ahead at its own iterations.
    """
    return (
        "|".join(
            f"{re.escape(run)}(?={between}(?:{alternation([iteration_name(i) for i in steps])})\\b)"
            for run, steps in indices.items()
            if steps
        )
        or NOTHING
    )
