"""The workflow as a user meets it: a real Snakemake over the real rules, with stages that only write digests."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from earl.config.load import read
from earl.execution import processes
from earl.files.layout import Run
from earl.run import state
from tests.support.workplace import ROOT, Workplace, job_counts, wait_until

GRANULARITIES = ("segment", "stage")
HELD_OUT = {"evaluations": {"held_out": {"prompts": 4, "every_n_iterations": 2}}}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run by segment and one by stage, both of three iterations that nothing came in the way of, with evaluations."""
    place = Workplace(tmp_path_factory.mktemp("finished"))
    for name in GRANULARITIES:
        place.run(place.experiment(name, **HELD_OUT), granularity=name)
    return place


@pytest.fixture
def done(finished: Workplace, tmp_path: Path) -> Workplace:
    """A copy of `finished` to work on."""
    shutil.copytree(finished.path, tmp_path, symlinks=True, dirs_exist_ok=True)
    place = object.__new__(Workplace)
    place.path = tmp_path
    return place


def contents(run: Run) -> dict[str, bytes]:
    """Return the files that a run has whatever it was made by: all but checkpoints, logs, and what says where it is."""
    kept = ("iterations/*/rollouts/*", "iterations/*/scores/*", "iterations/*/train/*", "evaluations/*/*")
    files = [path for pattern in kept for path in sorted(run.path.glob(pattern))]
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in files}


class TestPlan:
    def test_a_dry_run_plans_every_job_and_writes_nothing(self, place):
        experiment = place.experiment("a", rollout_shards=2, segment_length=2, **HELD_OUT)
        ends = {"start": 1, "verify": 1, "report": 1, "all": 1}
        assert job_counts(place.run(experiment, "-n")) == {"iterate": 2, **ends, "total": 6}
        # Evaluated: the starting policy, iteration 2, and 3 as the last one.
        stages = {"generate": 6, "score": 6, "train": 3, "evaluate_generate": 3, "evaluate_score": 3, "evaluate": 3}
        assert job_counts(place.run(experiment, "-n", granularity="stage")) == {**stages, **ends, "total": 28}
        assert not (place.path / "runs").exists()

    def test_an_experiment_of_the_paper_goes_from_raw_data_to_its_table(self, place, monkeypatch):
        """Its files are there, and nothing else: a stage whose input no other makes would stop the dry run."""
        variables = {"DATA_DIR": place.path, "BASE_EXP_DIR": "runs", "RUN_NAME": "a"}
        for name, value in (variables | {"REWARD_FUNCTION_API_BASE": "http://judge:4877"}).items():
            monkeypatch.setenv(f"APP__{name}", str(value))
        training = ("omniedit", "magic_brush", "aurora_ag", "aurora_kubric", "ss2", "vismin", "human-edit")
        wanted = ("omniedit", "vismin")
        for file in (f"raw/{name}.parquet" for name in (*training, "validation")):
            (place.path / file).parent.mkdir(exist_ok=True)
            shutil.copy(place.path / "train.parquet", place.path / file)
        for name in wanted:
            (place.path / "benchmarks" / name).mkdir(parents=True)
            for file in ("counting", "relation") if name == "vismin" else ("0",):
                shutil.copy(place.path / "train.parquet", place.path / "benchmarks" / name / f"{file}.parquet")
        parts = (f"(import '{ROOT}/config/{part}')" for part in ("sft_sc2stage__rl_sc.jsonnet", "data/raw.libsonnet"))
        (place.path / "x.jsonnet").write_text(" + ".join(parts))
        settings = f"num_iterations=2,wandb_mode=disabled,benchmarks={json.dumps(wanted)}"
        settings += f",benchmarks_dir={place.path}/benchmarks"
        counts = job_counts(place.run("x.jsonnet", "-n", set=settings, granularity="stage"))
        # Seven to train on, those for validation, OmniEdit, and two of VisMin.
        expected = {"tokenise": 11, "sft": 2, "train": 2, "evaluate": 6, "verify": 1, "report": 1}
        assert {name: counts[name] for name in expected} == expected

    def test_what_is_shared_is_made_once_for_all_segments_and_runs(self, place):
        raw = {name: {"source": "shapes", "count": 16, "seed": i} for i, name in enumerate(("pairs", "one", "two"))}
        own = {"own": {"prompts": 4, "paths_file": ["stage:tokenise/two"]}}
        fields = {
            "raw_datasets": raw,
            "train_paths_file": ["stage:tokenise/pairs"],
            "val_paths_file": ["stage:tokenise/one"],
            "num_iterations": 2,
            "segment_length": 1,
        }
        both = ",".join(place.experiment(name, **fields, kl_coeff=i) for i, name in enumerate("ab"))
        evaluations = own | {"usual": {"prompts": 4}}
        counts = job_counts(place.run(both, "-n", set=f"evaluations={json.dumps(evaluations)}"))
        assert (counts["iterate"], counts["raw"], counts["tokenise"]) == (4, 3, 3)
        # Data that nobody draws from are not made.
        assert job_counts(place.run(both, "-n", set=f"evaluations={json.dumps(own)}"))["tokenise"] == 2

    @pytest.mark.slow
    def test_a_long_run_by_stage_is_planned_at_once(self, place):
        """A chain of jobs as deep as the run is long: Python's own limit of recursion would end it."""
        counts = job_counts(place.run(place.experiment("a", num_iterations=400), "-n", granularity="stage"))
        assert counts["train"] == 400

    def test_experiments_of_one_run_folder_are_refused(self, place):
        both = [place.experiment("a"), place.experiment("b", run_name="a")]
        assert "two of the experiments have this run folder" in place.run(",".join(both), "-n", fails=True)


