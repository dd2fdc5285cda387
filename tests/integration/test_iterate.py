"""A segment: one program, with models in memory, that writes the files of the stages; killed, continued, changed."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from earl.config import freeze, load
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.judges.program import ProgramJudge
from earl.messages.errors import EarlError
from earl.run import state, verify
from earl.stages import iterate, restore
from tests.support import bare_loop, forked_ranks
from tests.support.forked import Forked
from tests.support.segment_runs import (
    LAST,
    assert_same,
    begin,
    command,
    configure,
    contents,
    reconfigure,
)

pytestmark = pytest.mark.slow

RARE_CHECKPOINTS = {
    "segment_checkpoint_every_n_iterations": 10,
    "save_checkpoints_every_n_iterations": None,
    "keep_checkpoints_every_n_iterations": None,
}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> Run:
    """The run as the stages make it, each policy loaded from its folder."""
    return bare_loop.run_all(configure(tmp_path_factory.mktemp("by-stage")))


@pytest.fixture(scope="module")
def by_segment(tmp_path_factory, by_stage) -> Run:
    """The same run as one segment in this process."""
    run = begin(tmp_path_factory.mktemp("by-segment"), by_stage)
    iterate.run(load.read(run.config), run.path, LAST)
    return run


@pytest.fixture
def copy(tmp_path, by_segment) -> Run:
    """A copy of the finished run, to take something away from."""
    shutil.copytree(by_segment.path.parent, tmp_path / "copy", symlinks=True)
    return Run(tmp_path / "copy" / "a")


def facts(run: Run) -> dict[str, tuple[int, int]]:
    """Identity and age of every file with rollouts or scores: changed where a file is written anew."""
    files = [p for kind in ("rollouts", "scores") for p in (run.path / "iterations").glob(f"*/{kind}/*.parquet")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def assert_sound(run: Run) -> None:
    assert verify.verify(run, deep=True).problems == []


# The same bytes


def test_one_program_writes_the_bytes_of_the_stages(by_segment, by_stage):
    assert_same(by_segment, by_stage)
    assert_sound(by_segment)
    record = json.loads(by_segment.segment(LAST).read_text())
    assert (record["trained"], record["trained_again"]) == ([1, 2, 3, 4], [])
    assert record["bytes_written"]["scores"] == sum(
        path.stat().st_size for path in (by_segment.path / "iterations").glob("*/scores/*")
    )


def test_ranks_that_sample_and_one_that_trains_write_the_bytes_of_the_stages(tmp_path, by_stage):
    """One rank more than there are shards, to which that is said."""
    run = begin(tmp_path, by_stage, segment_processes=5)
    printed = forked_ranks.launch(5, "earl", *command(run, LAST))
    assert_same(run, by_stage)
    record = json.loads(run.segment(LAST).read_text())
    assert len(record["seconds_by_rank"]) == len(record["peak_memory_bytes_by_rank"]) == 5
    assert record["peak_memory_bytes_by_rank"][0].keys() == record["seconds_by_rank"][0].keys()
    assert "1 of 5 ranks never sample, since rollout_shards is 4; lower segment_processes to 4" in printed
    assert len(re.findall(r"iterate: \d of 4: reward", printed)) == LAST, "one line an iteration, by one rank"
    assert "%|" not in printed, "no progress bars in a log"


# Granularity changed half-way


def test_begun_by_stage_and_continued_as_a_segment(tmp_path, by_stage):
    """The other way round: see below, after a failure."""
    shutil.copytree(by_stage.path.parent, tmp_path / "copy", symlinks=True)
    run = Run(tmp_path / "copy" / "a")
    for index in (3, 4):
        shutil.rmtree(run.iteration(index).path)
        for path in (run.path / "evaluations").glob(f"*/{index:06d}*"):
            path.unlink()
    record = iterate.run(load.read(run.config), run.path, LAST)
    assert (record["trained"], record["trained_again"]) == ([3, 4], [])
    assert_same(run, by_stage)


# Failures


class FailingJudge(ProgramJudge):
    """Answers until it has been asked about so many files."""

    def __init__(self, files: int) -> None:
        super().__init__()
        self.left = files

    def score(self, judgements):
        if not self.left:
            raise EarlError("the judge does not answer")
        self.left -= 1
        return super().score(judgements)


def test_a_judge_that_fails_leaves_all_earlier_work(tmp_path, by_stage, monkeypatch):
    run = begin(tmp_path, by_stage)
    config = reconfigure(run, **RARE_CHECKPOINTS)
    # 2 evaluations of policy 0, 4 shards, 4 shards, 1 evaluation of policy 2, and 2 of the shards of iteration 3
    monkeypatch.setattr("earl.judges.get", lambda config: FailingJudge(2 + 4 + 4 + 1 + 2))
    with pytest.raises(EarlError, match="does not answer"):
        iterate.run(config, run.path, LAST)
    monkeypatch.undo()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (2, 0)
    before = facts(run)
    assert len(before) == 4 + 4 + 4 + 4 + 4 + 2
    # By stage from here: what has no checkpoint is restored.
    other = Run(tmp_path / "other" / "a")
    shutil.copytree(run.path.parent, other.path.parent, symlinks=True, ignore=shutil.ignore_patterns("other"))
    restore.run(other.path, 2)
    for index in (3, 4):
        bare_loop.run_iteration(config, other, index)
        bare_loop.evaluate(config, other, index)
    assert_same(other, by_stage, checkpoints=(2, 3, 4))
    # As a segment from here: nothing that is there is written anew. Stopped again, it keeps what it caught up with.
    monkeypatch.setattr("earl.judges.get", lambda config: FailingJudge(0))
    with pytest.raises(EarlError, match="does not answer"):
        iterate.run(config, run.path, LAST)
    monkeypatch.undo()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (2, 2)
    record = iterate.run(config, run.path, LAST)
    assert (record["trained"], record["trained_again"]) == ([3, 4], [])
    assert before.items() <= facts(run).items()
    assert_same(run, by_stage, checkpoints=(4,))


def test_what_was_removed_is_made_again(copy, by_stage):
    config = load.read(copy.config)
    shutil.rmtree(copy.iteration(4).trainer)
    gone = [
        copy.iteration(3).rollouts(1), copy.iteration(3).scores(2), copy.iteration(4).scores(0),
        copy.iteration(4).metrics, copy.evaluation("heldout", 2).rollouts, copy.evaluation("heldout_greedy", 3).summary,
        copy.evaluation("heldout", 4).scores, copy.evaluation("heldout_greedy", 4).table,
    ]  # fmt: skip
    for path in gone:
        path.unlink()
    kept = facts(copy)
    record = iterate.run(config, copy.path, LAST)
    assert (record["trained"], record["trained_again"]) == ([4], [3])
    assert kept.items() <= facts(copy).items()
    assert_same(copy, by_stage, checkpoints=(2, 3, 4))  # and of iteration 3, which it caught up with
    assert_sound(copy)


def test_a_finished_segment_has_nothing_to_do(copy, by_stage):
    before = {path: path.stat().st_mtime_ns for path in copy.path.rglob("*") if path.is_file()}
    record = iterate.run(load.read(copy.config), copy.path, LAST)
    assert (record["trained"], record["trained_again"], sum(record["bytes_written"].values())) == ([], [], 0)
    after = {path: path.stat().st_mtime_ns for path in before if path != copy.segment(LAST)}
    assert after.items() <= before.items()


def test_training_again_that_gives_another_policy_starts_anew_from_there(copy, by_stage, caplog):
    shutil.rmtree(copy.iteration(4).policy)
    path = copy.iteration(3).scores(0)
    table = pq.read_table(path)
    other = [9.0 * (row % 2) for row in range(table.num_rows)]  # so that groups have something to teach
    for name in ("edit_success", "overedit", "naturalness", "artifacts"):
        table = table.set_column(table.schema.get_field_index(name), name, [other])
    told = {key: value for key, value in tables.read_metadata(path).items() if key not in ("huggingface", "earl_table")}
    tables.write_table(path, tables.SCORES, table, told)
    old = {index: json.loads(copy.iteration(index).metrics.read_text())["policy_digest"] for index in (3, 4)}
    with caplog.at_level("WARNING", logger="earl"):
        record = iterate.run(load.read(copy.config), copy.path, LAST)
    assert (record["trained"], record["trained_again"]) == ([3, 4], [])
    assert "iterations 3 to 4 are made anew" in caplog.text
    now = json.loads(copy.iteration(3).metrics.read_text())["policy_digest"]
    assert f"Policy: {now} now, {old[3]} then" in caplog.text
    assert tables.read_metadata(copy.iteration(4).rollouts(0))["policy_digest"] not in old.values()
    assert_sound(copy)


def test_half_sampled_with_another_number_of_shards(copy, by_stage):
    shutil.rmtree(copy.iteration(4).policy)
    copy.iteration(4).metrics.unlink()
    config = reconfigure(copy, rollout_shards=2)
    iterate.run(config, copy.path, LAST)
    assert manifest.digest_folder(copy.iteration(4).policy) == manifest.digest_folder(by_stage.iteration(4).policy)
    # A complete iteration keeps the number that it has.
    shutil.rmtree(copy.iteration(4).policy)
    iterate.run(reconfigure(copy, rollout_shards=4), copy.path, LAST)
    assert manifest.digest_folder(copy.iteration(4).policy) == manifest.digest_folder(by_stage.iteration(4).policy)


def test_after_rewinding_it_trains_again_from_the_newest_checkpoint(copy, by_stage):
    assert state.rewind(copy, 2) == [2, 3, 4]
    kept = facts(copy)
    record = iterate.run(load.read(copy.config), copy.path, LAST)
    assert (record["trained"], record["trained_again"]) == ([2, 3, 4], [1])
    assert facts(copy) == kept
    assert_same(copy, by_stage)


def test_another_learning_rate_from_an_iteration_on_keeps_its_rollouts_and_scores(copy, by_stage, caplog):
    state.rewind(copy, 3)
    kept = {path: stamp for path, stamp in facts(copy).items() if "/000004/" not in path}
    config = load.read(copy.config).model_copy(update={"learning_rate": 1e-5})
    freeze.write(config, copy.config, accept_changes=True)
    with caplog.at_level("WARNING", logger="earl"):
        iterate.run(config, copy.path, LAST)
    assert kept.items() <= facts(copy).items()
    assert f"{copy.iteration(3).rollouts(0)}: was made with another configuration and is used" in caplog.text
    assert manifest.digest_folder(copy.iteration(2).policy) == manifest.digest_folder(by_stage.iteration(2).policy)
    inputs = json.loads(copy.iteration(4).metrics.read_text())["inputs"]
    assert inputs["policy"] == json.loads(copy.iteration(3).metrics.read_text())["policy_digest"]
    assert inputs["policy"] != manifest.digest_folder(by_stage.iteration(3).policy)


def test_what_another_configuration_trained_is_not_trained_again(copy):
    shutil.rmtree(copy.iteration(4).policy)
    before = contents(copy)
    config = load.read(copy.config).model_copy(update={"learning_rate": 1e-5})
    with pytest.raises(EarlError, match=r"iteration 3 was trained with another configuration.*rewind.*--iteration 3$"):
        iterate.run(config, copy.path, LAST)
    assert contents(copy) == before


def test_a_segment_that_ends_before_the_newest_checkpoint_changes_nothing(copy):
    shutil.rmtree(copy.iteration(2).policy)
    before = contents(copy)
    assert iterate.run(load.read(copy.config), copy.path, 2)["trained_again"] == []
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"engine": "vllm", "vllm_tensor_parallel_size": 2}, 1, "vllm_tensor_parallel_size is 2.*granularity=stage"),
        ({"attention": "flash"}, LAST, "attention is 'flash', which needs a GPU and dtype bfloat16"),
        ({}, LAST + 1, "--to is 5, but num_iterations is 4 in .*config.json.*snakemake --config set=num_iterations=5"),
    ],
)
def test_what_a_segment_cannot_do_is_refused_before_it_loads_anything(copy, changes, to, message):
    for path in (copy.path / "iterations").glob("000004/rollouts/*"):
        path.unlink()
    before = contents(copy)
    config = load.read(copy.config).model_copy(update=changes)
    with pytest.raises(EarlError, match=message):
        iterate.run(config, copy.path, to)
    assert contents(copy) == before, "nothing was sampled"


def test_a_run_that_has_not_been_started_is_named(tmp_path):
    with pytest.raises(EarlError, match=r"has not been started; earl start --run"):
        iterate.run(configure(tmp_path), tmp_path / "a", 1)


# Killed


class Attempt:
    """`earl iterate`, to be killed with all its ranks."""

    def __init__(self, run: Run, to: int = LAST) -> None:
        self.output = (run.path.parent / "output.txt").open("w+")
        self.leader = Forked("earl", command(run, to), output=self.output)

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.leader.poll() is None, self.text()
            time.sleep(0.01)

    def kill(self) -> None:
        ranks = psutil.Process(self.leader.pid).children(recursive=True)
        for process in (psutil.Process(self.leader.pid), *ranks):
            process.send_signal(signal.SIGKILL)
        self.leader.wait()
        psutil.wait_procs(ranks)

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()


def test_ranks_that_are_killed_while_they_sample_end_in_the_same_bytes_and_sample_nothing_twice(tmp_path, by_stage):
    run = begin(tmp_path, by_stage, segment_processes=2)
    attempt = Attempt(run)
    attempt.wait_for(run.iteration(2).rollouts(0))
    attempt.kill()
    seen = facts(run)
    assert state.newest_complete(run) >= 1
    forked_ranks.launch(2, "earl", *command(run, LAST))
    assert seen.items() <= facts(run).items()
    assert_same(run, by_stage)
    assert_sound(run)


def test_two_ranks_that_train_are_killed_and_end_as_two_that_were_not(tmp_path, by_stage):
    changes = {"train_processes": 2, "segment_processes": None, **RARE_CHECKPOINTS}
    undisturbed, run = (begin(tmp_path / name, by_stage, **changes) for name in ("undisturbed", "killed"))
    forked_ranks.launch(2, "earl", *command(undisturbed, 2))
    attempt = Attempt(run, to=2)
    attempt.wait_for(run.iteration(1).metrics)
    attempt.kill()
    assert (state.newest_complete(run), state.newest_checkpoint(run)) == (1, 0)
    forked_ranks.launch(2, "earl", *command(run, 2))
    assert json.loads(run.segment(2).read_text())["trained_again"] == [1]
    # And the checkpoint of iteration 1, which it caught up with.
    caught_up = tuple(f"iterations/000001/{part}/" for part in ("policy", "trainer"))
    files = {path: digest for path, digest in contents(run).items() if not path.startswith(caught_up)}
    assert files == contents(undisturbed)
    assert [json.loads(run.iteration(index).metrics.read_text())["ranks"] for index in (1, 2)] == [2, 2]
