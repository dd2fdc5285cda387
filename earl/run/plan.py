"""What is left to do of a run: which iterations, in which segments, and which evaluations.

A plan starts after the newest complete iteration. Older iterations are not part of it; the rules still make a file of
theirs that is asked for by name.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config.jsonnet_values import RUN_NAME
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import curriculum, replays, segments, state

if TYPE_CHECKING:
    from earl.config.load import Loaded
    from earl.config.schema import Config


@dataclass(frozen=True)
class Plan:
    """What is left to do of one run.

    Attributes:
        newest: the newest complete iteration.
        checkpoint: the newest complete iteration with a checkpoint, where a segment starts.
        by_segment: one job is a segment, not a stage.
    """

    run: Run
    config: "Config"
    newest: int
    checkpoint: int
    by_segment: bool = True

    @property
    def key(self) -> str:
        """The run folder as text, the workflow's wildcard ``run``."""
        return self.run.path.as_posix()

    @property
    def last(self) -> int:
        """The iteration that the plan ends with; 0 where none is to be trained, and none has been."""
        return self.config.num_iterations if self.segments else max(self.newest, self.config.num_iterations)

    @property
    def iterations(self) -> range:
        """The iterations to be made by stage."""
        return range(0) if self.by_segment else range(self.newest + 1, self.config.num_iterations + 1)

    @cached_property
    def segments(self) -> list[range]:
        """The segments to be made, cut after every multiple of `segment_length` wherever the plan starts.

        So a segment that was killed half-way keeps its end. The first one starts at a checkpoint: iterations after it
        are trained again over their stored scores.
        """
        last, length = self.config.num_iterations if self.by_segment else 0, self.config.segment_length
        ends = [*range(self.checkpoint - self.checkpoint % length + length, last, length), last]
        starts = [self.checkpoint, *ends[:-1]]
        return [range(start + 1, end + 1) for start, end in zip(starts, ends, strict=True) if start < end]

    @cached_property
    def evaluations(self) -> dict[int, list[str]]:
        """The evaluations to be made by stage, by iteration. A segment makes those from its first policy on.

        Of complete iterations these are the missing ones whose policy is on disk.
        """
        end = self.checkpoint if self.segments else self.last + 1
        planned = {}
        for index in range(end):
            wanted = self.config.evaluations_at(index)
            if names := [name for name in wanted if index > self.newest or self._is_pending(name, index)]:
                planned[index] = names
        return planned

    def sends(self) -> list[tuple[str, int]]:
        """Return what is sent elsewhere, and after which iterations: (``wandb`` or ``hub``, iteration).

        During the run, sending waits for the end of the segment that holds an iteration that is due.
        """
        config = self.config
        if not self.last:
            return []
        every = {"wandb": config.wandb_every_n_iterations if config.wandb_mode == "online" else None}
        every |= {"hub": config.push_to_hub_every_n_iterations if config.push_to_hub else None}
        wanted = {"wandb": config.wandb_mode != "disabled", "hub": config.push_to_hub}
        parts = self.segments or [range(index, index + 1) for index in self.iterations]
        between = [
            (kind, part[-1])
            for part in parts
            for kind, n in every.items()
            if n and part[-1] < self.last and part[-1] // n > (part[0] - 1) // n
        ]
        return between + [(kind, self.last) for kind, on in wanted.items() if on]

    @cached_property
    def gaps(self) -> list[int]:
        """Iterations before the newest complete one that have lost their metrics, and that are not trained again."""
        end = self.checkpoint if self.segments else self.newest
        return [i for i in range(1, end) if not self.run.iteration(i).metrics.is_file()]

    def text(self) -> str:
        """Return what is left to do, and what is missing before that, as one line."""
        parts = [f"{self.key}: {self.newest} of {self.config.num_iterations} iterations are complete"]
        if self.segments:
            parts.append(f"segments from iteration {self.segments[0][0]}: {len(self.segments)}")
        if self.iterations:
            parts.append(f"iterations to make by stage: {len(self.iterations)}")
        if self.evaluations:
            parts.append(f"evaluations to make by stage: {sum(map(len, self.evaluations.values()))}")
        parts += [f"iteration {i} has no metrics: ask for {self.run.iteration(i).metrics}" for i in self.gaps[:3]]
        if len(self.gaps) > 3:
            parts.append(f"so have {len(self.gaps) - 3} more")
        return "; ".join(parts)

    def _is_pending(self, name: str, index: int) -> bool:
        if self.run.evaluation(name, index).summary.is_file():
            return False
        return index == 0 or state.has_checkpoint(self.run.iteration(index))


def folder(config: "Config") -> Path:
    """Return the folder of a run."""
    return Path(config.base_exp_dir) / config.run_name


def plan(config: "Config", by_segment: bool = True) -> Plan:
    """Return what is left to do of a run.

    Raises:
        EarlError: the starting policy is gone but needed, a policy is not the one on record, what is trained again has
            scores that do not hold what the reward is made of, or a segment cannot do what the configuration asks for,
            or continue from its checkpoint.
    """
    run = Run(folder(config))
    newest = state.newest_complete(run)
    replays.check_scores(run, config, last=max(state.iterations(run), default=0), first=newest + 1)
    made = Plan(run, config, newest, state.newest_checkpoint(run), by_segment)
    if made.segments:
        segments.check(config)
    if made.segments or made.iterations:
        state.check_policy(run, made.checkpoint)
        curriculum.check(config, run, (made.checkpoint if made.segments else newest) + 1, newest)
        if made.segments and config.kl_coeff:
            state.check_reference(run, config, made.checkpoint + 1)
        if made.checkpoint == 0 or config.kl_coeff or config.lora is not None:  # what is trained next needs it
            state.check_start(run)
        segments.start(config, run)  # By stage, the newest checkpoint is restored from there.
    return made


def spelled_alike(experiments: "Sequence[Loaded]") -> "list[Loaded]":
    """Return experiments whose `base_exp_dir` is one text where it is one folder, however each spells it.

    So runs meet in what they share. The first spelling is taken, relative to the working folder where it is below.

    Raises:
        EarlError: it is no path for Snakemake.
    """
    spellings: dict[str, Path] = {}
    found = []
    for loaded in experiments:
        path = Path(loaded.config.base_exp_dir)
        short = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        if "{" in str(path) or "}" in str(path):
            where = loaded.origin("base_exp_dir")
            raise EarlError(f"field base_exp_dir (in {where}) is {path}: Snakemake takes no braces; choose another")
        spelling = spellings.setdefault(os.path.realpath(path), short)
        config = loaded.config.model_copy(update={"base_exp_dir": spelling.as_posix()})
        found.append(replace(loaded, config=config))
    return found


def by_run(plans: Sequence[Plan]) -> dict[str, Plan]:
    """Return the plans by run folder.

    Raises:
        EarlError: when two experiments would write to the same folder.
    """
    found: dict[str, Plan] = {}
    for item in plans:
        if item.key in found:
            raise EarlError(
                f"{item.key}: two of the experiments have this run folder; give each a run_name of its own. "
                f"Where {RUN_NAME} names them all, unset {RUN_NAME}: each is named after its file then"
            )
        found[item.key] = item
    return found
