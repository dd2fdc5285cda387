"""Whether every file of a run was made from the files that are there now.

A workflow plan sees only the iterations of its window; a configuration or code that has changed since, or a file that
was made again, goes unseen in older ones. Each stage records the digests of what it read, so the whole chain can be
followed afterwards. By default that every file is there, that sealed folders hold what their manifests list, and that
the records agree; with ``deep`` that every file with a recorded digest has that digest.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from earl import code_version
from earl.config import paths
from earl.config.freeze import config_digest
from earl.config.load import read as read_config
from earl.emu3 import adapter
from earl.files import atomic, manifest
from earl.files.layout import Evaluation, Run
from earl.messages.errors import EarlError
from earl.run import curriculum, replays, state

if TYPE_CHECKING:
    from earl.config.schema import Config

Value = TypeVar("Value")


@dataclass(frozen=True)
class Problem:
    """One finding: the file it is about, and what is wrong with it and what to do."""

    file: str
    problem: str


@dataclass(frozen=True)
class Note:
    """What is worth knowing and no fault: the file it is about, and what."""

    file: str
    note: str


@dataclass
class Verification:
    """The outcome for a run.

    Attributes:
        iterations: trained iterations that were looked at.
        evaluations: evaluations that were looked at.
        files: files that were looked for and are there.
        hashed: those of them whose content has the recorded digest (0 unless deep).
        deep: whether contents were compared.
        code_versions: number of code versions that made the trained iterations.
        problems: what was found, in the order of the iterations.
        notes: accepted changes of configuration, and earlier versions of the code.
    """

    iterations: int = 0
    evaluations: int = 0
    files: int = 0
    hashed: int = 0
    deep: bool = False
    code_versions: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, path: Path, problem: str) -> None:
        self.problems.append(Problem(path.as_posix(), problem))

    def note(self, path: Path, note: str) -> None:
        self.notes.append(Note(path.as_posix(), note))

    def text(self) -> str:
        """Return the outcome as lines for a terminal."""
        contents = f"contents of {self.hashed} compared" if self.deep else "contents not compared (--deep does that)"
        looked = f"{self.iterations} iterations, {self.evaluations} evaluations, {self.files} files there, {contents}"
        lines = [f"note: {item.file}: {item.note}" for item in self.notes]
        lines += [f"{item.file}: {item.problem}" for item in self.problems]
        counted = _counted(len(self.problems), "problem")
        counted += f", {_counted(len(self.notes), 'note')}" if self.notes else ""
        return "\n".join([*lines, f"{looked}: {counted}"])

    def json(self) -> str:
        """Return the outcome as the text of ``verify.json``."""
        lists = {"problems": [vars(item) for item in self.problems], "notes": [vars(item) for item in self.notes]}
        return json.dumps({**vars(self), **lists}, indent=1, sort_keys=True) + "\n"


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def verify(run: Run, deep: bool = False) -> Verification:
    """Follow the digests through a run and return what does not fit.

    Args:
        run: the run.
        deep: also hash every file, and read the metadata of the rollouts. Without it only records are read: metrics,
            summaries and manifests.

    Raises:
        EarlError: when the run has no readable configuration, or has not started.
    """
    found = Verification(deep=deep)
    current = read_config(run.config)
    if not state.has_started(run):
        raise EarlError(f"{run.path}: has not started, so there is nothing to verify")
    trained = _check_iterations(run, current, found)
    _check_start(run, found)
    _check_evaluations(run, current, trained, found)
    for index, metrics in trained.items():
        _check_files(run, current, index, metrics, found)
    _check_shared(current, found)
    return found


def write(found: Verification, out: Path) -> None:
    """Write the outcome as JSON."""
    atomic.write_text(out, found.json())


def _check_iterations(run: Run, current: "Config", found: Verification) -> dict[int, dict[str, Any]]:
    """Check that each iteration was trained from the policy of the one before it; return the readable metrics."""
    trained: dict[int, dict[str, Any]] = {}
    newest = state.newest_complete(run)
    made = {0: _starting_policy(run, found)}
    present = config_digest(current)
    for index in range(1, newest + 1):
        path = run.iteration(index).metrics
        metrics = _read(path, found)
        if metrics is None:
            continue
        trained[index] = metrics
        if current.kl_coeff and metrics["config_digest"] == present:
            _check_reference(path, metrics, made.get(state.reference_at(current, index)), found)
        before, policy = metrics["inputs"]["policy"], made.get(index - 1)
        if policy is not None and before != policy:
            found.add(
                path,
                f"was trained from policy {before[:12]}, but iteration {index - 1} made {policy[:12]}; "
                f"`earl rewind --iteration {index}` trains from here again",
            )
        made[index] = metrics["policy_digest"]
    found.iterations = len(trained)
    _note_changes(run, trained, present, found)
    _check_rubrics(run, trained, current, found)
    found.code_versions = len({metrics["code_version"] for metrics in trained.values()})
    return trained


def _check_reference(path: Path, metrics: dict[str, Any], wanted: str | None, found: Verification) -> None:
    """Check that an iteration was trained with the reference that the configuration says."""
    reference = metrics["inputs"].get("reference")
    if wanted is not None and reference != wanted:
        found.add(
            path,
            f"was trained with reference {str(reference)[:12]}, but the configuration makes it {wanted[:12]}; "
            "`earl rewind` to this iteration and run on",
        )


def _starting_policy(run: Run, found: Verification) -> str | None:
    record = _read(state.start_record(run.iteration(0)), found, keys=("policy_digest",))
    return record["policy_digest"] if record else None


def _check_start(run: Run, found: Verification) -> None:
    """Check that the starting policy is where its link leads, and is the one that the run started from."""
    policy, recorded = run.iteration(0).policy, _starting_policy(run, Verification())
    try:
        state.check_start(run)
    except EarlError as error:
        found.problems.append(Problem(*str(error).split(": ", 1)))
        return
    if recorded is None:
        return
    if (policy / manifest.NAME).is_file():
        wrong = f"is not the policy that {state.start_record(run.iteration(0))} recorded"
        _check_sealed(policy, found, recorded, wrong)
    elif found.deep:
        files = [path for path in policy.rglob("*") if path.is_file()]
        found.files += len(files)
        if manifest.digest_folder(policy) != recorded:
            found.add(policy, f"has changed since the run started from it, see {state.start_record(run.iteration(0))}")
        else:
            found.hashed += len(files)


METRICS_KEYS = ("inputs", "policy_digest", "config_digest", "code_version")


def _read(path: Path, found: Verification, keys: tuple[str, ...] = METRICS_KEYS) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.add(path, f"is missing; have it made again: ask the workflow for {path}")
        return None
    except (OSError, ValueError) as error:
        found.add(path, f"cannot be read ({error}); `earl rewind` to this iteration and run on")
        return None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        found.add(path, f"lacks {', '.join(missing)}; `earl rewind` to this iteration and run on")
        return None
    return content


def _note_changes(run: Run, trained: dict[int, dict[str, Any]], configuration: str, found: Verification) -> None:
    """Note stretches of iterations that another configuration or code made, one line a stretch.

    Neither is a fault: a run's frozen configuration changes by `accept_changes` alone, and code changes by release.
    """
    for first, last, value in _stretches({index: metrics["config_digest"] for index, metrics in trained.items()}):
        if value != configuration:
            found.note(
                run.iteration(first).metrics,
                f"{_made(first, last)} by configuration {_short(value)}; the present one, {_short(configuration)}, has "
                "been accepted since",
            )
    now = code_version()
    for first, last, value in _stretches({index: metrics["code_version"] for index, metrics in trained.items()}):
        if value != now:
            found.note(run.iteration(first).metrics, f"{_made(first, last)} by {_other('code', value, now)}")


def _check_rubrics(run: Run, trained: dict[int, dict[str, Any]], current: "Config", found: Verification) -> None:
    """Report stretches that were scored by other rubrics: a note where configuration or code were others, too.

    Where they were not, somebody has edited a rubric's file, and the scores of one run are of two measures unnoticed.
    """
    now, present = _rubrics_digest(current), (config_digest(current), code_version())
    values = {
        index: (metrics.get("rubrics_digest"), (metrics["config_digest"], metrics["code_version"]) == present)
        for index, metrics in trained.items()
    }
    for first, last, (value, unnoticed) in _stretches(values):
        if value != now:
            report = found.add if unnoticed else found.note
            report(run.iteration(first).metrics, f"{_made(first, last)} by {_other('set of rubrics', value, now)}")


def _made(first: int, last: int) -> str:
    return f"iteration {first} was made" if first == last else f"iterations {first} to {last} were made"


def _other(what: str, value: str | None, now: str | None) -> str:
    return f"another {what} ({_short(value)}) than the present one ({_short(now)})"


def _short(value: str | None) -> str:
    return "none" if value is None else value[-12:]


def _rubrics_digest(current: "Config") -> str | None:
    if current.judge == "program":
        return None
    from earl.judges import model_judge, rubric

    return rubric.digest_all(model_judge.rubrics_of(current))


def _stretches(values: dict[int, Value]) -> Iterator[tuple[int, int, Value]]:
    """Yield (first, last, value) for consecutive iterations of one value."""
    for value, stretch in groupby(values.items(), key=itemgetter(1)):
        indices = [index for index, _ in stretch]
        yield indices[0], indices[-1], value


def _check_evaluations(run: Run, current: "Config", trained: dict[int, dict[str, Any]], found: Verification) -> None:
    """Check that each summary is of the policy that its iteration has now."""
    start = _read(state.start_record(run.iteration(0)), Verification(), keys=("policy_digest",))
    digests = {index: metrics["policy_digest"] for index, metrics in trained.items()}
    if start:
        digests[0] = start["policy_digest"]
    for name in current.evaluations:
        for index, digest in digests.items():
            evaluation = run.evaluation(name, index)
            if evaluation.summary.is_file():
                found.evaluations += 1
                _check_evaluation(evaluation, digest, found)


def _check_evaluation(evaluation: Evaluation, digest: str, found: Verification) -> None:
    summary = _read(evaluation.summary, found, keys=("policy_digest",))
    if summary is not None and summary["policy_digest"] != digest:
        found.add(
            evaluation.summary,
            f"evaluates policy {summary['policy_digest'][:12]}, but iteration {evaluation.index} has {digest[:12]}; "
            "remove it and run on, or rerun the evaluation",
        )
    told = summary or {}
    for path, key in (
        (evaluation.rollouts, "rollouts_digest"),
        (evaluation.scores, "scores_digest"),
        (evaluation.table, "table_digest"),
    ):
        _check_file(path, told.get(key), f"the evaluation {evaluation.summary} is of it; rerun the evaluation", found)


def _check_files(run: Run, current: "Config", index: int, metrics: dict[str, Any], found: Verification) -> None:
    """Compare the files of an iteration with the digests that its training recorded."""
    iteration, stored = run.iteration(index), replays.iteration_of(run, index)
    remedy = f"iteration {index} was trained on it: put it back, or `earl rewind --iteration {index}`"
    ledger = _ledger(run, current, index, metrics) if found.deep else None
    for kind, path_of in (("rollouts", stored.rollouts), ("scores", stored.scores)):
        for shard, digest in enumerate(metrics["inputs"][kind]):
            is_sound = _check_file(path_of(shard), digest, remedy, found)
            if found.deep and is_sound and kind == "rollouts":
                _check_metadata(path_of(shard), metrics, ledger, found)
    again = f"`earl rewind --iteration {index}` trains it again"
    _check_file(iteration.episodes, metrics.get("episodes_digest"), again, found)
    if iteration.policy.is_dir():
        wrong = f"is not the policy that {iteration.metrics} recorded"
        _check_sealed(iteration.policy, found, metrics["policy_digest"], wrong)
        _check_base(run, iteration.policy, found)
    if iteration.trainer.is_dir():
        _check_sealed(iteration.trainer, found)


def _check_base(run: Run, policy: Path, found: Verification) -> None:
    """An adapter must be of the run's starting policy, whose content `_check_start` looks at."""
    if not adapter.is_adapter(policy):
        return
    try:
        base, start = adapter.record(policy), _starting_policy(run, Verification())
    except EarlError as error:
        found.problems.append(Problem(*str(error).split(": ", 1)))
        return
    if start is not None and base["policy_digest"] != start:
        wrong = f"names the base {base['policy_digest'][:12]}, but the run started from {start[:12]}"
        found.add(policy / adapter.BASE, wrong)
    elif (policy / base["path"]).resolve() != run.iteration(0).policy.resolve():
        found.add(policy / adapter.BASE, f"names a base that is not {run.iteration(0).policy}")


