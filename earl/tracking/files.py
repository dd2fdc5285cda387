"""What is to be shown of a run, read from its files alone: a row of figures an iteration, and tables of episodes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from earl.config import paths, references
from earl.files import objects, tables
from earl.files.layout import Iteration, Run
from earl.messages.errors import EarlError
from earl.run import state
from earl.stages.evaluate import joined

if TYPE_CHECKING:
    from earl.config.schema import Config

NOT_FIGURES = {"iteration", "inputs"}
PICTURES = ("original", "edited")
FACTS = ("episode_id", "dataset", "example_id", "task", "instruction", "finish_reason", "completion_text", "status")
OUTCOME = ("reward", "advantage", "viescore", "used", "reason")
COLUMNS = ("iteration", *FACTS, *PICTURES, *tables.SCORE_COLUMNS, "raw", *OUTCOME)
"""Columns of a table of episodes; ``raw`` is what the judge said, in its own words."""


@dataclass(frozen=True)
class Row:
    """What an iteration came to.

    Attributes:
        iteration: its number; 0 is the starting policy, of which there is nothing but evaluations.
        policy_digest: of the policy that it made: tells whether an iteration is the one that was sent.
        figures: numbers by name: ``train/<metric>``, ``performance/<figure>``, ``evaluation/<name>/<measure>``.
    """

    iteration: int
    policy_digest: str
    figures: dict[str, float]


def rows(run: Run, config: "Config") -> list[Row]:
    """Return the rows that are final, in order: up to the first iteration of which an evaluation is still to come.

    Raises:
        EarlError: when a file is damaged or lacks a field.
    """
    found = []
    newest = state.newest_complete(run)
    for index in range(newest + 1):
        row = _row(run, config, index, newest)
        if row is None:
            break
        # Of a starting policy that nobody evaluated there is nothing to show.
        if row.figures:
            found.append(row)
    return found


def _row(run: Run, config: "Config", index: int, newest: int) -> Row | None:
    iteration = run.iteration(index)
    source = iteration.metrics if index else state.start_record(iteration)
    metrics = objects.read(source)
    if "policy_digest" not in metrics:
        raise EarlError(f"{source}: field 'policy_digest' is missing; run the stage that writes it again")
    figures = dict(_flat("train", metrics, NOT_FIGURES)) if index else {}
    performance = iteration.metrics.with_name("performance.json")
    if performance.is_file():
        figures |= _flat("performance", objects.read(performance), NOT_FIGURES)
    for name in config.evaluations:
        summary = run.evaluation(name, index).summary
        if summary.is_file():
            figures |= _flat(f"evaluation/{name}", objects.read(summary), NOT_FIGURES)
        elif name in config.evaluations_at(index) and (index == newest or state.has_checkpoint(iteration)):
            return None  # A policy that is in memory or on disk is still to be evaluated.
    return Row(index, metrics["policy_digest"], figures)


def _flat(prefix: str, content: dict[str, Any], without: set[str]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested objects, their keys joined by slashes; texts, lists and nulls are no figures."""
    for key, value in content.items():
        if key in without:
            continue
        if isinstance(value, dict):
            yield from _flat(f"{prefix}/{key}", value, set())
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", value


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning that a run starts from.

    Attributes:
        name: that of its folder, which is the same for all runs that share it.
        curve: numbers by name, ``sft/<measure>``, after step 1, 2, ...
    """

    name: str
    curve: list[dict[str, float]]


def fine_tunings(config: "Config") -> Iterator[FineTuning]:
    """Yield the fine-tunings that are complete, of those that a run starts from one after the other, the last first.

    Raises:
        EarlError: when the file of one is damaged.
    """
    for name in references.fine_tunings(config):
        folder = paths.sft_folder(config, name)
        if (folder / "sft.json").is_file():
            yield FineTuning(folder.name, _curve(objects.read(folder / "sft.json")))


def _curve(content: dict[str, Any]) -> list[dict[str, float]]:
    validation = content.get("validation", {"step": [], "loss": []})
    by_step = {f"sft/{name}": values for name, values in content.items() if isinstance(values, list)}
    rows = [dict(zip(by_step, values, strict=True)) for values in zip(*by_step.values(), strict=True)]
    for step, loss in zip(validation["step"], validation["loss"], strict=True):
        rows[step - 1]["sft/validation_loss"] = loss
    return rows


def has_table(config: "Config", row: Row) -> bool:
    """Return whether the episodes of this iteration are to be shown one by one."""
    return row.iteration > 0 and row.iteration % config.log_episodes_every_n_iterations == 0


def episodes(run: Run, index: int) -> Iterator[dict[str, Any]]:
    """Yield the episodes of an iteration by `COLUMNS`; pictures are encoded images, or None where there is none.

    Raises:
        EarlError: when a file is missing or damaged, or the files do not belong together.
    """
    iteration = run.iteration(index)
    told = tables.read_table(iteration.episodes, tables.EPISODES, ("episode_id", *OUTCOME))
    outcomes = {row["episode_id"]: row for row in told.to_pylist()}
    for row in _judged(iteration):
        if row["episode_id"] not in outcomes:
            raise EarlError(f"{iteration.episodes}: has no episode {row['episode_id']!r}; run the train stage again")
        row |= {name: outcomes[row["episode_id"]][name] for name in OUTCOME}
        row |= {name: (row[name] or {}).get("bytes") for name in PICTURES}
        yield {"iteration": index} | {name: row[name] for name in COLUMNS[1:]}


def _judged(iteration: Iteration) -> Iterator[dict[str, Any]]:
    columns = [name for name in (*FACTS, *PICTURES) if name in tables.ROLLOUTS.names]
    for rollouts in sorted((iteration.path / "rollouts").glob("[0-9]*.parquet")):
        yield from joined(rollouts, iteration.path / "scores" / rollouts.name, columns).to_pylist()
