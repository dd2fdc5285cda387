"""Replayed runs: trained over the rollouts and scores of another run. Where those lie, and which policies sampled them.

``<run>/replay.json`` is written before the first iteration is trained. It names the source run (relative to the run's
own folder), the name below the source's ``rescored/`` where the scores are another judge's, and, for every iteration,
the digest of the policy that sampled the stored rollouts and of every file with rollouts or scores. Training holds what
it reads against this record, in the place of its usual check that rollouts come from the very policy that it trains:
from the second iteration on, those of a replay do not.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.files import manifest, objects
from earl.files.layout import Iteration, Run
from earl.messages.errors import EarlError
from earl.run import state
from earl.statistics import rewards

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.learner.episodes import Source


OF_EPISODES = (
    *("reward_", "viescore_", "completion_length", "zero_std_", "failed_", "truncated_", "no_image_", "reasoning_"),
    *rewards.COMPONENTS,
)
"""What the names of metrics begin with that describe episodes, whatever policy is trained on them."""


@dataclass(frozen=True)
class Stored:
    """The rollouts and scores that an iteration is trained on."""

    files: Iteration
    shards: int
    sampled_by: str
    """Digest of the policy that sampled them."""
    off_policy: bool
    """Whether that is another policy than the one that is trained on them."""
    recorded: dict[str, Any] | None = None
    """What the record of a replay says of them; None in a run that samples for itself."""

    def check(self, source: "Source") -> None:
        """Compare what was read with the record of a replay.

        Raises:
            EarlError: a file is not the one that the source run was trained on.
        """
        if self.recorded is None:
            return
        for kind in ("rollouts", "scores"):
            for shard, (found, expected) in enumerate(zip(getattr(source, kind), self.recorded[kind], strict=True)):
                if found != expected:
                    raise EarlError(
                        f"{getattr(self.files, kind)(shard)}: its digest is {found[:12]}, but iteration "
                        f"{self.files.index} was trained on {expected[:12]}, which the replay is of; put the old file "
                        "back, or replay into a new folder"
                    )

    def inputs(self) -> dict[str, str]:
        """Return what metrics.json records beside the usual inputs: nothing but for a replay."""
        return {} if self.recorded is None else {"sampled_by": self.sampled_by}


def record_file(run: Run) -> Path:
    """Return the file that makes a run a replay of another."""
    return run.path / "replay.json"


def record_of(run: Run) -> dict[str, Any] | None:
    """Return the record of a replay, None for a run that samples for itself.

    Raises:
        EarlError: the file is damaged.
    """
    path = record_file(run)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "source": str(record["source"]), "iterations": list(record["iterations"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EarlError(f"{path}: is damaged ({error!r}); replay into a new folder") from error


def length(run: Run) -> int:
    """Return the number of iterations that are trained on another run's rollouts; 0 unless the run is a replay."""
    record = record_of(run)
    return 0 if record is None else len(record["iterations"])


def source_of(run: Run, record: dict[str, Any]) -> Run:
    """Return the run that a record names; the folder of the record may be reached through links."""
    return Run(record_file(run).resolve().parent / record["source"])


def iteration_of(run: Run, index: int) -> Iteration:
    """Return the iteration whose folder holds the rollouts and scores that iteration ``index`` is trained on."""
    record = record_of(run)
    if record is None or index > len(record["iterations"]):
        return run.iteration(index)
    return _iteration(source_of(run, record), index, record.get("scores"))


def _iteration(source: Run, index: int, scores: str | None) -> Iteration:
    """Return an iteration of the source, with the scores of the judge that has this name below ``rescored/``."""
    iteration = source.iteration(index)
    return replace(iteration, scored=source.rescored(scores).iteration(index).path) if scores else iteration


def stored(run: Run, index: int, policy_digest: str, shards: int) -> Stored:
    """Return what iteration ``index`` is trained on: its own rollouts, or in a replay those of its source.

    Args:
        policy_digest: the policy that is about to be trained.
        shards: of a run that samples for itself.
    """
    record = record_of(run)
    # A run may go on with rollouts of its own where its replay ends.
    if record is None or index > len(record["iterations"]):
        return Stored(run.iteration(index), shards, policy_digest, off_policy=False)
    recorded = record["iterations"][index - 1]
    return Stored(
        iteration_of(run, index),
        len(recorded["rollouts"]),
        recorded["policy"],
        off_policy=recorded["policy"] != policy_digest,
        recorded=recorded,
    )


