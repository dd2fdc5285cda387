"""`earl plan`: what each stage of a run takes of its GPUs, of the disk and of time, before it starts."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.estimate import cases, disk, fit, gpus, loads, models, rates
from earl.estimate.disk import Disk
from earl.estimate.fit import Problem
from earl.estimate.gpus import Asked, Gpu
from earl.estimate.loads import Load
from earl.estimate.rates import Rates, Work
from earl.files import objects
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan, preflight, resources, segments, state

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.config.schema import Config

SPEEDLESS = gpus.gpu("a100")
"""What hours are counted with where the GPU is not known."""


@dataclass(frozen=True)
class Stage:
    """A rule, and what one of its jobs takes.

    Attributes:
        gpu: None where nothing says what GPUs the job gets.
        loads: what the fullest of them holds, phase by phase; none where they are not known.
        gpu_hours: of all its jobs in the run.
    """

    rule: str
    ranks: int
    gpus: int
    gpu: Gpu | None
    loads: list[Load]
    gpu_hours: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        seconds: of an iteration, by phase.
        done: iterations that are complete.
        measured: iterations that these seconds were measured in; 0: they follow from the assumptions.
        evaluated: episodes of all evaluations, None where their number is not known.
        questions: to the judge, in the whole run.
    """

    run_name: str
    iterations: int
    done: int
    by_segment: bool
    stages: list[Stage]
    disk: Disk
    work: Work
    seconds: dict[str, float]
    measured: int
    evaluated: int | None
    questions: int
    problems: list[Problem]
    notes: list[str]
    rates: Rates

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def hours(self) -> float:
        """Of the iterations alone, on the clock."""
        return self.iterations * sum(self.seconds.values()) / 3600


def make(
    configs: Sequence["Config"], by_segment: bool, asked: Callable[[str], Asked], assumed: Rates | None = None
) -> list[Estimate]:
    """Return what runs take, from their first iteration to their last.

    Args:
        asked: from a rule to the GPUs that its jobs ask for.

    Raises:
        NotSimulated: see `cases.simulate`.
    """
    for config in configs:
        _check(config, by_segment)
    on_gpus = [_asked_of(config, by_segment, asked) for config in configs]
    # All of them in one process, which takes longer to start than to simulate one.
    wanted = zip(configs, on_gpus, strict=True)
    cases.simulate([one for config, rules in wanted for one in loads.simulated(config, _known(rules))])
    both = zip(configs, on_gpus, strict=True)
    return [_estimate(config, by_segment, rules, assumed or Rates()) for config, rules in both]


def _check(config: "Config", by_segment: bool) -> None:
    """Refuse what has no estimate: models that are not there, so that nobody knows their shape, and no segment."""
    if problems := [] if state.newest_complete(Run(plan.folder(config))) else [*preflight.missing_models(config)]:
        raise EarlError("; ".join(f"field {field} {message}" for field, message in problems))
    if by_segment and config.num_iterations:
        segments.check(config)


def _asked_of(config: "Config", by_segment: bool, asked: Callable[[str], Asked]) -> dict[str, Asked]:
    planned = loads.rules(config, by_segment)
    return {rule: asked(rule) if config.device != "cpu" else Asked(None, None) for rule in planned}


def _known(rules: Mapping[str, Asked]) -> dict[str, Gpu]:
    return {rule: wanted.gpu for rule, wanted in rules.items() if wanted.gpu}


def _estimate(config: "Config", by_segment: bool, rules: dict[str, Asked], assumed: Rates) -> Estimate:
    text, known = models.text(config), _known(rules)
    gpu = known.get("iterate") or known.get("train") or next(iter(known.values()), SPEEDLESS)
    evaluated, trains = evaluation_episodes(config), {"iterate", "train"}
    taken = disk.of(config, text, by_segment, evaluated or 0)
    seconds, measured = _seconds(config, text, by_segment, gpu, taken.checkpoint, assumed)
    found = Estimate(
        config.run_name,
        config.num_iterations,
        state.newest_complete(Run(plan.folder(config))),
        by_segment,
        [],
        taken,
        rates.work(config, text),
        seconds,
        measured,
        evaluated,
        rates.questions(config) * (config.num_iterations * config.most_episodes + (evaluated or 0)),
        [problem for rule, wanted in rules.items() for problem in fit.problems(config, rule, wanted)],
        [
            *disk.notes(config, taken),
            *(_rounds(config) if config.dynamic_sampling else ()),
            *(note for rule, one in known.items() for note in fit.notes(config, rule, one)),
            *models.notes(config),
            *(_compared(config) if trains & known.keys() else ()),
        ],
        assumed,
    )
    for rule in rules:
        held = resources.gpus(config, rule)
        held_by = loads.of(config, rule, known[rule]) if rule in known else []
        hours = _hours(config, rule, found, gpu) * held
        found.stages.append(Stage(rule, resources.ranks(config, rule), held, known.get(rule), held_by, hours))
    return found


