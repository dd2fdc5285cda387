"""Iterate: many iterations of a run in one program that keeps its models in memory. This is the learning loop.

A segment writes the files that the stages write one by one, with the same bytes. Only checkpoints are rarer: the policy
is in memory and is saved now and then. What is on disk already and belongs to the policy in memory is used as it is. So
a segment that was killed starts from the newest checkpoint, trains again over the stored scores, asking neither policy
nor judge, and continues with the first file that is missing.

Every rank of the program samples and scores its shards, shard s on rank s % size, with an engine of its own. The first
`train_processes` ranks train. Engine and learner take turns: the engine sleeps while the learner works.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from earl import code_version, judges
from earl.config import freeze
from earl.emu3.vocabulary import Vocabulary
from earl.execution import broadcast, ranks, runtime
from earl.execution.ranks import Ranks
from earl.files import manifest, objects
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import curriculum, replays, segments, state
from earl.stages import evaluate, generate, present, rounds, score, train
from earl.stages.progress import KINDS, Progress

if TYPE_CHECKING:
    from earl.config.schema import Config

Item = TypeVar("Item")

log = logging.getLogger(__name__)


def run(config: "Config", run_path: Path, to: int) -> dict[str, Any]:
    """Make a run's iterations up to ``to`` and the evaluations of their policies; return the segment's record.

    Under torchrun every rank calls this. The run has been started (`earl.run.state.start`), and its data are there.

    Args:
        run_path: the run's folder.
        to: the last iteration of the segment. It gets a checkpoint.

    Raises:
        EarlError: the configuration cannot be run as a segment, the run has not been started, or a stage fails. What
            was written until then is used by the next call.
    """
    files = Run(Path(run_path))
    with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as world, ExitStack() as opened:
        _check(config, files, to)
        train.check_kernel(config, world.device)
        segment = _Segment.at_newest_checkpoint(config, files, to, world, opened)
        if segment.index <= to:
            segment.evaluate()
        for index in range(segment.index + 1, to + 1):
            for number in segment.rounds_of(index):
                segment.sample(index, number)
                segment.score(index, number)
            segment.train(index)
            segment.evaluate()
        return segment.end()


def _check(config: "Config", files: Run, to: int) -> None:
    segments.check(config)
    if to > config.num_iterations:
        raise EarlError(
            f"--to is {to}, but num_iterations is {config.num_iterations} in {files.config}; raise it there "
            f"(snakemake --config set=num_iterations={to}, with the experiment of the run), or lower --to"
        )
    state.check_start(files)
    if not state.has_checkpoint(files.iteration(0)):
        raise EarlError(f"{files.path}: has not been started; earl start --run {files.path} --policy <its folder>")


@dataclass
class _Segment:
    """The loop's state on one rank. All ranks call its methods, in the same order.

    Attributes:
        last: the iteration that the segment ends with.
        world: all ranks.
        team: the ranks that train; None on the others.
        opened: what is closed when the segment ends.
        index: the iteration whose policy is in memory; ``policy_digest`` is of the folder that it has or would have.
        checkpoint: the newest iteration whose policy is on disk.
        complete: the newest iteration that was complete when the segment started.
        recorded: the metrics of the iteration after ``index``, where that is complete already.
        learner: on ranks that train, from the first iteration on.
        earlier: what the rounds before the one that is sampled have come to.
        sampler, judge: from the first time that a rank needs them.
    """

    config: "Config"
    files: Run
    last: int
    world: Ranks
    team: Ranks | None
    opened: ExitStack
    index: int
    policy_digest: str
    checkpoint: int
    complete: int
    progress: Progress
    recorded: dict[str, Any] | None = None
    learner: train.Learner | None = None
    earlier: rounds.Earlier | None = None
    sampler: generate.Sampler | None = None
    judge: judges.Judge | None = None

    @classmethod
    def at_newest_checkpoint(
        cls, config: "Config", files: Run, last: int, world: Ranks, opened: ExitStack
    ) -> "_Segment":
        start = world.of_first(segments.start(config, files) if world.first else 0)
        digest = world.of_first(manifest.digest_folder(files.iteration(start).policy) if world.first else "")
        complete = world.of_first(state.newest_complete(files) if world.first else 0)
        state.check_policy(files, start, digest)
        team, progress = world.first_ranks(config.train_processes), Progress(world.device)
        segment = cls(config, files, last, world, team, opened, start, digest, start, complete, progress)
        segment._look_ahead()
        segment._say_where_it_starts()
        return segment

    # The steps of an iteration.

    def evaluate(self) -> None:
        """Make the evaluations of the policy in memory that are due and missing, each on one rank."""
        config, digest, names = self.config, self.policy_digest, self._share(self.config.evaluations_at(self.index))
        files = {name: self.files.evaluation(name, self.index) for name in names}
        due = [name for name in names if not present.evaluation(config, name, files[name], digest)]
        with self.progress.phase("evaluate"):
            missing = [name for name in due if not present.evaluation_rollouts(config, name, files[name], digest)]
            sampler = self._sampler_for(missing)
            for name in missing:
                generate.run_evaluation(config, name, self.index, sampler, files[name].rollouts)
                self.progress.wrote("evaluations", files[name].rollouts)
            missing = [name for name in due if not present.scores(config, files[name].rollouts, files[name].scores)]
            judge = self._judge_for(missing)
            for name in missing:
                score.run(config, files[name].rollouts, files[name].scores, judge)
                self.progress.wrote("evaluations", files[name].scores)
            for name in due:
                evaluate.run(config, name, self.index, files[name].rollouts, files[name].scores, files[name].table)
                self.progress.wrote("evaluations", files[name].table, files[name].summary)

    def rounds_of(self, index: int) -> range:
        """Return the rounds of iteration ``index``; none where it is trained on another run's rollouts."""
        return range(0 if index <= replays.length(self.files) else self.config.rounds)

    def sample(self, index: int, number: int) -> None:
        """Write this rank's rollouts of a round that are missing or not of the policy in memory, or of these scores."""
        config, files, digest = self._config_of_next(), self.files.iteration(index), self.policy_digest
        with self.progress.phase("generate"):
            read = rounds.earlier(config, files, number, digest) if self.world.first else None
            self.earlier = earlier = self.world.of_first(read)
            shards, ledger = self._shards(number), curriculum.ledger(config, self.files, index)
            missing = [one for one in shards if not present.rollouts(config, files, one, digest, earlier, ledger)]
            sampler = self._sampler_for([shard for shard in missing if generate.wanted(config, shard, earlier)])
            for shard in missing:
                policy = sampler or generate.Policy(self.vocabulary, digest)
                generate.run(config, index, shard, policy, files.rollouts(shard), earlier, ledger)
                self.progress.wrote("rollouts", files.rollouts(shard))

    def score(self, index: int, number: int) -> None:
        """Write this rank's scores of a round that are missing or not of its rollouts."""
        config, files = self._config_of_next(), self.files.iteration(index)
        with self.progress.phase("score"):
            shards = self._shards(number)
            missing = [one for one in shards if not present.scores(config, files.rollouts(one), files.scores(one))]
            judge = self._judge_for([one for one in missing if generate.wanted(config, one, self.earlier)])
            for shard in missing:
                score.run(config, files.rollouts(shard), files.scores(shard), judge)
                self.progress.wrote("scores", files.scores(shard))
        with self.progress.phase("wait"):
            self.world.gather(None)

    def train(self, index: int) -> None:
        """Train iteration ``index``, and write a checkpoint where one is due.

        An iteration that is complete already is trained again, since its policy is needed, and keeps its files; see
        `earl.stages.train.step`. The last of these gets a checkpoint, so that a segment that is stopped again and again
        goes on each time.
        """
        files, again, metrics = self.files.iteration(index), self.recorded is not None, None
        due = segments.has_checkpoint(self.config, index, self.last) or (again and index == self.complete)
        if self.sampler is not None:
            self.sampler.engine.sleep()
        with self.progress.phase("train" if self.team is not None else "wait"):
            if self.team is not None:
                config = self._config_of_next()
                if self.learner is None:
                    self.learner = train.load(config, self.files, self.index, self.team)
                metrics = train.step(config, self.files, self.learner, self.team, checkpoint=due and not again)
                if due and again:
                    train.write_checkpoint(config, self.files, self.learner, self.team)
            metrics = self.world.of_first(metrics)
            runtime.release_memory(self.world.device)
        self.index, self.policy_digest = index, metrics["policy_digest"]
        if due:
            self.checkpoint = index
        if self.world.first:
            if metrics != self.recorded:
                self.progress.wrote("train", files.episodes, files.performance, files.metrics)
            if due:
                self.progress.wrote("checkpoints", files.policy, files.trainer)
                state.prune_before(self.files, state.Retention.of(self.config), index)
        self.progress.trained(index, metrics == self.recorded)
        self._look_ahead()
        log.info("iterate: %d of %d: reward %.3f; %s", index, self.last, metrics["reward_mean"], self.progress.news())

    def end(self) -> dict[str, Any]:
        """Close the engine, write what the segment did, last of all, and return it."""
        if self.sampler is not None:
            self.sampler.engine.close()
        by_rank = self.world.gather((self.progress.seconds(), self.progress.peaks(), self.progress.written))
        written = {kind: sum(sizes.get(kind, 0) for *_, sizes in by_rank) for kind in KINDS}
        record = {
            "last": self.last,
            "policy_digest": self.policy_digest,
            "trained": self.progress.iterations,
            "trained_again": self.progress.again,
            "train_processes": self.config.train_processes,
            "seconds_by_rank": [seconds for seconds, _, _ in by_rank],
            "peak_memory_bytes_by_rank": [peaks for _, peaks, _ in by_rank],
            "bytes_written": written,
            "config_digest": freeze.config_digest(self.config),
            "code_version": code_version(),
        }
        if self.world.first:
            objects.write(self.files.segment(self.last), record)
        return record

    # What the steps share.

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_folder(self.files.iteration(0).policy)

    def _sampler_for(self, missing: Sequence[Item]) -> generate.Sampler | None:
        """Return the policy in memory, ready to sample, where any rank has something to; all ranks call this."""
        if not any(self.world.gather(bool(missing))):
            return None
        if self.sampler is None:
            self.sampler = generate.Sampler.load(self.config, self.files.iteration(self.checkpoint).policy)
        if self.sampler.policy_digest != self.policy_digest:
            own = self.learner.weights(runtime.dtype(self.config.dtype)) if self.learner is not None else None
            self.sampler.update(broadcast.to_all(own, self.world, self.team), self.policy_digest)
        self.sampler.engine.wake()
        return self.sampler

    def _judge_for(self, missing: Sequence[Item]) -> judges.Judge | None:
        """Return the judge where any rank has something to ask it; all ranks call this."""
        if any(self.world.gather(bool(missing))) and self.judge is None:
            self.judge = self.opened.enter_context(judges.in_segment(self.config, self.world))
        return self.judge

    def _look_ahead(self) -> None:
        """Read what the next iteration has on record, so that all ranks know the same."""
        following = self.index + 1
        is_there = self.world.first and following <= self.last and self.files.iteration(following).metrics.is_file()
        self.recorded = self.world.of_first(state.read_metrics(self.files, following) if is_there else None)

    def _config_of_next(self) -> "Config":
        """Return the configuration, with the number of shards that the next iteration has if it is complete."""
        if self.recorded is None:
            return self.config
        return self.config.in_files(len(self.recorded["inputs"]["rollouts"]))

    def _shards(self, number: int) -> list[int]:
        """Return this rank's shards of a round of the next iteration."""
        shards = self._config_of_next().rollout_shards
        return self._share(range(number * shards, (number + 1) * shards))

    def _share(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.world.rank :: self.world.size])

    def _say_where_it_starts(self) -> None:
        newest = state.newest_complete(self.files)
        if self.index > self.last:
            log.info("iterate: iterations up to %d are complete; nothing is left to do up to %d", newest, self.last)
        if self.index < min(newest, self.last):
            log.info(
                "iterate: starts from the checkpoint of iteration %d; iterations up to %d, which are complete, are "
                "trained again over their stored scores",
                *(self.index, min(newest, self.last)),
            )
        if self.index < self.last and (idle := segments.idle_ranks(self.config, self.world.size)):
            log.warning("iterate: %s", idle)
