"""Iterate: many iterations of a run in one program that keeps its models in memory. This is the learning loop.

A segment writes the files that the stages write one by one, with the same bytes, apart from checkpoints: it has the
policy in memory and saves it only now and then. What is on disk already and belongs to the policy in memory is used as
it is. So a segment that was killed starts from the newest checkpoint, trains again over the stored scores, asking
neither policy nor judge, and continues with the first file that is missing.

Every rank of the program samples and scores its shards, shard s on rank s % size, with an engine of its own. The first
`train_processes` ranks train. Engine and learner take turns on a GPU: the engine sleeps while the learner works.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl import code_version, judges
from earl.config import freeze
from earl.execution import broadcast, ranks, runtime
from earl.execution.ranks import Ranks
from earl.files import manifest, objects
from earl.learner.performance import Clock
from earl.messages.errors import EarlError
from earl.run import replays, segments, state
from earl.run.layout import Run
from earl.stages import evaluate, generate, present, score, train

if TYPE_CHECKING:
    import torch

    from earl.config.schema import Config

log = logging.getLogger(__name__)


def run(config: "Config", run_path: Path, to: int) -> dict[str, Any]:
    """Make a run's iterations up to ``to`` and the evaluations of their policies; return the segment's record.

    Under torchrun every rank calls this. The run has been started (`earl.run.state.start`) and its data are there.

    Args:
        run_path: the run's folder.
        to: the last iteration of the segment, whose checkpoint is written at its end.

    Raises:
        EarlError: the configuration cannot be run as a segment, the run has not been started, or a stage fails. What
            was written until then is used by the next call.
    """
    files = Run(Path(run_path))
    segments.check(config)
    with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as world:
        segment = _Segment.open(config, files, to, world)
        for index in range(segment.index, to):
            segment.evaluate()
            segment.sample(index + 1)
            segment.score(index + 1)
            segment.train(index + 1)
        segment.evaluate()
        return segment.record()


@dataclass
class _Segment:
    """The state of the loop on one rank. Every rank calls each method, in the same order.

    Attributes:
        last: the iteration that the segment ends with.
        world: all ranks; ``team`` are those that train, None on the others.
        index: the iteration whose policy is in memory.
        policy_digest: of the folder that this policy has or would have.
        checkpoint: the newest iteration whose policy is on disk.
        learner: of the ranks that train, from the first iteration on.
        sampler: from the first time that this rank samples.
        written: bytes of the files that this rank wrote, by kind.
    """

    config: "Config"
    files: Run
    last: int
    world: Ranks
    team: Ranks | None
    judge: judges.Judge
    index: int
    policy_digest: str
    checkpoint: int
    clock: Clock
    learner: train.Learner | None = None
    sampler: generate.Sampler | None = None
    written: dict[str, int] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, config: "Config", files: Run, last: int, world: Ranks) -> "_Segment":
        """Find where to start: at the newest checkpoint, 0 standing for the starting policy."""
        if last > config.num_iterations:
            raise EarlError(f"--to is {last}, but num_iterations is {config.num_iterations}; raise that, or lower --to")
        if not state.has_checkpoint(files.iteration(0)):
            state.check_start(files)
            raise EarlError(f"{files.path}: has not been started; earl start --run {files.path} --policy <its folder>")
        start = world.of_first(state.newest_checkpoint(files, last))
        digest = world.of_first(manifest.digest_folder(files.iteration(start).policy) if world.first else "")
        _say_what_is_there(config, files, start, last, world.size)
        team = world.first_ranks(config.train_processes)
        judge = judges.get(config)
        return cls(config, files, last, world, team, judge, start, digest, start, Clock(world.device))

    # The four steps of an iteration.

    def evaluate(self) -> None:
        """Make the evaluations of the policy in memory that are due and missing, each on one rank."""
        names = self.config.evaluations_at(self.index)
        mine = [(name, self.files.evaluation(name, self.index)) for name in self._share_of(names)]
        mine = [(name, e) for name, e in mine if not present.evaluation(self.config, name, e, self.policy_digest)]
        with self.clock.phase("evaluate"):
            missing = [
                (name, e)
                for name, e in mine
                if not present.evaluation_rollouts(self.config, name, e, self.policy_digest)
            ]
            for (name, e), sampler in self._sampling(missing):
                generate.run_evaluation(self.config, name, self.index, sampler, e.rollouts)
                self._wrote("evaluations", e.rollouts)
            for name, e in mine:
                if not present.scores(self.config, e.rollouts, e.scores):
                    score.run(self.config, e.rollouts, e.scores, self.judge)
                    self._wrote("evaluations", e.scores)
                evaluate.run(self.config, name, self.index, e.rollouts, e.scores, e.table)
                self._wrote("evaluations", e.table, e.summary)

    def sample(self, index: int) -> None:
        """Write the rollouts of iteration ``index`` that are missing or not of the policy in memory."""
        config, iteration = self._config_of(index), self.files.iteration(index)
        with self.clock.phase("generate"):
            missing = [
                shard
                for shard in self._shards(index)
                if not present.rollouts(config, iteration, shard, self.policy_digest)
            ]
            for shard, sampler in self._sampling(missing):
                generate.run(config, index, shard, sampler, iteration.rollouts(shard))
                self._wrote("rollouts", iteration.rollouts(shard))

    def score(self, index: int) -> None:
        """Write the scores of iteration ``index`` that are missing or not of its rollouts."""
        iteration = self.files.iteration(index)
        with self.clock.phase("score"):
            for shard in self._shards(index):
                rollouts, scores = iteration.rollouts(shard), iteration.scores(shard)
                if not present.scores(self.config, rollouts, scores):
                    score.run(self.config, rollouts, scores, self.judge)
                    self._wrote("scores", scores)

    def train(self, index: int) -> None:
        """Train iteration ``index`` over its stored scores; write its `train/` and, where one is due, a checkpoint.

        An iteration that is complete already is trained again to come to its policy, and its files stay.
        """
        config, iteration = self._config_of(index), self.files.iteration(index)
        was_complete = iteration.metrics.is_file()
        due = segments.has_checkpoint(self.config, index, self.last)
        if self.sampler is not None:
            self.sampler.engine.sleep()
        with self.clock.phase("wait"):
            self.world.gather(None)  # until every rank's scores are written
        metrics = None
        with self.clock.phase("train"):
            if self.team is not None:
                if self.learner is None:
                    self.learner = train.load(config, self.files, self.index, self.team)
                metrics = train.step(config, self.files, self.learner, self.team, due and not was_complete)
                if due and was_complete:
                    train.write_checkpoint(config, self.files, self.learner, self.team)
                _release_memory(self.world.device)
            metrics = self.world.of_first(metrics)
        self.index, self.policy_digest = index, metrics["policy_digest"]
        (self.replayed if was_complete else self.done).append(index)
        if due:
            self.checkpoint = index
            if self.world.first:
                state.prune_before(self.files, state.Retention.of(self.config), index)
        self._tell(metrics)

    def record(self) -> dict[str, Any]:
        """Write what the segment did, last of all, and return it."""
        seconds = self.world.gather({name: round(value, 3) for name, value in self.clock.seconds.items()})
        record = {
            "last": self.last,
            "trained": self.done,
            "trained_again": self.replayed,
            "policy_digest": self.policy_digest,
            "train_processes": self.config.train_processes,
            "seconds": seconds,
            "bytes_written": _sums(self.world.gather(self.written)),
            "config_digest": freeze.config_digest(self.config),
            "code_version": code_version(),
        }
        if self.world.first:
            objects.write(self.files.segment(self.last), record)
        return record

    # What the steps share.

    def _sampling(self, missing: list[Any]) -> Iterator[tuple[Any, generate.Sampler]]:
        """Yield what this rank has to sample, with a sampler that holds the policy in memory.

        Ranks that have nothing to sample help to hand out the weights.
        """
        if not any(self.world.gather(bool(missing))):
            return
        if missing and self.sampler is None:
            self.sampler = generate.Sampler.load(self.config, self.files.iteration(self.checkpoint).policy)
        is_old = self.sampler is not None and self.sampler.policy_digest != self.policy_digest
        if any(self.world.gather(is_old)):
            weights = self.learner.weights(runtime.dtype(self.config)) if self.learner is not None else None
            weights = broadcast.to_all(weights, self.world, self.team)
            if is_old:
                self.sampler.update(weights, self.policy_digest)
            else:
                for _ in weights:
                    pass
        for item in missing:
            self.sampler.engine.wake()
            yield item, self.sampler

    def _config_of(self, index: int) -> "Config":
        """Return the configuration with the number of shards that a complete iteration has."""
        metrics = self.files.iteration(index).metrics
        if not metrics.is_file():
            return self.config
        shards = len(objects.read(metrics)["inputs"]["rollouts"])
        return self.config.model_copy(update={"rollout_shards": shards})

    def _shards(self, index: int) -> list[int]:
        """Return this rank's shards; none where the run replays another one's rollouts."""
        if index <= replays.length(self.files):
            return []
        return self._share_of(range(self._config_of(index).rollout_shards))

    def _share_of(self, items: Any) -> list[Any]:
        return list(items)[self.world.rank :: self.world.size]

    def _wrote(self, kind: str, *paths: Path) -> None:
        self.written[kind] = self.written.get(kind, 0) + sum(path.stat().st_size for path in paths)

    def _tell(self, metrics: dict[str, Any]) -> None:
        log.info("iterate: iteration %d of %d: %s", self.index, self.last, metrics.get("reward_mean"))