def evaluation_episodes(config: "Config") -> int | None:
    """Return the episodes of all evaluations of a run; None where one takes all the prompts that there are."""
    total = 0
    for index in range(config.num_iterations + 1):
        for name in config.evaluations_at(index):
            evaluation = config.evaluations[name]
            if evaluation.prompts is None:
                return None
            total += evaluation.prompts * evaluation.samples_per_prompt
    return total


def _hours(config: "Config", rule: str, found: Estimate, gpu: Gpu) -> float:
    """Return the hours of all jobs of a rule, one after another."""
    share = (found.evaluated or 0) / config.most_episodes  # evaluations, in iterations
    seconds, count = found.seconds, config.num_iterations
    match rule:
        case "iterate":
            evaluated = share * (seconds.get("generate", 0.0) + seconds.get("score", 0.0))
            return (count * sum(seconds.values()) + evaluated) / 3600
        case "generate":
            return config.rollout_shards * (count + share / config.rollout_shards) * seconds.get("generate", 0.0) / 3600
        case "score":
            return (count + share) * seconds.get("score", 0.0) / 3600
        case "train":
            return count * seconds.get("train", 0.0) / 3600
        case "sft":
            return sum(_tuning_seconds(config, name, gpu, found.rates) for name in loads.fine_tunings(config)) / 3600
    return 0.0


def _tuning_seconds(config: "Config", name: str, gpu: Gpu, assumed: Rates) -> float:
    tuning, length = config.sft[name], models.lengths(config)
    tokens = 2 * length.prompt - models.WORDS + (models.REASONING if tuning.reasoning else 0)
    each = rates.flops_per_token(config, models.text(config, tuning.base_model), tuning)
    flops = tuning.steps * tuning.batch_size * tokens * each
    return flops / (config.train_processes * gpu.flops * assumed.learner_utilization)


def _seconds(
    config: "Config", text: "Emu3TextConfig", by_segment: bool, gpu: Gpu, checkpoint: int, assumed: Rates
) -> tuple[dict[str, float], int]:
    """Return the seconds of an iteration by phase, and how many iterations they were measured in."""
    run = Run(plan.folder(config))
    found, count = measured_segments(run) if by_segment else measured_stages(run)
    if count:
        return found, count
    if config.device == "cpu":  # of which nothing is assumed
        return {}, 0
    # Evaluations of a run without iterations are made by stage.
    how = rates.segment_iteration if by_segment and config.num_iterations else rates.stage_iteration
    return how(config, text, gpu, checkpoint, assumed), 0


def _compared(config: "Config") -> Iterator[str]:
    """Say what the learner's tensors took of a GPU in the newest iteration, beside the estimate."""
    run = Run(plan.folder(config))
    newest = run.iteration(state.newest_complete(run))
    if not newest.index or not newest.performance.is_file():
        return
    found = objects.read(newest.performance)
    if found["device"] != "cpu" and found["ranks"] == config.train_processes:
        taken, expected = max(found["peak_memory_bytes"]), loads.learner(config).peak
        yield (
            f"in iteration {newest.index} the learner's tensors took {taken / 1e9:.1f} GB of a {found['device']}; "
            f"{expected / 1e9:.1f} GB by the estimate"
        )


def _rounds(config: "Config") -> Iterator[str]:
    yield (
        f"dynamic_sampling: iterations that sample all {config.rounds} rounds, {config.most_episodes} episodes, and "
        f"train on {config.most_trained_groups} groups are counted: the most there can be"
    )


def measured_segments(run: Run) -> tuple[dict[str, float], int]:
    """Return the seconds of an iteration, by phase of the first rank, over the segments that are done, and how many
    iterations these trained for the first time."""
    total: dict[str, float] = {}
    count = 0
    for path in sorted((run.path / "segments").glob("*.json")):
        record = objects.read(path)
        if not record.get("trained"):
            continue
        count += len(record["trained"])
        for phase, seconds in record["seconds_by_rank"][0].items():
            total[phase] = total.get(phase, 0.0) + seconds
    return {phase: seconds / count for phase, seconds in total.items()}, count


def measured_stages(run: Run) -> tuple[dict[str, float], int]:
    """Return the seconds of the jobs of an iteration, shards side by side, by Snakemake's own timings, and how many
    iterations have been trained by stage."""
    timed = {rule: _timings(run.path / "benchmarks" / rule) for rule in ("generate", "score", "train")}
    if not all(timed.values()):
        return {}, 0
    return {rule: sum(seconds) / len(seconds) for rule, seconds in timed.items()}, len(timed["train"])


def _timings(folder: Path) -> list[float]:
    found = []
    for path in sorted(folder.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            found += [float(row["s"]) for row in csv.DictReader(file, delimiter="\t")]
    return found


def to_json(found: Estimate, price: float | None) -> dict[str, Any]:
    """Return an estimate as JSON can hold it."""
    cost = None if price is None else price * found.gpu_hours
    return asdict(found) | {"gpu_hours": found.gpu_hours, "hours": found.hours, "cost": cost}