class TestFiles:
    @pytest.mark.slow
    def test_both_granularities_write_the_same_files(self, finished):
        segment, stage = (finished.folder(name) for name in GRANULARITIES)
        assert contents(segment).keys() == contents(stage).keys()
        # The stub's files hold no name of a run, so they are equal byte for byte.
        assert contents(segment) == contents(stage)
        for name in GRANULARITIES:
            run = finished.folder(name)
            assert (run.iteration(0).policy.readlink(), run.report.is_file()) == (finished.path / "model", True)
            assert json.loads(run.verification.read_text())["problems"] == []
        assert finished.policy("segment", 3) == finished.policy("stage", 3)
        assert sorted(path.name for path in (segment.path / "segments").iterdir()) == ["000003.json"]

    @pytest.mark.slow
    @pytest.mark.parametrize(("before", "after"), [("segment", "segment"), ("stage", "segment")])
    def test_a_finished_run_goes_on_when_it_is_to_be_longer(self, done, before, after):
        experiment = f"{before}.jsonnet"
        assert "Nothing to be done" in done.run(experiment, granularity=after)
        done.run(experiment, set="num_iterations=4", granularity=after)
        assert {line.split("--iteration ")[1][:6] for line in done.stages() if line.startswith("train")} == {"000004"}
        assert json.loads(done.folder(before).verification.read_text())["problems"] == []
        assert read(done.folder(before).config).num_iterations == 4

    @pytest.mark.slow
    def test_the_granularity_may_change_half_way(self, place, finished):
        experiment = place.experiment("a", **HELD_OUT, segment_length=2)
        started = place.start(experiment, env={"STUB_FAIL": "generate --config runs/a/config.json --iteration 000002"})
        started.communicate(timeout=60)
        assert state.newest_complete(place.folder("a")) == 1
        place.run(experiment, granularity="stage", set="num_iterations=2")
        # The segment had not written a checkpoint yet.
        assert place.kinds()[:2] == ["restore", "generate"]
        place.run(experiment)
        assert place.policy("a", 3) == finished.policy("segment", 3)
        assert contents(place.folder("a")) == contents(finished.folder("segment"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("granularity", "gone"),
        [
            ("segment", "rollouts/0000.parquet"),
            ("segment", "policy/manifest.json"),
            ("stage", "train/episodes.parquet"),
            ("stage", "policy/manifest.json"),
        ],
    )
    def test_an_old_file_is_made_again_when_it_is_asked_for(self, done, granularity, gone):
        run = done.folder(granularity)
        before = contents(run)
        (run.iteration(2).path / gone).unlink(missing_ok=True)
        assert not (run.iteration(1).policy / "manifest.json").exists()
        done.run(f"{granularity}.jsonnet", f"runs/{granularity}/iterations/000002/{gone}", granularity=granularity)
        stage = {"rollouts": ["restore", "generate"], "train": ["restore", "train"], "policy": ["restore"]}
        if (granularity, gone[:6]) == ("stage", "policy"):
            assert done.kinds() == ["restore"]
        else:
            assert done.kinds() == stage[gone.split("/")[0]]
        assert contents(run) == before
        output = done.run(f"{granularity}.jsonnet", granularity=granularity)
        assert "Nothing to be done" in output

    @pytest.mark.slow
    def test_one_shard_again_and_nothing_else(self, done):
        target = "runs/stage/iterations/000002/scores/0000.parquet"
        before = contents(done.folder("stage"))
        done.run("stage.jsonnet", target, "--force")
        assert done.kinds() == ["score"]
        assert contents(done.folder("stage")) == before
        done.run("stage.jsonnet", "runs/stage/iterations/000002/train/metrics.json", "--force")
        assert done.kinds() == ["restore", "train"]
        assert contents(done.folder("stage")) == before

    def test_an_old_evaluation_is_made_when_it_is_asked_for(self, done):
        summary = "runs/segment/evaluations/more/000001.json"
        more = json.dumps(HELD_OUT["evaluations"] | {"more": {"prompts": 4}})
        done.run("segment.jsonnet", summary, set=f"evaluations={more}")
        assert done.kinds() == ["restore", "generate", "score", "evaluate"]
        assert (done.path / summary).is_file()

    def test_a_file_that_is_not_made_by_stage_is_refused_with_what_to_ask_for(self, done):
        target = "runs/segment/iterations/000004/train/metrics.json"
        output = done.run("segment.jsonnet", target, set="num_iterations=4", fails=True)
        assert "iteration 4 is part of a segment; ask for runs/segment/segments/000004.json" in output

    @pytest.mark.slow
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_what_was_removed_from_the_end_is_made_again(self, done, granularity):
        run, experiment = done.folder(granularity), f"{granularity}.jsonnet"
        before = contents(run)
        run.iteration(3).metrics.unlink()
        done.run(experiment, granularity=granularity)
        assert done.kinds().count("train") == 1
        assert not [line for line in done.stages() if "--shard" in line], "its rollouts are still good"
        assert contents(run) == before
        assert state.rewind(run, 2) == [2, 3]
        done.run(experiment, granularity=granularity)
        assert done.kinds().count("train") == 2
        assert contents(run) == before

    @pytest.mark.slow
    @pytest.mark.parametrize("gone", ["all", "its checkpoint", "touched"], ids=lambda text: text.replace(" ", "-"))
    def test_a_segment_that_is_planned_runs_though_it_has_a_record(self, done, gone):
        run = done.folder("segment")
        before = contents(run)
        if gone == "touched":
            state.rewind(run, 2)
            done.run("segment.jsonnet", "--touch")
        elif gone == "its checkpoint":
            (run.iteration(3).policy / "manifest.json").unlink()
            run.evaluation("held_out", 3).summary.unlink()
        else:
            for index in (1, 2, 3):
                shutil.rmtree(run.iteration(index).path)
        assert job_counts(done.run("segment.jsonnet", "-n"))["iterate"] == 1
        done.run("segment.jsonnet")
        assert done.kinds().count("iterate") == 1
        assert contents(run) == before
        assert "Nothing to be done" in done.run("segment.jsonnet")

    def test_a_segment_that_has_a_record_does_not_run_for_a_file_that_needs_none(self, done):
        shutil.rmtree(done.folder("segment").iteration(3).path)
        done.run("segment.jsonnet", "runs/segment/iterations/000001/policy/manifest.json")
        assert done.kinds() == ["restore"]

    @pytest.mark.slow
    def test_a_run_without_iterations_evaluates_a_policy_on_data_sets_of_their_own(self, place):
        raw = {"source": "parquet", "path": "held_out.parquet"}
        own = {"prompts": None, "paths_file": ["stage:tokenise/other"], "samples_per_prompt": 2}
        fields = {"num_iterations": 0, "train_paths_file": [], "raw_datasets": {"other": raw}}
        experiment = place.experiment("a", **fields, evaluations={"other": own, "usual": {"prompts": 4}})
        place.run(experiment)
        expected = ["evaluate"] * 2 + ["generate"] * 2 + ["score"] * 2 + ["start", "tokenise"]
        assert sorted(place.kinds()) == expected
        assert place.folder("a").evaluation("other", 0).summary.is_file()
        assert "Nothing to be done" in place.run(experiment)


class TestInterruptions:
    @pytest.mark.slow
    def test_killed_without_warning_and_started_again(self, place, finished):
        """By stage; a segment, and stages with models: see test_kills.py."""
        experiment = place.experiment("a", **HELD_OUT)
        for moment in ("score", "train --config runs/a/config.json --iteration 000002"):
            started = place.start(experiment, env={"STUB_DELAY": "0.3"}, granularity="stage")
            wait_until(lambda moment=moment: any(line.startswith(moment) for line in place.commands()))
            started.send_signal(signal.SIGKILL)
            started.communicate(timeout=60)  # ends when the last process that writes to the pipe has ended
        place.run(experiment, granularity="stage")
        assert contents(place.folder("a")) == contents(finished.folder("stage"))
        # Whatever was complete when it was killed was not done again.
        assert not [line for line in place.stages() if line.startswith(("generate", "score")) and "000001" in line]

    @pytest.mark.slow
    def test_interrupted_and_started_again(self, place, finished):
        experiment = place.experiment("a", **HELD_OUT)
        started = place.start(experiment, env={"STUB_DELAY": "0.3"})
        wait_until(lambda: any(line.startswith("train") for line in place.commands()))
        os.killpg(started.pid, signal.SIGINT)
        started.communicate(timeout=60)
        assert started.returncode != 0
        place.run(experiment)
        assert contents(place.folder("a")) == contents(finished.folder("segment"))

    @pytest.mark.slow
    def test_a_stage_that_fails_keeps_the_iterations_before_it(self, place):
        experiment = place.experiment("a")
        failing = {"STUB_FAIL": "train --config runs/a/config.json --iteration 000002"}
        started = place.start(experiment, env=failing, granularity="stage")
        output, _ = started.communicate(timeout=60)
        assert started.returncode != 0
        assert "this stage was told to fail" in output
        assert state.newest_complete(place.folder("a")) == 1
        place.run(experiment, granularity="stage")
        assert place.kinds() == ["train", "generate", "score", "train"]

    @pytest.mark.slow
    def test_a_second_workflow_on_the_same_run_is_refused(self, place):
        experiment = place.experiment("a")
        (place.path / "runs" / "a").mkdir(parents=True)
        with processes.lock(state.lock_file(place.folder("a"))):
            output = place.run(experiment, fails=True)
        assert f"process {os.getpid()} is writing here" in output
        assert place.stages() == []

    @pytest.mark.slow
    def test_a_workflow_plans_again_where_the_run_has_moved_on_meanwhile(self, done):
        """Two start at once: the one that had to wait does not repeat what the other one did."""
        run = done.folder("segment")
        metrics = run.iteration(3).metrics.rename(done.path / "metrics.json")
        with processes.lock(state.lock_file(run)):
            second = done.start("segment.jsonnet")
            said = ""
            while "Job stats:" not in said:
                said = second.stdout.readline()
                assert said, "the second workflow ended"
            metrics.rename(run.iteration(3).metrics)
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 0, output
        assert "iterate" not in done.kinds()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("granularity", "left", "what"),
        [("stage", True, "segment 000003"), ("segment", True, "segment 000002"), ("segment", False, "stage")],
    )
    def test_a_job_that_the_plan_does_not_have_is_waited_for(self, done, granularity, left, what):
        """An earlier workflow was killed, and its job on a cluster goes on."""
        run = done.folder("segment")
        metrics = run.iteration(3).metrics.rename(done.path / "metrics.json")
        (done.path / "log.txt").unlink()
        with state.writing(run, alone=left, what=what):
            started = done.start("segment.jsonnet", granularity=granularity)
            said = ""
            while "waiting for process" not in said:
                said = started.stdout.readline()
                assert said, "the workflow ended"
            metrics.rename(run.iteration(3).metrics)
        assert f"runs/segment: waiting for process {os.getpid()} ({what} on " in said
        output, _ = started.communicate(timeout=60)
        assert started.returncode == 0, output
        assert not {"iterate", "train"} & set(done.kinds())

    def test_a_job_that_the_plan_has_is_not_waited_for(self, done):
        run = done.folder("segment")
        state.rewind(run, 3)
        with state.writing(run, alone=True, what=state.segment_name(3)):
            output = done.run("segment.jsonnet", "--until", "iterate")
        assert "waiting" not in output
        assert done.kinds()[:2] == ["iterate", "train"]