def _check_file(path: Path, digest: str | None, remedy: str, found: Verification) -> bool:
    """Return whether a file is there and, when contents are compared, has the digest that was recorded, if one was."""
    if not path.is_file():
        found.add(path, f"is missing; {remedy}")
        return False
    found.files += 1
    if not found.deep or digest is None:
        return True
    if manifest.digest_file(path) != digest:
        found.add(path, f"its content has changed since; {remedy}")
        return False
    found.hashed += 1
    return True


def _check_sealed(folder: Path, found: Verification, digest: str | None = None, wrong: str = "") -> None:
    """Check a folder against its manifest and, where one is given, its digest."""
    try:
        members = manifest.check(folder, deep=found.deep)
    except EarlError as error:
        found.add(folder, str(error).removeprefix(f"{folder}: "))
        return
    found.files += members
    found.hashed += members if found.deep else 0
    if digest is not None and manifest.digest_folder(folder) != digest:
        found.add(folder, wrong)


def _check_shared(current: "Config", found: Verification) -> None:
    """Check the data that prompts are drawn from, and the vision tokenizer."""
    data = [paths.resolve(current, reference) for reference in paths.prompt_paths(current)]
    for path in [*data, paths.vision_tokenizer_folder(current)]:
        if (path / manifest.NAME).is_file():
            _check_sealed(path, found)
        elif path.is_file():
            found.files += 1
        elif not path.is_dir() or path in paths.shared_stages(current):
            elsewhere = "" if path.is_absolute() else "verify from the folder where the run was started, "
            found.add(path, f"is missing or incomplete; {elsewhere}run the workflow again, or put it back")


