"""What the rules wait for: from a plan and wildcards to files.

An iteration that was complete when the plan was made is old. Its checkpoint may be gone, and rule `restore` brings it
back. What was made from it is not out of date then, so such inputs are passed through Snakemake's `ancient`.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from earl import tracking
from earl.config import paths
from earl.files import manifest
from earl.messages.errors import EarlError
from earl.run import state
from earl.run.plan import Plan
from earl.workflow.shared import Shared

Files = list[str]


def finished(plan: Plan) -> Files:
    """Return the files that are there once all iterations and evaluations of a plan are done.

    Where none is left to train, the folder of the last one's metrics: no rule makes it, so nothing old is planned.
    """
    last = plan.run.iteration(plan.last)
    done = state.start_record(last) if plan.last == 0 else last.metrics.parent
    if plan.segments or plan.iterations:
        done = plan.run.segment(plan.last) if plan.segments else last.metrics
    return [done.as_posix(), *evaluations(plan, plan.evaluations)]


def targets(plan: Plan) -> Files:
    """Return what a plan is for.

    Reports alone would not do: one that is newer than all it is made from counts as up to date, though iterations have
    been asked for since that are not there yet.
    """
    sends = [(tracking.folder(plan.run) / f"{kind}-{index:06d}.json").as_posix() for kind, index in plan.sends()]
    return [*finished(plan), plan.run.report.as_posix(), *sends]


def starting_policy(plan: Plan) -> Path:
    return paths.policy_folder(plan.config, plan.config.model_path)


def evaluations(plan: Plan, indices: Iterable[int]) -> Files:
    """Return the summaries of the planned evaluations of these iterations."""
    names = plan.evaluations
    return [plan.run.evaluation(name, i).summary.as_posix() for i in indices for name in names.get(i, [])]


class Inputs:
    """The inputs of each rule by its wildcards, as Snakemake's `unpack` takes them.

    Args:
        ancient: Snakemake's function.
        forced: returns the rules and files that the command line has made again, None for all.
        force: has the planned jobs of a rule run though their outputs are there.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        shared: Shared,
        ancient: Callable[[Files], Any] = list,
        forced: Callable[[], set[str] | None] = set,
        force: Callable[[str], None] = lambda rule: None,
    ) -> None:
        self.plans, self.shared, self.ancient, self.forced, self.force = plans, shared, ancient, forced, force

    def start(self, w: Any) -> dict[str, Any]:
        plan = self.plans[w.run]
        gate = [plan.run.judge_check.as_posix()] if plan.config.judge_gate else []
        return {"policy": self.shared.file_of(starting_policy(plan)), "gate": self.ancient(gate)}

    def generate(self, w: Any) -> dict[str, Any]:
        plan, index = self._in_shards(w)
        here, shard = plan.run.iteration(index), int(w.shard)
        policy = self._checkpoint(plan, index - 1, "generate", [here.rollouts(shard)], ["policy"])
        # Whether a further round is needed follows from the rounds before.
        earlier = range(shard - shard % plan.config.rollout_shards)
        files = [path.as_posix() for one in earlier for path in (here.rollouts(one), here.scores(one))]
        return {"policy": policy, "earlier": files, **self._sampling(plan, plan.config.train_paths_file)}

    def train(self, w: Any) -> dict[str, Any]:
        """The checkpoint before comes first: Snakemake follows inputs in this order, one step an iteration."""
        plan, index = self._in_shards(w)
        here, shards = plan.run.iteration(index), range(plan.config.rollout_files)
        made = [here.episodes, here.metrics]
        return {
            "checkpoint": self._checkpoint(plan, index - 1, "train", made, ["policy", "trainer"]),
            "rollouts": [here.rollouts(shard).as_posix() for shard in shards],
            "scores": [here.scores(shard).as_posix() for shard in shards],
            "reference": self._checkpoint(plan, state.reference_at(plan.config, index), "train", made, ["policy"]),
            # Pruning after this iteration drops policies that these evaluations need.
            "evaluated": self.ancient(evaluations(plan, state.Retention.of(plan.config).dropped_by(index))),
        }

    def evaluate(self, w: Any) -> dict[str, Any]:
        plan, index = self._by_stage(w)
        if w.evaluation not in plan.config.evaluations:
            there = ", ".join(plan.config.evaluations) or "none"
            raise EarlError(f"{plan.key}: there is no evaluation {w.evaluation}; there are: {there}")
        made = plan.run.evaluation(w.evaluation, index).rollouts
        policy = self._checkpoint(plan, index, "evaluate_generate", [made], ["policy"])
        return {"policy": policy, **self._sampling(plan, paths.evaluation_data(plan.config, w.evaluation).references)}

    def restore(self, w: Any) -> Files:
        """None: what a checkpoint is restored from is on disk."""
        plan, index = self.plans[w.run], int(w.step)
        if not 0 < index <= plan.newest:
            done = f"complete are iterations 1 to {plan.newest}"
            raise EarlError(f"{plan.key}: iteration {index} has no checkpoint to restore: {done}; train it first")
        return []

    def iterate(self, w: Any) -> dict[str, Any]:
        plan, last = self.plans[w.run], int(w.step)
        ends = [part[-1] for part in plan.segments]
        if last not in ends and last > plan.newest:
            planned = f"the next ones end with {', '.join(map(str, ends[:3]))}" if ends else "none is planned"
            remedy = "ask for one of these" if ends else "set granularity=segment, or raise num_iterations"
            raise EarlError(f"{plan.key}: no segment ends with iteration {last}; {planned}; {remedy}")
        place = ends.index(last) if last in ends else 0
        before = [plan.run.segment(ends[place - 1]).as_posix()] if place else self._start(plan)
        if last in ends and plan.run.segment(last).exists():
            # Its iterations or its checkpoint have been removed since. No file need be newer than the record.
            self.force("iterate")
        evaluated = self.ancient(evaluations(plan, plan.evaluations))
        data = self._sampling(plan, paths.prompt_paths(plan.config))
        return {"before": before, "evaluated": evaluated, **data}

    def finished(self, w: Any) -> Files:
        return finished(self.plans[w.run])

    def send(self, w: Any) -> Files:
        """A send waits for its iteration; the last one for all there is of the run."""
        plan, index = self.plans[w.run], int(w.step)
        if index == plan.last:
            return [*finished(plan), plan.run.report.as_posix()]
        is_segment = any(index == part[-1] for part in plan.segments)
        return [(plan.run.segment(index) if is_segment else plan.run.iteration(index).metrics).as_posix()]

    def _sampling(self, plan: Plan, references: list[str]) -> dict[str, Any]:
        vision = self.ancient(self.shared.vision_tokenizer(plan.config))
        return {"vision": vision, "prompts": self.shared.data(plan.config, references)}

    def _start(self, plan: Plan) -> Any:
        record = [state.start_record(plan.run.iteration(0)).as_posix()]
        return self.ancient(record) if plan.newest else record

    def _checkpoint(self, plan: Plan, index: int, rule: str, made: list[Path], folders: list[str]) -> Any:
        """Return what stands for a checkpoint that a rule makes these files from."""
        item, files = plan.run.iteration(index), [path.as_posix() for path in made]
        if index == 0:
            return self._start(plan)
        if index > plan.newest:
            return [item.metrics.as_posix()]
        # Snakemake would make anew whatever has a missing input. So only what has to be made itself has the checkpoint
        # as an input: to restore it for one stage does not repeat the others.
        trained, forced = item.metrics.parent, self.forced()
        is_there = all(map(os.path.exists, files)) and forced is not None and forced.isdisjoint([rule, *files])
        if is_there and not any(_is_newer(item.metrics, path) for path in made):
            return []
        manifests = [(item.path / folder / manifest.NAME).as_posix() for folder in folders]
        return [*([trained.as_posix()] if trained.is_dir() else []), *self.ancient(manifests)]

    def _by_stage(self, w: Any) -> tuple[Plan, int]:
        """Return plan and iteration; EarlError where this workflow does not make the iteration by stage."""
        plan, index = self.plans[w.run], int(w.step)
        if index > max(plan.newest, plan.config.num_iterations):
            raise EarlError(f"{plan.key}: there is no iteration {index}; raise num_iterations")
        if index > plan.newest and plan.segments:
            part = next(part for part in plan.segments if index in part)
            raise EarlError(
                f"{plan.key}: iteration {index} is part of a segment; ask for {plan.run.segment(part[-1])}, or set "
                "granularity=stage"
            )
        return plan, index

    def _in_shards(self, w: Any) -> tuple[Plan, int]:
        """As `_by_stage`; EarlError where the iteration was made in another number of files, too."""
        plan, index = self._by_stage(w)
        is_there = plan.run.iteration(index).metrics.is_file()
        files = len(state.read_metrics(plan.run, index)["inputs"]["rollouts"]) if is_there else 0
        if files not in (0, plan.config.rollout_files):
            shards, odd = divmod(files, plan.config.rounds)
            remedy = "set dynamic_sampling as it was then" if odd else f"set rollout_shards={shards}"
            raise EarlError(f"{plan.key}: iteration {index} was made in other shards; {remedy}")
        return plan, index


def _is_newer(one: Path, other: Path) -> bool:
    return one.exists() and one.stat().st_mtime > other.stat().st_mtime