class TestShared:
    ONCE = dict.fromkeys(("shapes raw", "shapes policy", "tokenise", "sft"), 1)
    EACH = dict.fromkeys(("start", "iterate", "generate", "score", "train"), 2)

    @staticmethod
    def counts(place: Workplace) -> dict[str, int]:
        called = [line.split(" --")[0] for line in place.stages()]
        return {kind: called.count(kind) for kind in called}

    @pytest.mark.slow
    def test_experiments_in_one_call_share_what_they_have_in_common(self, place):
        both = [place.shapes_experiment("a"), place.shapes_experiment("b", kl_coeff=0.5)]
        place.run(",".join(both))
        assert self.counts(place) == self.ONCE | self.EACH
        policies = [place.folder(name).iteration(0).policy.resolve() for name in "ab"]
        assert policies[0] == policies[1]
        assert not policies[0].is_symlink()

    @pytest.mark.slow
    def test_a_second_workflow_waits_for_what_the_first_makes_and_uses_it(self, place):
        both = [place.shapes_experiment("a"), place.shapes_experiment("b")]
        hold = place.path / "hold"
        hold.write_text("tokenise")
        first = place.start(both[0], env={"STUB_HOLD": str(hold)})
        wait_until(lambda: any(line.startswith("tokenise") for line in place.commands()))
        second = place.start(both[1], env={"STUB_HOLD": str(hold)})
        said = ""
        while "waiting for process" not in said:
            said = second.stdout.readline()
            assert said, "the second workflow ended"
        assert f"waiting for process {first.pid}, which makes runs/shared/" in said
        hold.write_text("sft")  # one is there, the next is still being made
        wait_until(lambda: any(line.startswith("sft") for line in place.commands()))
        hold.unlink()
        for workflow in (first, second):
            output, _ = workflow.communicate(timeout=120)
            assert workflow.returncode == 0, output
        assert self.counts(place) == self.ONCE | self.EACH

    @pytest.mark.slow
    def test_a_workflow_waits_for_nothing_that_it_does_not_make(self, place):
        both = [place.shapes_experiment("a"), place.shapes_experiment("b")]
        hold = place.path / "hold"
        hold.write_text("sft")
        first = place.start(both[0], env={"STUB_HOLD": str(hold)})
        wait_until(lambda: any(line.startswith("sft") for line in place.commands()))
        second = place.start(both[1], "--until", "tokenise")
        output, _ = second.communicate(timeout=120)
        hold.unlink()
        assert first.wait(timeout=120) == 0
        assert second.returncode == 0, output
        assert "waiting for process" not in output

    @pytest.mark.slow
    def test_a_lock_that_a_killed_workflow_left_is_no_obstacle(self, place):
        experiment = place.shapes_experiment("a")
        place.run(experiment)
        (tokenised,) = (place.path / "runs" / "shared" / "tokenised").glob("pairs-*")
        (tokenised / "manifest.json").unlink()
        assert tokenised.with_name(f".{tokenised.name}.lock").read_text().strip().isdigit()
        assert "waiting for process" not in place.run(experiment)

    def test_one_folder_spelled_in_several_ways_is_one_folder(self, place):
        (place.path / "runs").mkdir()
        (place.path / "link").symlink_to("runs")
        spellings = {"a": "runs", "b": "./runs/", "c": str(place.path / "runs"), "d": "link", "e": "link/../runs"}
        experiments = [place.shapes_experiment(name, base_exp_dir=path) for name, path in spellings.items()]
        counts = job_counts(place.run(",".join(experiments), "-n"))
        assert {kind: counts[kind] for kind in ("tokenise", "sft", "iterate")} == {
            "tokenise": 1,
            "sft": 1,
            "iterate": 5,
        }
        again = place.shapes_experiment("f", run_name="a", base_exp_dir=str(place.path / "runs"))
        output = place.run(f"{experiments[0]},{again}", "-n", fails=True)
        assert "two of the experiments have this run folder" in output

    @pytest.mark.slow
    def test_a_fine_tuning_that_goes_on_from_another_shares_it(self, place):
        common = {"train_paths_file": ["train.parquet"], "steps": 1}
        first = {"s": common | {"base_model": "model"}}
        then = first | {"sc": common | {"base_model": "stage:sft/s", "steps": 2}}
        both = [
            place.experiment("a", model_path="stage:sft/s", sft=first, num_iterations=1),
            place.experiment("b", model_path="stage:sft/sc", sft=then, num_iterations=1),
        ]
        place.run(",".join(both))
        names = [line.split("--name ")[1].split()[0] for line in place.stages() if line.startswith("sft")]
        assert names == ["s", "sc"]
        first, then = (place.folder(name).iteration(0).policy.resolve() for name in "ab")
        assert (first.name[:2], then.name[:3]) == ("s-", "sc-")


