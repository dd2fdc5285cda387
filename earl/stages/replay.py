"""Replay: train again over the stored rollouts and scores of a run, with another learner, into a new run folder.

Neither a policy is sampled nor a judge asked; the scores may be those that another judge gave the same rollouts. The
first iteration is trained exactly as if the run had been made with the other learner. Every later one meets episodes
that the source's policies sampled, not the replayed one: it is *off-policy*. Then the ratio of the two policies is part
of what `importance_ratio` and `sampler_correction` correct for, nothing corrects for it where both are off, and
`parity_tolerance`, which looks for errors, is not applied. Rewards are those of the source's episodes; what the
replayed policy earns, an evaluation has to tell.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.config import freeze
from earl.config.load import changed, leaves, read
from earl.config.schema import is_free
from earl.execution import launch, ranks, runtime
from earl.files import atomic, manifest
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import comparison, curves
from earl.run import claims, replays, state
from earl.stages import rescore, train
from earl.statistics import rewards

if TYPE_CHECKING:
    from earl.config.schema import Config

LEARNER = (
    *("learning_rate", "advantage", "kl_coeff", "kl_estimator", "loss_normalization", "optimizer_steps_per_iteration"),
    *("reference_refresh_iterations", "entropy_coeff"),
    *("importance_ratio", "clip_ratio_low", "clip_ratio_high", "parity_tolerance", "reward_final_reward"),
    *("sampler_correction", "sampler_correction_low", "sampler_correction_high"),
    *("separate_language_and_vision_vocabs", "logprob_support", "advantage_components"),
    *("learning_rate_schedule", "final_learning_rate", "schedule_iterations"),
    *("decay_iterations", "warmup_iterations", "zero_variance_groups", "lora"),
    *(
        "per_device_batch_size",
        "packing",
        "dtype",
        "cpu_threads",
        "max_prompt_len",
        "max_completion_len",
    ),
    *("train_text_tokens_only", "text_only_cycle_steps", "text_only_steps"),
    *("train_vision_tokens_only", "vision_only_cycle_steps", "vision_only_steps"),
)
"""Fields of the learner; where they have a part in sampling too (`dtype`), it may be another than the learner's."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replayed:
    """What a replay has come to: of its iterations, those whose episodes another policy sampled."""

    source: Run
    run: Run
    config: "Config"
    iterations: int
    off_policy: Sequence[int]

    @property
    def page(self) -> Path:
        """Both runs side by side."""
        return self.run.path / "replay.html"

    def curves(self) -> list[curves.Curves]:
        """Return the metrics of the source, as far as it was replayed, and of the replay."""
        found = [curves.read(run.path, run.path.resolve().name) for run in (self.source, self.run)]
        return [each.until(self.iterations) for each in found]

    def notes(self) -> list[str]:
        """Return, in words, what the figures of the replay mean."""
        head = f"{self.iterations} iterations of {self.source.path.resolve().name}, replayed"
        if not self.off_policy:
            return [f"{head}: every one trains the very policy that had sampled its episodes."]
        return [
            f"{head}. Off-policy: {_spans(self.off_policy)}. Their episodes were sampled by other policies than the "
            f"replayed one. {corrections(self.config)} parity_tolerance was not applied there.",
            "Rewards there are those of the source's episodes and say nothing of the replayed policy; evaluate it.",
        ]


def corrections(config: "Config") -> str:
    """Say what in the objective corrects for episodes of other policies."""
    names = [f"{n} = {getattr(config, n)}" for n in ("importance_ratio", "sampler_correction") if _is_on(config, n)]
    if names:
        return f"For that the objective has {' and '.join(names)}."
    return "Nothing in the objective corrects for that (importance_ratio and sampler_correction are `none`)."


def _is_on(config: "Config", name: str) -> bool:
    return getattr(config, name) != "none"


def run(source_path: Path, out: Path, overrides: Mapping[str, Any], scores: str | None = None) -> Replayed:
    """Replay a run, or go on with a replay that was stopped; equal inputs give equal bytes.

    Args:
        source_path: The run whose rollouts and scores are trained on.
        out: The new run's folder; its name becomes the `run_name`.
        overrides: Values of fields of the learner by dotted name. `num_iterations` is how many iterations to replay,
            by default all that the source has.
        scores: The name below ``<source>/rescored`` of the scores to train on, by default the run's own.

    Raises:
        EarlError: a field decides how rollouts or scores are made; the scores do not hold what the reward is made of;
            the source is no chain of iterations, or its files have changed; ``out`` holds another run.
    """
    source, target = Run(Path(source_path)), Run(Path(out))
    if source.path.resolve() == target.path.resolve():
        raise EarlError(f"{out}: is the run itself; give the replay a folder of its own")
    config = _config(source, target, overrides, scores)
    record = replays.new_record(target, source, config.num_iterations, scores)
    replays.check_scores(source, config, last=config.num_iterations, scores=scores)
    if target.config.is_file() and replays.record_of(target) is None:
        raise EarlError(f"{out}: holds a run that is no replay; give a folder of its own")
    if replays.record_of(target) is None and any(path.name[:1] != "." for path in target.path.glob("*")):
        raise EarlError(f"{out}: holds other files; give the replay a folder of its own")
    claims.claim(config, "train")
    target.path.mkdir(parents=True, exist_ok=True)
    with state.exclusive(target):
        replays.write(target, record)
        freeze.write(config, target.config)
        _start(source, target)
        state.prune(target, state.Retention.of(config))  # what a killed replay has left
        for index in _train(config, target, state.newest_complete(target)):
            log.info("replay: iteration %d of %d is trained", index, config.num_iterations)
            state.prune(target, state.Retention.of(config), after=index)
        off_policy = replays.off_policy(target, config.num_iterations)
        replayed = Replayed(source, target, config, config.num_iterations, off_policy)
        atomic.write_text(replayed.page, _page(replayed))
    return replayed


