"""Dynamic sampling as files: rounds that are needed and rounds that are not, by stage, by segment and afterwards."""

import json
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from earl.config import load
from earl.config.schema import Config
from earl.data import mixing
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import learning
from earl.run import preflight, state, verify
from earl.stages import generate, iterate, prompts, replay, report, rescore, restore, rounds, select, train
from earl.tracking import files as tracked
from tests.support import bare_loop, forked_ranks, train_files
from tests.support.forked import Forked
from tests.support.prompt_files import ROWS, VOCABULARY, write
from tests.support.prompt_files import config as with_data
from tests.support.segment_runs import (
    LAST,
    assert_same,
    begin,
    command,
    configure,
    contents,
)
from tests.support.train_files import SAMPLES, made_of
from tests.support.workplace import Workplace, job_counts

MASK = {"zero_variance_groups": "mask"}
SAMPLING = {"usable_groups": 2, "max_rounds": 2, "prompts_per_round": 1}


# Which prompts


@pytest.mark.parametrize("long", [(), (3, 7, 8, 21, 30)], ids=["none left out", "some left out"])
def test_rounds_take_the_next_draws_of_the_iteration(tmp_path: Path, long) -> None:
    """The prompts of rounds are the iteration's draws one after another, whatever rounds or shards are asked for."""
    data = write(tmp_path / "pairs.parquet", long)
    sampling = {"usable_groups": 1, "max_rounds": 2, "prompts_per_round": 5}
    config = with_data(data, **MASK, dynamic_sampling=sampling)
    order = [row for _, row in mixing.draws(mixing.mixture([ROWS], [], 42), 42, 3)]
    kept = [row for row in order if row not in long]
    found: dict[int, str] = {}
    for part in (range(21, 23), range(23, 26), range(16, 21), range(16)):
        drawn = prompts.of_iteration(config, 3, VOCABULARY, part)
        found |= {index: example.example_id for index, example in drawn.examples}
        last = next(stop for stop in (16, 21, 26) if part.stop <= stop)
        assert drawn.left_out == order.index(kept[last - 1]) + 1 - last, "of all drawn up to the end of the round"
    assert found == {index: f"e{row}" for index, row in enumerate(kept[:26])}
    plain = prompts.of_iteration(with_data(data), 3, VOCABULARY, range(16))
    assert {index: example.example_id for index, example in plain.examples} == {i: found[i] for i in range(16)}