class TestConfiguration:
    @pytest.mark.slow
    def test_a_changed_configuration_stops_until_it_is_accepted(self, done):
        changed = {"set": "num_iterations=4,kl_coeff=0.5"}
        for more in ({}, {"accept_changes": "false"}):
            output = done.run("segment.jsonnet", fails=True, **changed, **more)
            assert re.search(r"kl_coeff +0.0003 +0.5", output)
            assert done.stages() == []
        # What is said is said in the workflow's own words.
        assert "set=run_name=..." in output
        assert "go on under this name with accept_changes=true" in output
        done.run("segment.jsonnet", **changed, accept_changes=True)
        found = json.loads(done.folder("segment").verification.read_text())
        assert found["problems"] == []
        assert [each["note"][:43] for each in found["notes"]] == ["iterations 1 to 3 were made by configuratio"]

    @pytest.mark.slow
    def test_how_to_evaluate_may_change_until_there_are_results(self, done):
        results = done.folder("segment").evaluation("held_out", 0).summary.parent
        for more in ({}, {"accept_changes": True}):
            output = done.run("segment.jsonnet", fails=True, set="evaluations.held_out.prompts=5", **more)
            assert re.search(r"evaluations\.held_out\.prompts +4 +5", output)
            assert "name of its own" in output
            assert done.stages() == []
        # Once the old results are gone, it is made of the policies that are there: the first and the last.
        shutil.rmtree(results)
        done.run("segment.jsonnet", set="evaluations.held_out.prompts=5")
        assert sorted(done.kinds()) == ["evaluate"] * 2 + ["generate"] * 2 + ["score"] * 2
        assert read(done.folder("segment").config).evaluations["held_out"].prompts == 5

    @pytest.mark.slow
    def test_what_is_sure_to_fail_is_refused_before_a_job_starts(self, place):
        raw = {"pairs": {"source": "parquet", "path": "no/raw.parquet"}}
        held_out = {"e": {"prompts": 17}}
        data = {"raw_datasets": raw, "train_paths_file": ["stage:tokenise/pairs"]}
        output = place.run(place.experiment("a", **data, evaluations=held_out), fails=True)
        assert "raw_datasets.pairs.path (in a.jsonnet) is 'no/raw.parquet', but there is no Parquet file" in output
        output = place.run(place.experiment("b", evaluations=held_out, val_paths_file=["no.json"]), fails=True)
        assert f"field val_paths_file (in b.jsonnet) names what is not there: {place.path}/no.json" in output
        output = place.run(place.experiment("c", evaluations=held_out), fails=True, set="evaluations.e.prompts=18")
        assert "field evaluations.e.prompts (in set=) asks for 18 prompts, but val_paths_file gives 16" in output
        assert "MissingInputException" not in output
        assert place.stages() == []

    def test_what_is_done_asks_for_nothing_any_more(self, done):
        (done.path / "train.parquet").unlink()
        assert "Nothing to be done" in done.run("segment.jsonnet")
        assert "names what is not there" in done.run("segment.jsonnet", set="num_iterations=4", fails=True)


