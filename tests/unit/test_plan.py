"""What is left of a run, and what each rule waits for: pure functions of a run folder and a configuration."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from earl.config.schema import Config
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import plan as planning
from earl.run import resources, state
from earl.run.plan import Plan
from earl.workflow import inputs
from earl.workflow.inputs import Inputs
from earl.workflow.shared import Shared
from tests.support.workplace import EXPERIMENT

EVERY_SECOND = {"evaluations": {"held_out": {"prompts": 4, "every_n_iterations": 2}}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run without iterations, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Run(Path("runs") / "a")
    write(state.start_record(folder.iteration(0)))
    folder.iteration(0).policy.mkdir()
    return folder


def write(*paths: Path, time: int = 1) -> None:
    """Write files of this age; the folder that each is in has it, too."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        policy, inputs = hashlib.sha256(b"{}").hexdigest(), {"policy": "0", "rollouts": ["0"]}
        is_manifest = path.name == "manifest.json"
        path.write_text("{}" if is_manifest else json.dumps({"inputs": inputs, "policy_digest": policy}))
        for changed in (path, path.parent):
            os.utime(changed, (time, time))


def complete(run: Run, *indices: int, checkpoints: tuple[int, ...] = ()) -> None:
    """Write iterations whose files are as old as their number."""
    for i in indices:
        here = run.iteration(i)
        write(here.rollouts(0), here.scores(0), here.episodes, here.metrics, time=i)
        if i in checkpoints:
            write(here.policy / "manifest.json", here.trainer / "manifest.json", time=i)


def made(by_segment: bool = True, **fields: object) -> Plan:
    return planning.plan(Config(**(EXPERIMENT | fields)), by_segment)


def asked(plan: Plan, *forced: str) -> Inputs:
    """The inputs of rules; those that Snakemake is to take as ancient are marked by a tilde."""
    plans = {plan.key: plan}
    return Inputs(plans, Shared(plans), lambda files: [f"~{file}" for file in files], lambda: set(forced))


def wildcards(index: int, **more: str) -> SimpleNamespace:
    return SimpleNamespace(run="runs/a", step=f"{index:06d}", **more)


class TestPlan:
    def test_by_stage_it_starts_after_the_newest_complete_iteration(self, run):
        complete(run, 1, 2, 3)
        plan = made(by_segment=False, num_iterations=5)
        assert (plan.newest, list(plan.iterations), plan.segments) == (3, [4, 5], [])

    def test_segments_start_at_a_checkpoint_and_are_cut_at_multiples_of_their_length(self, run):
        complete(run, 1, 2, 3, 4, 5, checkpoints=(1, 3))
        plan = made(num_iterations=8, segment_length=3)
        assert (plan.newest, plan.checkpoint, list(plan.iterations)) == (5, 3, [])
        assert [list(part) for part in plan.segments] == [[4, 5, 6], [7, 8]]
        # One that has its end, but not its checkpoint, is not done.
        complete(run, 6, 7, 8)
        assert [list(part) for part in made(num_iterations=8, segment_length=3).segments] == [[4, 5, 6], [7, 8]]

    def test_a_finished_run_needs_nothing_until_it_is_to_be_longer(self, run):
        complete(run, 1, 2, 3, checkpoints=(3,))
        for by_segment in (True, False):
            plan = made(by_segment)
            assert (plan.segments, list(plan.iterations), plan.evaluations) == ([], [], {})
        assert [list(part) for part in made(num_iterations=60).segments] == [list(range(4, 51)), list(range(51, 61))]

    def test_a_segment_makes_the_evaluations_from_its_first_policy_on(self, run):
        assert made(**EVERY_SECOND).evaluations == {}
        assert made(by_segment=False, **EVERY_SECOND).evaluations == {0: ["held_out"], 2: ["held_out"], 3: ["held_out"]}
        complete(run, 1, 2, 3, 4, 5, checkpoints=(2, 4))
        write(run.evaluation("held_out", 0).summary)
        # 2 is behind the start of the segment, 4 its first policy.
        assert made(num_iterations=8, **EVERY_SECOND).evaluations == {2: ["held_out"]}

    def test_old_evaluations_are_made_while_their_policy_is_on_disk(self, run):
        complete(run, 1, 2, 3, 4, 5, 6, checkpoints=(4, 6))
        planned = made(by_segment=False, num_iterations=7, **EVERY_SECOND).evaluations
        assert sorted(planned) == [0, 4, 6, 7], "policy 2 is gone"

    def test_a_run_without_iterations_is_evaluated_by_stage(self, run):
        assert made(num_iterations=0, **EVERY_SECOND).evaluations == {0: ["held_out"]}

    def test_the_starting_policy_must_be_there_where_it_is_needed(self, run):
        run.iteration(0).policy.rmdir()
        with pytest.raises(EarlError, match="earl start --run runs/a"):
            made()
        complete(run, 1, 2, 3, checkpoints=(3,))
        assert made().segments == []

    def test_a_segment_needs_the_reference_of_its_first_iteration(self, run):
        complete(run, 1, 2, 3, checkpoints=(3,))
        refreshed = {"reference_refresh_iterations": 2, "kl_coeff": 0.1, "num_iterations": 6}
        with pytest.raises(EarlError, match=r"000002/policy: is missing.* reference of iteration 4.*earl restore"):
            made(**refreshed)
        complete(run, 2, checkpoints=(2,))
        assert [list(part) for part in made(**refreshed).segments] == [[4, 5, 6]]

    def test_sends_wait_for_the_end_of_the_segment_that_is_due(self, run):
        sending = {"wandb_mode": "online", "wandb_every_n_iterations": 2, "num_iterations": 7, "segment_length": 3}
        assert made(False, **sending).sends() == [("wandb", i) for i in (2, 4, 6, 7)]
        assert made(True, **sending).sends() == [("wandb", i) for i in (3, 6, 7)]
        assert made(True, num_iterations=7, wandb_mode="offline", segment_length=3).sends() == [("wandb", 7)]

    def test_two_experiments_of_one_folder_are_refused(self, run):
        with pytest.raises(EarlError, match="two of the experiments have this run folder"):
            planning.by_run([made(), made()])