def test_data_without_enough_prompts_for_all_rounds_are_refused_in_the_plan(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.parquet", ())
    config = with_data(data, **MASK, dynamic_sampling={"usable_groups": 1, "max_rounds": 2, "prompts_per_round": 13})
    message = r"field dynamic_sampling.max_rounds asks for 2 rounds after .* = 16, together 42 prompts, .* 40 different"
    with pytest.raises(EarlError, match=message):
        preflight.check(config, started=True)


# Training on files


def few(**changes: object) -> dict:
    """Two groups at first, then one at a time."""
    return MASK | {"episodes_per_iteration": 2 * SAMPLES, "dynamic_sampling": SAMPLING} | changes


def write_rounds(config: Config, run: Run, vocabulary, *groups: tuple[int, int]) -> None:
    """Write the rollouts and scores of iteration 1, whose groups have these scores, as the stages would."""
    here, digest = run.iteration(1), manifest.digest_folder(run.iteration(0).policy)
    for shard in range(config.rollout_files):
        earlier = rounds.earlier(config, here, shard // config.rollout_shards, digest)
        part = generate.wanted(config, shard, earlier)
        rows = [train_files.made_up_row(1, group, sample, vocabulary) for group in part for sample in range(SAMPLES)]
        for row in rows:
            score = groups[int(row["example_id"])][row["sample_index"]]
            row |= dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts"), score)
        columns = {name: [row[name] for row in rows] for name in {*tables.ROLLOUTS.names, *tables.SCORES.names}}
        metadata = {"iteration": "1", "policy_digest": digest} | (earlier.metadata() if earlier else {})
        tables.write_table(here.rollouts(shard), tables.ROLLOUTS, columns, metadata, vocabulary.size - 1)
        train_files.write_scores(run, 1, shard, columns)


def rows_of(run: Run, files: int) -> list[int]:
    return [pq.read_metadata(run.iteration(1).rollouts(shard)).num_rows for shard in range(files)]


EQUAL, DIFFERENT, OTHER = (5, 5), (4, 6), (9, 1)


@pytest.mark.parametrize(
    ("groups", "rows", "trained", "sampled"),
    [
        ((EQUAL, DIFFERENT, OTHER), [4, 2, 0], [1, 2], 2),
        ((OTHER, DIFFERENT), [4, 0, 0], [0, 1], 1),
        ((EQUAL, DIFFERENT, EQUAL, OTHER), [4, 2, 2], [1, 3], 3),
        ((EQUAL, DIFFERENT, EQUAL, EQUAL), [4, 2, 2], [1], 3),
    ],
    ids=["one more", "none more", "all", "too few"],
)
def test_it_samples_until_enough_and_trains_on_those(new_run, vocabulary, groups, rows, trained, sampled):
    config, run = new_run("filled", **few())
    write_rounds(config, run, vocabulary, *groups)
    assert rows_of(run, 3) == rows
    metrics = train.run(config, run.path, 1)
    assert metrics["rounds"] == sampled
    usable = sum(group != EQUAL for group in groups)
    assert [metrics[name] for name in ("groups", "usable_groups", "trained_groups")] == [
        len(groups),
        usable,
        len(trained),
    ]
    episodes = tables.read_table(run.iteration(1).episodes, tables.EPISODES).to_pylist()
    assert sorted({int(row["group_id"][-4:]) for row in episodes if row["used"]}) == trained
    assert [bool(text) for text in metrics["warnings"]] == [True] * (len(trained) < 2)
    # The same step, loss and denominator as where nothing but these groups had been sampled.
    alone, other = new_run("alone", **MASK, episodes_per_iteration=len(groups) * SAMPLES)
    write_rounds(alone, other, vocabulary, *groups)
    expected = train.run(alone, other.path, 1)
    assert metrics["policy_digest"] == expected["policy_digest"]
    assert [metrics[name] for name in ("loss", "active_tokens")] == [
        expected[name] for name in ("loss", "active_tokens")
    ]


def test_more_usable_groups_than_wanted_are_left_out_of_the_step(new_run, vocabulary):
    """Three at first: the third is surplus, as if its episodes could not be used for another reason."""
    config, run = new_run("cut", **few(episodes_per_iteration=3 * SAMPLES))
    write_rounds(config, run, vocabulary, OTHER, DIFFERENT, (2, 7))
    metrics = train.run(config, run.path, 1)
    alone, other = new_run("alone", **MASK, episodes_per_iteration=3 * SAMPLES)
    write_rounds(alone, other, vocabulary, OTHER, DIFFERENT, EQUAL)
    assert metrics["policy_digest"] == train.run(alone, other.path, 1)["policy_digest"]
    assert (metrics["trained_groups"], metrics["surplus_episodes"], metrics["used_episodes"]) == (2, 2, 4)


def test_shards_change_nothing_but_the_names_of_files(new_run, vocabulary):
    found = []
    for shards in (1, 2):
        config, run = new_run(f"shards{shards}", **few(rollout_shards=shards))
        write_rounds(config, run, vocabulary, EQUAL, DIFFERENT, OTHER)
        train.run(config, run.path, 1)
        found.append(made_of(run, 1))
    assert rows_of(run, 6) == [2, 2, 0, 2, 0, 0]
    assert found[0] == found[1]


def test_rounds_that_other_scores_decided_are_named(new_run, vocabulary):
    config, run = new_run(**few())
    write_rounds(config, run, vocabulary, EQUAL, DIFFERENT, OTHER)
    path = run.iteration(1).scores(0)
    table, told = pq.read_table(path), tables.read_metadata(path)
    tables.write_table(path, tables.SCORES, table, {"rollouts_digest": told["rollouts_digest"], "again": "yes"})
    with pytest.raises(
        EarlError, match=r"rollouts/0001\.parquet: whether this round is needed was decided by other sc"
    ):
        train.run(config, run.path, 1)


def test_rounds_for_another_number_of_groups_are_named(new_run, vocabulary):
    config, run = new_run(**few())
    write_rounds(config, run, vocabulary, EQUAL, DIFFERENT, OTHER)
    more = Config(**config.model_dump() | {"dynamic_sampling": SAMPLING | {"usable_groups": 3}})
    with pytest.raises(EarlError, match=r"2 further rounds are needed for the 3 groups .* shards hold 6 episodes"):
        train.run(more, run.path, 1)


def test_a_round_of_which_a_shard_is_missing_rows_is_named(new_run, vocabulary):
    config, run = new_run(**few(rollout_shards=1, dynamic_sampling=SAMPLING | {"prompts_per_round": 2}))
    write_rounds(config, run, vocabulary, EQUAL, DIFFERENT, OTHER, EQUAL)
    for path, schema in ((run.iteration(1).rollouts(1), tables.ROLLOUTS), (run.iteration(1).scores(1), tables.SCORES)):
        told = tables.read_metadata(path)
        told |= {"rollouts_digest": manifest.digest_file(run.iteration(1).rollouts(1))}
        del told["huggingface"], told["earl_table"]
        tables.write_table(path, schema, pq.read_table(path).slice(0, 2), told, vocabulary.size - 1)
    message = "shards hold 6 episodes, but episodes_per_iteration is 4, and a further round has 4, up to 12"
    with pytest.raises(EarlError, match=message):
        train.run(config, run.path, 1)


# The demo


FILLED = MASK | {"dynamic_sampling": {"usable_groups": 3, "max_rounds": 2, "prompts_per_round": 3}}
# What else draws prompts or takes a step by what iterations before have left.
FILLED |= {"curriculum": {"rest_iterations": 2}, "reference_refresh_iterations": 2, "entropy_coeff": 1e-3}
FILLED |= {"evaluations": {}}
"""Four groups of two at first, and three more in each of two rounds; of four shards, one is empty then."""


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> Run:
    return bare_loop.run_all(configure(tmp_path_factory.mktemp("by-stage"), **FILLED))


@pytest.fixture
def copy(tmp_path, by_stage) -> Run:
    shutil.copytree(by_stage.path.parent, tmp_path / "copy", symlinks=True)
    return Run(tmp_path / "copy" / "a")


def metrics_of(run: Run) -> list[dict]:
    return [state.read_metrics(run, index) for index in range(1, LAST + 1)]


def ages(run: Run) -> dict[Path, int]:
    files = [path for kind in ("rollouts", "scores") for path in (run.path / "iterations").glob(f"*/{kind}/*.parquet")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_there_are_rounds_that_are_needed_and_rounds_that_are_not(by_stage):
    found = metrics_of(by_stage)
    assert len({each["rounds"] for each in found}) > 1
    for index, each in enumerate(found, start=1):
        sizes = [pq.read_metadata(by_stage.iteration(index).rollouts(shard)).num_rows for shard in range(12)]
        sampled = each["rounds"]
        assert sizes == [2] * 4 + [0, 2, 2, 2] * (sampled - 1) + [0] * 4 * (3 - sampled)
        assert each["trained_groups"] == min(3, each["usable_groups"])
        assert (each["usable_groups"] < 3) <= (sampled == 3)
    assert verify.verify(by_stage, deep=True).problems == []


@pytest.mark.slow
def test_ranks_of_a_segment_write_the_bytes_of_the_stages(tmp_path, by_stage):
    """As one that is killed and continued does, see below."""
    run = begin(tmp_path, by_stage, **FILLED, segment_processes=3)
    forked_ranks.launch(3, "earl", *command(run, LAST))
    assert_same(run, by_stage)


@pytest.mark.slow
def test_another_number_of_shards_trains_the_same_policies(tmp_path, by_stage):
    run = begin(tmp_path, by_stage, **FILLED, rollout_shards=1)
    iterate.run(load.read(run.config), run.path, LAST)
    for index in range(1, LAST + 1):
        digests = [manifest.digest_file(each.iteration(index).episodes) for each in (run, by_stage)]
        assert digests[0] == digests[1]
    assert [each["policy_digest"] for each in metrics_of(run)] == [
        each["policy_digest"] for each in metrics_of(by_stage)
    ]


@pytest.mark.slow
def test_commands_load_no_model_and_ask_no_judge_for_a_round_that_is_not_needed(copy, earl, monkeypatch):
    """Each shard again, by its command: the same bytes, and a model only where there are rows."""
    loaded, asked = [], []
    load_sampler, program = generate.Sampler.load, "earl.judges.program.ProgramJudge.score"
    monkeypatch.setattr(generate.Sampler, "load", lambda *given: loaded.append(given) or load_sampler(*given))
    from earl.judges.program import ProgramJudge

    score = ProgramJudge.score
    monkeypatch.setattr(program, lambda judge, given: asked.append(given) or score(judge, given))
    index = next(each["iteration"] for each in metrics_of(copy) if each["rounds"] == 2)
    here, before = copy.iteration(index), contents(copy)
    for shard in range(12):
        rows = pq.read_metadata(here.rollouts(shard)).num_rows
        here.rollouts(shard).unlink()
        here.scores(shard).unlink()
        policy, known = copy.iteration(index - 1).policy, len(loaded)
        common = ("--config", copy.config)
        place = ("--iteration", index, "--shard", shard, "--policy", policy, "--out", here.rollouts(shard))
        assert earl("generate", *common, *place).returncode == 0
        assert (len(loaded) > known) == (rows > 0)
        assert earl("score", *common, "--rollouts", here.rollouts(shard), "--out", here.scores(shard)).returncode == 0
    assert contents(copy) == before
    assert len(asked) == 4 + 3


@pytest.mark.slow
def test_killed_between_rounds_it_samples_nothing_twice(tmp_path, by_stage):
    index = next(each["iteration"] for each in metrics_of(by_stage) if each["rounds"] > 1)
    run = begin(tmp_path, by_stage, **FILLED)
    started = Forked("earl", command(run, LAST))
    while not run.iteration(index).rollouts(5).exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = ages(run)
    iterate.run(load.read(run.config), run.path, LAST)
    assert before.items() <= ages(run).items()
    assert_same(run, by_stage, checkpoints=(2, index - 1, LAST))  # What was trained again gets one, too.


@pytest.mark.slow
def test_scores_that_change_decide_the_rounds_after_them_anew(copy):
    """A segment samples the rounds that are needed by the scores of now, and by no others."""
    index = next(each["iteration"] for each in metrics_of(copy) if each["rounds"] > 1)
    here = copy.iteration(index)
    for shard in range(4):
        path = here.scores(shard)
        table, told = pq.read_table(path), tables.read_metadata(path)
        for name in ("edit_success", "overedit", "naturalness", "artifacts"):
            table = table.set_column(table.schema.get_field_index(name), name, [[1.0, 9.0]])
        del told["huggingface"], told["earl_table"]
        tables.write_table(path, tables.SCORES, table, told)
    state.rewind(copy, index)
    iterate.run(load.read(copy.config), copy.path, index)
    assert state.read_metrics(copy, index)["rounds"] == 1
    assert [pq.read_metadata(here.rollouts(shard)).num_rows for shard in range(4, 12)] == [0] * 8
    assert verify.verify(copy, deep=True).problems == []


@pytest.mark.slow
def test_what_reads_a_run_takes_rounds_without_rows(copy, by_stage):
    config = load.read(copy.config)
    found = metrics_of(copy)
    shutil.rmtree(copy.iteration(2).policy)
    restore.run(copy.path, 2)
    manifest.check(copy.iteration(2).policy, deep=True)
    report.run(copy.path, copy.report, None, None)
    assert "of an iteration, with dynamic sampling" in copy.report.read_text()
    assert learning.repeats(copy, found) > 0
    for index, each in enumerate(found, start=1):
        assert len(list(tracked.episodes(copy, index))) == each["episodes"]
    again = rescore.run(copy.path, "again", {})
    assert again["parts"]["iterations"]["episodes"] == sum(each["episodes"] for each in found)
    replayed = replay.run(copy.path, copy.path.with_name("replayed"), {"learning_rate": 1e-5}, "again")
    assert [each["trained_groups"] for each in metrics_of(replayed.run)] == [each["trained_groups"] for each in found]
    assert replayed.off_policy == [2, 3, 4]
    with pytest.raises(
        EarlError, match=r"--set dynamic_sampling\.usable_groups: decides how rollouts or scores are made"
    ):
        replay.run(copy.path, copy.path.with_name("other"), {"dynamic_sampling.usable_groups": 1})
    with pytest.raises(EarlError, match="zero_variance_groups is `keep`, but dynamic_sampling"):
        replay.run(copy.path, copy.path.with_name("other"), {"zero_variance_groups": "keep"})
    selecting = config.model_copy(update={"selections": {"x": selection(copy)}})
    select.run(selecting, "x", copy.path.with_name("selected"))
    summary = json.loads((copy.path.with_name("selected") / "summary.json").read_text())
    assert summary["groups"] == sum(each["groups"] for each in found)


def selection(run: Run):
    from earl.config.sections import Selection

    return Selection(run=str(run.path))


@pytest.mark.slow
def test_a_round_of_other_scores_is_found_by_a_deep_look(copy):
    index = next(each["iteration"] for each in metrics_of(copy) if each["rounds"] == 1)
    path = copy.iteration(index).rollouts(4)
    told = tables.read_metadata(path) | {tables.DECIDED_BY: json.dumps(["0" * 64] * 4)}
    del told["huggingface"], told["earl_table"]
    tables.write_table(path, tables.ROLLOUTS, pq.read_table(path), told, VOCABULARY.size - 1)
    metrics = state.read_metrics(copy, index)
    metrics["inputs"]["rollouts"][4] = manifest.digest_file(path)
    copy.iteration(index).metrics.write_text(json.dumps(metrics))
    (found,) = verify.verify(copy, deep=True).problems
    assert found.file == path.as_posix()
    assert "its scores_digests is" in found.problem


# The workflow


class TestWorkflow:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Workplace:
        return Workplace(tmp_path)

    def experiment(self, place: Workplace, name: str = "a") -> str:
        sampling = {"usable_groups": 1, "max_rounds": 2, "prompts_per_round": 3}
        sizes = {"episodes_per_iteration": 16, "generations_per_sample": 2, "engine_batch_size": 2, "rollout_shards": 2}
        return place.experiment(name, **MASK, **sizes, dynamic_sampling=sampling, num_iterations=2)

    def test_the_files_of_all_rounds_are_planned(self, place):
        experiment = self.experiment(place)
        ends = {"start": 1, "verify": 1, "report": 1, "all": 1}
        assert job_counts(place.run(experiment, "-n")) == {"iterate": 1, **ends, "total": 5}
        stages = {"generate": 12, "score": 12, "train": 2}
        assert job_counts(place.run(experiment, "-n", granularity="stage")) == {**stages, **ends, "total": 30}

    @pytest.mark.slow
    def test_a_round_is_sampled_once_the_ones_before_are_scored(self, place):
        place.run(self.experiment(place), granularity="stage")
        commands = [line for line in place.stages() if "--iteration 000002" in line or "000002/rollouts" in line]
        scored = [
            next(i for i, line in enumerate(commands) if line.startswith("score") and f"rollouts/{shard:04d}" in line)
            for shard in range(6)
        ]
        for shard in range(2, 6):
            sampled = next(i for i, line in enumerate(commands) if f"--shard {shard:04d}" in line)
            assert max(scored[: shard // 2 * 2]) < sampled
        both = [place.folder("a"), place.folder("b")]
        place.run(self.experiment(place, "b"))
        patterns = ("iterations/*/rollouts/*", "iterations/*/scores/*", "iterations/*/train/*")
        found = [
            {p.relative_to(run.path): p.read_bytes() for one in patterns for p in run.path.glob(one)} for run in both
        ]
        assert found[0] == found[1]
        assert len(found[0]) == 2 * (6 + 6 + 2)