def new_record(run: Run, source: Run, count: int, scores: str | None = None) -> dict[str, Any]:
    """Return the record of a replay of the first ``count`` iterations of a run, having checked that they are a chain.

    Args:
        scores: the name below ``<source>/rescored`` of the scores to train on; None: the run's own.

    Raises:
        EarlError: an iteration has not been trained, was trained from another policy than the one before it made, or
            the source is a replay itself.
    """
    if record_file(source).is_file():
        other = source_of(source, record_of(source) or {}).path
        raise EarlError(f"{source.path}: is a replay of {other} itself; replay that one")
    made = _read(state.start_record(source.iteration(0)))["policy_digest"]
    iterations = []
    for index in range(1, count + 1):
        path = source.iteration(index).metrics
        metrics = _read(path)
        inputs = metrics["inputs"]
        if inputs["policy"] != made:
            raise EarlError(
                f"{path}: was trained from policy {inputs['policy'][:12]}, but iteration {index - 1} made {made[:12]}: "
                f"no chain of policies, which `earl verify --run {source.path}` shows too; replay fewer iterations "
                "(--set num_iterations=...)"
            )
        rollouts, scored = inputs["rollouts"], inputs["scores"]
        if scores:
            scored = _rescored(source, index, scores, len(rollouts))
        iterations.append({"policy": made, "rollouts": rollouts, "scores": scored})
        made = metrics["policy_digest"]
    record = {"source": os.path.relpath(source.path.resolve(), run.path.resolve()), "iterations": iterations}
    return record | ({"scores": scores} if scores else {})


def _rescored(source: Run, index: int, name: str, shards: int) -> list[str]:
    """Return the digests of another judge's scores of an iteration."""
    files = [_iteration(source, index, name).scores(shard) for shard in range(shards)]
    if missing := [file for file in files if not file.is_file()]:
        raise EarlError(
            f"{missing[0]}: is missing, so `{name}` has not scored these rollouts; "
            f"`earl rescore --run {source.path} --name {name}` scores what is missing"
        )
    return [manifest.digest_file(file) for file in files]


def check_scores(run: Run, config: "Config", last: int, first: int = 1, scores: str | None = None) -> None:
    """Check that the stored scores of a run hold what rewards and advantages are made of.

    Args:
        run: where the scores lie: those of iterations ``first`` to ``last``, as far as there are any.
        scores: as of `new_record`.

    Raises:
        EarlError: naming file and column, the field that needs it, and how to have the rollouts scored again.
    """
    from earl.files import tables

    needed = rewards.needed(config)
    for index in range(first, last + 1):
        for path in sorted(_iteration(run, index, scores).scores(0).parent.glob("*.parquet")):
            try:
                table = tables.read_table(path, tables.SCORES, ["status", *needed])
            except EarlError:
                continue  # Training names what is damaged, and how to mend it.
            for score, (field, which) in needed.items():
                judged = zip(table["status"].to_pylist(), table[score].is_null().to_pylist(), strict=True)
                if missing := sum(status == "ok" and unknown for status, unknown in judged):
                    raise EarlError(
                        f"{path}: column {score!r} is null for {missing} judged episodes, but {field} needs it for "
                        f"`{which}`; have a judge give it (earl rescore --run {run.path} --name NAME --set "
                        f"{rewards.ASKED_BY[score]}=true), then train over those scores (earl replay --run {run.path} "
                        "--scores NAME --out FOLDER)"
                    )


def write(run: Run, record: dict[str, Any]) -> None:
    """Write the record of a replay, or add iterations to the one that is there.

    Raises:
        EarlError: the record that is there is of another run, or of other rollouts.
    """
    there = record_of(run)
    if there is not None:
        shared = min(len(there["iterations"]), len(record["iterations"]))
        same = there["iterations"][:shared] == record["iterations"][:shared]
        if there["source"] != record["source"] or there.get("scores") != record.get("scores") or not same:
            raise EarlError(
                f"{record_file(run)}: is the replay of {there['source']}, whose rollouts or scores were others then; "
                "replay into a new folder"
            )
        if shared == len(record["iterations"]):
            return
    objects.write(record_file(run), record)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EarlError(f"{path}: is missing, so there is no such iteration to replay; replay fewer") from error
    except (OSError, ValueError) as error:
        raise EarlError(f"{path}: cannot be read ({error}); `earl verify` shows the state of the run") from error


def check_support(config: "Config") -> None:
    """Refuse an objective that needs to know what top_k and top_p had left to the policy that sampled.

    Raises:
        EarlError: log-probs are over what the sampler drew from, which another policy's logits do not tell.
    """
    truncated = config.top_k > 0 or config.top_p < 1
    if truncated and config.resolved_logprob_support == "sampled":
        raise EarlError(
            "logprob_support is `sampled`, but what top_k and top_p had left is found from the policy that sampled, "
            "and the replayed one is another; replay with --set logprob_support=split_vocab"
        )


def is_on_policy(metrics: Mapping[str, Any]) -> bool:
    """Return whether, as metrics.json says, the policy that was trained had sampled its episodes itself."""
    inputs = metrics.get("inputs", {})
    return inputs.get("sampled_by", inputs.get("policy")) == inputs.get("policy")


def own(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without those of episodes that another policy sampled than the one that was trained."""
    if is_on_policy(metrics):
        return dict(metrics)
    return {name: value for name, value in metrics.items() if not name.startswith(OF_EPISODES)}


def off_policy(run: Run, last: int) -> list[int]:
    """Return the iterations, up to ``last``, whose episodes other policies sampled, as `metrics.json` says."""
    return [index for index in range(1, last + 1) if not is_on_policy(_read(run.iteration(index).metrics))]