class TestInputs:
    def test_by_stage_an_iteration_waits_for_the_one_before(self, run):
        ask = asked(made(by_segment=False))
        first, second = (ask.generate(wildcards(i, shard="0000"))["policy"] for i in (1, 2))
        assert (first, second) == (
            ["runs/a/iterations/000000/start.json"],
            ["runs/a/iterations/000001/train/metrics.json"],
        )
        train = ask.train(wildcards(2))
        assert next(iter(train)) == "checkpoint", "the way back takes one step an iteration"
        assert train["checkpoint"] == second
        assert train["scores"] == ["runs/a/iterations/000002/scores/0000.parquet"]

    def test_by_stage_training_waits_for_its_reference_and_has_one_that_is_gone_restored(self, run):
        refreshed = {"reference_refresh_iterations": 2, "kl_coeff": 0.1, "num_iterations": 6}
        ask = asked(made(by_segment=False, **refreshed))
        found = [ask.train(wildcards(i))["reference"] for i in (2, 3)]
        assert found == [["runs/a/iterations/000000/start.json"], ["runs/a/iterations/000002/train/metrics.json"]]
        complete(run, 1, 2, 3, checkpoints=(3,))
        ask = asked(made(by_segment=False, **refreshed))
        assert "~runs/a/iterations/000002/policy/manifest.json" in ask.train(wildcards(4))["reference"]

    def test_what_an_old_checkpoint_was_used_for_already_does_not_ask_for_it(self, run):
        complete(run, 1, 2, 3, checkpoints=(3,))
        run.iteration(2).episodes.unlink()
        ask, gone = asked(made()), "~runs/a/iterations/000001/policy/manifest.json"
        assert ask.generate(wildcards(2, shard="0000"))["policy"] == []
        assert gone in ask.train(wildcards(2))["checkpoint"]
        run.iteration(2).rollouts(0).unlink()
        assert gone in ask.generate(wildcards(2, shard="0000"))["policy"]
        # It is not needed for what the command line does not have made again.
        rollouts, metrics = run.iteration(3).rollouts(0).as_posix(), run.iteration(3).metrics.as_posix()
        for forced, asks in ((rollouts, True), ("generate", True), (metrics, False), ("train", False)):
            policy = asked(made(), forced).generate(wildcards(3, shard="0000"))["policy"]
            assert ("~runs/a/iterations/000002/policy/manifest.json" in policy) == asks, forced

    def test_rollouts_of_a_policy_that_has_been_trained_again_since_are_out_of_date(self, run):
        complete(run, 1, 2, checkpoints=(2,))
        write(run.iteration(3).rollouts(0), time=1)
        policy = asked(made(by_segment=False)).generate(wildcards(3, shard="0000"))["policy"]
        assert policy == ["runs/a/iterations/000002/train", "~runs/a/iterations/000002/policy/manifest.json"]

    def test_segments_follow_each_other(self, run):
        ask = asked(made(num_iterations=4, segment_length=2))
        assert ask.iterate(wildcards(2))["before"] == ["runs/a/iterations/000000/start.json"]
        assert ask.iterate(wildcards(4))["before"] == ["runs/a/segments/000002.json"]
        complete(run, 1, checkpoints=(1,))
        ask = asked(made(num_iterations=4, segment_length=2))
        assert ask.iterate(wildcards(2))["before"] == ["~runs/a/iterations/000000/start.json"]

    def test_a_plan_ends_with_what_it_makes_last(self, run):
        assert inputs.finished(made()) == ["runs/a/segments/000003.json"]
        assert inputs.finished(made(by_segment=False)) == ["runs/a/iterations/000003/train/metrics.json"]
        assert inputs.finished(made(num_iterations=0)) == ["runs/a/iterations/000000/start.json"]
        complete(run, 1, 2, 3, checkpoints=(3,))
        for by_segment in (True, False):
            assert inputs.finished(made(by_segment)) == ["runs/a/iterations/000003/train"]

    def test_what_is_not_made_by_stage_is_refused_with_what_to_ask_for(self, run):
        complete(run, 1, checkpoints=(1,))
        with pytest.raises(EarlError, match=r"part of a segment; ask for runs/a/segments/000003.json, or set granul"):
            asked(made()).train(wildcards(2))
        with pytest.raises(EarlError, match="there is no iteration 4; raise num_iterations"):
            asked(made(by_segment=False)).train(wildcards(4))
        with pytest.raises(EarlError, match="iteration 2 has no checkpoint to restore: complete are iterations 1 to 1"):
            asked(made()).restore(wildcards(2))
        with pytest.raises(EarlError, match="was made in other shards; set rollout_shards=1"):
            asked(made(rollout_shards=2)).train(wildcards(1))
        assert asked(made()).restore(wildcards(1)) == []
        for plan, complaint in (
            (made(num_iterations=9, segment_length=4), "the next ones end with 4, 8, 9; ask for one of these"),
            (made(by_segment=False), "none is planned; set granularity=segment, or raise num_iterations"),
        ):
            with pytest.raises(EarlError, match=f"runs/a: no segment ends with iteration 99; {complaint}"):
                asked(plan).iterate(wildcards(99))
        with pytest.raises(EarlError, match="there is no evaluation nope; there are: held_out"):
            asked(made(**EVERY_SECOND)).evaluate(wildcards(1, evaluation="nope"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"device": "cpu"}, {"generate": 0, "score": 0, "train": 0, "iterate": 0, "tokenise": 0}),
        ({}, {"generate": 1, "score": 0, "train": 1, "iterate": 1, "tokenise": 1, "sft": 1}),
        ({"train_processes": 4}, {"train": 4, "restore": 4, "sft": 4, "iterate": 4, "generate": 1}),
        ({"train_processes": 2, "segment_processes": 8, "judge": "vllm"}, {"iterate": 12, "score": 4, "train": 2}),
        ({"engine": "vllm", "vllm_tensor_parallel_size": 2}, {"generate": 2, "train": 1}),
        ({"judge": "vllm", "judge_tensor_parallel_size": 4}, {"score": 4, "generate": 1}),
    ],
)
def test_gpus_of_jobs(fields, expected):
    config = Config(**EXPERIMENT | fields)
    assert {rule: resources.gpus(config, rule) for rule in expected} == expected


def test_threads_are_those_of_all_ranks():
    config = Config(**EXPERIMENT | {"cpu_threads": 2, "train_processes": 3, "segment_processes": 4})
    expected = {"generate": 2, "train": 6, "sft": 6, "iterate": 8}
    assert {rule: resources.threads(config, rule) for rule in expected} == expected