def _train(config: "Config", target: Run, after: int) -> Iterator[int]:
    """Train the iterations after one; yield each that is complete. One process keeps its learner in memory."""
    left = range(after + 1, config.num_iterations + 1)
    if config.train_processes > 1:
        for index in left:
            arguments = ["train", "--config", str(target.config), "--iteration", str(index), "--run", str(target.path)]
            if launch.launch(config, arguments, config.train_processes):
                raise EarlError(f"{target.iteration(index).path}: training it failed, as its ranks have said above")
            yield index
    elif left:
        with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as team:
            learner = train.load(config, target, after, team)
            for index in left:
                train.step(config, target, learner, team, checkpoint=True)
                yield index


def _config(source: Run, target: Run, overrides: Mapping[str, Any], scores: str | None) -> "Config":
    own = read(source.config)
    judge = _judge(source, scores) if scores else {}
    count = overrides.get("num_iterations", state.newest_complete(source))
    if not isinstance(count, int) or count < 1:
        raise EarlError(f"{source.path}: has no iteration to replay, or num_iterations is {count!r}")
    given = {**judge, **overrides, "num_iterations": count, "run_name": target.path.name}
    if "train_processes" in overrides:
        given.setdefault("segment_processes", None)  # A replay has no segments, and that number may be too small.
    # What the judge was asked for is seen in its scores (`replays.check_scores`): the fields follow from the reward.
    wanted = rewards.needed(changed(own, given | dict.fromkeys(rewards.ASKED_BY.values(), True)))
    config = changed(own, given | {rewards.ASKED_BY[score]: True for score in wanted})
    for name in overrides:
        field = name.split(".")[0]
        if field not in LEARNER and not is_free(field):
            raise EarlError(
                f"--set {name}: decides how rollouts or scores are made, and a replay takes those of {source.path}; "
                f"it can change {', '.join(LEARNER)}"
            )
    return config


def _judge(source: Run, scores: str) -> dict[str, Any]:
    """Return the fields of the judge that gave these scores."""
    path = source.rescored(scores).config
    if not path.is_file():
        raise EarlError(
            f"--scores {scores}: there is no {path.parent}; score the rollouts first: "
            f"earl rescore --run {source.path} --name {scores}"
        )
    values = read(path).model_dump(mode="json")
    return {name: value for name, value in values.items() if name.startswith(rescore.JUDGE) and name not in LEARNER}


def changes(source: Run, target: Run) -> list[tuple[str, Any, Any]]:
    """Return the fields in which a replay's configuration differs from its source's: name, value there, value here."""
    before, after = (dict(leaves(read(run.config).model_dump(mode="json"))) for run in (source, target))
    own = ("run_name", "push_to_hub_repo_id")
    rows = [(name, before.get(name), after.get(name)) for name in sorted((before.keys() | after.keys()) - set(own))]
    return [(name, then, now) for name, then, now in rows if then != now]


def _start(source: Run, target: Run) -> None:
    """Start from the policy that the source started from."""
    policy = source.iteration(0).policy
    recorded = replays.record_of(target)["iterations"][0]["policy"]
    if manifest.digest_folder(policy) != recorded:
        raise EarlError(
            f"{policy}: is another policy ({manifest.digest_folder(policy)[:12]}) than the one that the run started "
            f"from ({recorded[:12]}); put that one back"
        )
    if not state.has_checkpoint(target.iteration(0)):
        state.start(target, policy)


def _page(replayed: Replayed) -> str:
    changed = changes(replayed.source, replayed.run)
    return comparison.replay_page(*replayed.curves(), changed, replayed.notes())


def _spans(indices: Sequence[int]) -> str:
    """Return numbers in ascending order as text, consecutive ones as `first to last`."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], index]
        else:
            spans.append([index, index])
    return ", ".join(f"{first} to {last}" if last > first else f"{first}" for first, last in spans)