class TestSending:
    @pytest.mark.slow
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_a_send_waits_for_the_run_and_not_the_run_for_it(self, place, granularity, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        sending = {"wandb_mode": "online", "wandb_every_n_iterations": 1, "push_to_hub": True}
        sending |= {"push_to_hub_every_n_iterations": 2, "keep_checkpoints_every_n_iterations": 2}
        experiment = place.experiment("a", segment_length=1, **sending)
        last = "track --run runs/a --out runs/a/tracking/wandb-000003.json"
        started = place.start(experiment, env={"STUB_FAIL": last}, granularity=granularity)
        output, _ = started.communicate(timeout=120)
        assert started.returncode != 0
        assert "this stage was told to fail" in output
        commands = place.commands()
        assert sorted(line for line in commands if "--best-effort" in line) == [
            "push --run runs/a --best-effort --out runs/a/tracking/hub-000002.json",
            "track --run runs/a --best-effort --out runs/a/tracking/wandb-000001.json",
            "track --run runs/a --best-effort --out runs/a/tracking/wandb-000002.json",
        ]
        assert place.folder("a").report.is_file(), "what fails to be sent keeps nothing from being made"
        assert commands.index(last) > next(i for i, line in enumerate(commands) if line.startswith("report"))
        place.run(experiment, granularity=granularity)
        assert last in place.stages()
        assert set(place.kinds()) <= {"track", "push"}
        assert "Nothing to be done" in place.run(experiment, granularity=granularity)
