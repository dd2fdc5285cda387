"""Where the files of a run lie: path arithmetic only, nothing here touches the disk.

::

    <run>/config.json
    <run>/judge_check.json
    <run>/iterations/000012/{rollouts,scores}/0003.parquet
    <run>/iterations/000012/train/{episodes.parquet,metrics.json,performance.json}
    <run>/iterations/000012/{policy,trainer}/
    <run>/segments/000050.json
    <run>/evaluations/<name>/000012{.rollouts,.scores,}.parquet and 000012.json
    <run>/rescored/<name>/{iterations,evaluations}/... the same, and agreement.json
    <run>/report.html

Iteration ``i`` samples from the policy of iteration ``i - 1`` and trains policy ``i``; iteration 0 holds the starting
policy alone. By stage every iteration has ``policy/`` and ``trainer/`` until retention removes them, in a segment only
some have.
"""

from dataclasses import dataclass
from pathlib import Path


def iteration_name(index: int) -> str:
    """Return the folder name of an iteration: six digits, so that names sort as numbers do."""
    return f"{index:06d}"


@dataclass(frozen=True)
class Iteration:
    """The files of one iteration."""

    path: Path
    scored: Path | None = None
    """The iteration's folder below ``<run>/rescored/<name>``, where its scores are those of another judge."""

    @property
    def index(self) -> int:
        return int(self.path.name)

    @property
    def policy(self) -> Path:
        """Folder of weights, or an adapter, configuration and tokenizer; loads in transformers and vLLM."""
        return self.path / "policy"

    @property
    def trainer(self) -> Path:
        """Folder with the optimizer state: what is needed to go on."""
        return self.path / "trainer"

    @property
    def episodes(self) -> Path:
        return self.path / "train" / "episodes.parquet"

    @property
    def metrics(self) -> Path:
        """Written last: an iteration is complete when this file exists."""
        return self.path / "train" / "metrics.json"

    @property
    def performance(self) -> Path:
        """Seconds, tokens per second, memory: unlike every other file, not the same when it is made again."""
        return self.path / "train" / "performance.json"

    def rollouts(self, shard: int) -> Path:
        return self.path / "rollouts" / f"{shard:04d}.parquet"

    def scores(self, shard: int) -> Path:
        return (self.scored or self.path) / "scores" / f"{shard:04d}.parquet"


@dataclass(frozen=True)
class Evaluation:
    """The files of one evaluation of one iteration's policy."""

    folder: Path
    index: int

    @property
    def rollouts(self) -> Path:
        return self.folder / f"{iteration_name(self.index)}.rollouts.parquet"

    @property
    def scores(self) -> Path:
        return self.folder / f"{iteration_name(self.index)}.scores.parquet"

    @property
    def table(self) -> Path:
        return self.folder / f"{iteration_name(self.index)}.parquet"

    @property
    def summary(self) -> Path:
        return self.folder / f"{iteration_name(self.index)}.json"


@dataclass(frozen=True)
class Run:
    """The files of one run, ``<base_exp_dir>/<run_name>``."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def verification(self) -> Path:
        return self.path / "verify.json"

    @property
    def judge_check(self) -> Path:
        """What the judge reached on images whose order is known, where `judge_gate` asks for it."""
        return self.path / "judge_check.json"

    def segment(self, last: int) -> Path:
        """The record of the segment that ended with iteration ``last``: what it did, and how long that took."""
        return self.path / "segments" / f"{iteration_name(last)}.json"

    def rescored(self, name: str) -> "Run":
        """The folder of another judge's scores of this run's rollouts: laid out as a run."""
        return Run(self.path / "rescored" / name)

    def iteration(self, index: int) -> Iteration:
        return Iteration(self.path / "iterations" / iteration_name(index))

    def evaluation(self, name: str, index: int) -> Evaluation:
        return Evaluation(self.path / "evaluations" / name, index)