def _ledger(run: Run, current: "Config", index: int, metrics: dict[str, Any]) -> str | None:
    """Return the digest of what rested in an iteration; None where there was no curriculum or nobody knows it."""
    if current.curriculum is None or metrics["config_digest"] != config_digest(current):
        return None
    try:
        return curriculum.ledger(current, run, index).digest
    except EarlError:
        return None  # Episodes that are missing or damaged are reported where they lie.


def _check_metadata(path: Path, metrics: dict[str, Any], ledger: str | None, found: Verification) -> None:
    """Rollouts must be of the policy that training says. A rewind keeps them when the configuration changes."""
    from earl.files import tables

    try:
        told = tables.read_metadata(path)
    except EarlError as error:
        found.add(path, str(error))
        return
    # A replay is of rollouts of another policy, by another configuration than its own.
    sampled_by = metrics["inputs"].get("sampled_by")
    expectations = {"policy_digest": sampled_by or metrics["inputs"]["policy"]}
    if sampled_by is None:
        expectations["config_digest"] = metrics["config_digest"]
        if tables.DECIDED_BY in told:  # Of a further round: the scores of the rounds before, which are the first ones.
            scores = metrics["inputs"]["scores"][: told[tables.DECIDED_BY].count(",") + 1]
            expectations[tables.DECIDED_BY] = json.dumps(scores)
        expectations |= {tables.LEDGER: ledger} if ledger is not None else {}
    differing = {key: expected for key, expected in expectations.items() if told.get(key) != expected}
    if differing.keys() == {"config_digest"} and told.get("config_digest"):
        before, then = told["config_digest"], metrics["config_digest"]
        found.note(path, f"was sampled with configuration {_short(before)}, and training on it was with {_short(then)}")
        return
    for key, expected in differing.items():
        found.add(path, f"its {key} is {str(told.get(key))[:12]}, but training recorded {str(expected)[:12]}")
