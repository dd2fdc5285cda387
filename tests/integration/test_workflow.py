"""The workflow as a user meets it: a real Snakemake over the real rules, with stages that only write digests."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl.config.load import read
from earl.execution import processes
from earl.run import plan, state
from tests.support.workplace import ROOT, SNAKEMAKE, Workplace, job_counts


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the policy after three iterations that nothing came in the way of, planned at once."""
    place = Workplace(tmp_path_factory.mktemp("undisturbed"))
    place.run(place.experiment("a"))
    return place.policy("a", 3)


def test_dry_run_plans_every_stage_and_writes_nothing(place):
    experiment = place.experiment(
        "a", rollout_shards=2, evaluations={"held_out": {"prompts": 4, "every_n_iterations": 2}}
    )
    counts = job_counts(place.run(experiment, "-n"))
    # Evaluated: the starting policy, iteration 2, and 3 as the last one.
    assert counts == {
        "start": 1, "generate": 6, "score": 6, "train": 3,
        "evaluate_generate": 3, "evaluate_score": 3, "evaluate": 3, "verify": 1, "report": 1, "all": 1, "total": 28,
    }  # fmt: skip
    assert not (place.path / "runs").exists()


def test_an_experiment_of_the_paper_goes_from_raw_data_to_its_table_in_one_plan(place, monkeypatch):
    """Its files are there, and nothing else: a stage whose input no other makes would stop the dry run."""
    variables = {"DATA_DIR": place.path, "BASE_EXP_DIR": "runs"}
    for name, value in (variables | {"RUN_NAME": "a", "REWARD_FUNCTION_API_BASE": "http://judge:4877"}).items():
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
    place.profile = "slurm"
    output = place.run("x.jsonnet", "-n", "-p", set=settings)
    counts = job_counts(output)
    # Seven to train on, those for validation, OmniEdit, and two of VisMin.
    expected = {"tokenise": 11, "sft": 2, "train": 2, "evaluate": 6, "verify": 1, "report": 1}
    assert {name: counts[name] for name in expected} == expected
    for stage in ("tokenise", "sft", "generate", "train", "evaluate_generate"):
        commands = re.findall(rf" launch --launcher slurm --name {stage}-.*", output)
        assert len(commands) == counts[stage]
        assert all("--resource gpu=1 " in command for command in commands), stage


def test_run_then_nothing_to_do_then_more_iterations(place):
    experiment = place.experiment("a", evaluations={"held_out": {"prompts": 4, "every_n_iterations": 2}})
    place.run(experiment, set="num_iterations=2")
    folder = place.folder("a")
    assert (folder.iteration(0).policy.readlink(), folder.report.is_file()) == (place.path / "model", True)
    assert json.loads(folder.verification.read_text())["problems"] == []

    assert "Nothing to be done" in place.run(experiment, set="num_iterations=2")

    place.run(experiment)
    assert [line.split()[0] for line in place.stages()] == [
        "generate", "score", "train", "generate", "score", "evaluate"
    ]  # fmt: skip
    assert not (folder.iteration(1).policy).exists(), "two complete iterations are enough to go on from"
    assert read(folder.config).num_iterations == 3


def test_a_run_without_iterations_evaluates_a_policy_on_data_sets_of_their_own(place):
    raw = {"source": "parquet", "path": "held_out.parquet"}
    own = {"prompts": None, "paths_file": ["stage:tokenise/other"], "samples_per_prompt": 2}
    fields = {"num_iterations": 0, "train_paths_file": [], "raw_datasets": {"other": raw}}
    experiment = place.experiment("a", **fields, evaluations={"other": own, "usual": {"prompts": 4}})
    place.run(experiment)
    words = [line.split() for line in place.stages()]
    assert sorted(line[0] for line in words) == ["evaluate"] * 2 + ["generate"] * 2 + ["score"] * 2 + [
        "start",
        "tokenise",
    ]
    assert place.folder("a").evaluation("other", 0).summary.is_file()
    assert "Nothing to be done" in place.run(experiment)


def test_windows_follow_each_other_and_end_in_the_same_policy(place, undisturbed):
    experiment = place.experiment("a", window_length=1)
    assert job_counts(place.run(experiment, "-n"))["window"] == 3
    place.run(experiment)
    assert place.policy("a", 3) == undisturbed
    assert place.folder("a").report.is_file()


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_what_windows_have_in_common_is_made_before_them(place, profile):
    place.profile = profile
    raw = {name: {"source": "shapes", "count": 16, "seed": seed} for seed, name in enumerate(("pairs", "one", "two"))}
    own = {"own": {"prompts": 4, "paths_file": ["stage:tokenise/two"]}}
    fields = {
        "raw_datasets": raw,
        "train_paths_file": ["stage:tokenise/pairs"],
        "val_paths_file": ["stage:tokenise/one"],
        "evaluations": own | {"usual": {"prompts": 4}},
        "num_iterations": 2,
        "window_length": 1,
    }
    both = f"{place.experiment('a', **fields)},{place.experiment('b', **fields, kl_coeff=0.5)}"
    counts = job_counts(place.run(both, "-n", granularity="segment"))
    assert (counts["window"], counts["raw"], counts["tokenise"]) == (4, 3, 3)
    # Data that nobody draws from are not made.
    counts = job_counts(place.run(both, "-n", granularity="segment", set=f"evaluations={json.dumps(own)}"))
    assert counts["tokenise"] == 2


@pytest.mark.parametrize(("profile", "cores"), [("local", 8), ("slurm", 4)])
def test_windows_of_two_runs_share_cores_that_only_bound_jobs_elsewhere(place, profile, cores):
    place.profile = profile
    both = ",".join(place.experiment(name, window_length=2) for name in "ab")
    output = place.run(both, "-n", "-p", "--cores", "8")
    assert re.findall(r"-m snakemake .*--cores (\d+) ", output) == [str(cores)] * 4
    assert output.count(f"threads: {cores}\n") == 4


@pytest.mark.parametrize("window_length", [50, 2])
def test_killed_without_warning_and_started_again(place, undisturbed, window_length):
    experiment = place.experiment("a", window_length=window_length)
    for moment in ("score", "train --config runs/a/config.json --iteration 000002"):
        started = place.start(experiment, env={"STUB_DELAY": "0.3"})
        wait_until(lambda moment=moment: any(line.startswith(moment) for line in place.commands()))
        started.send_signal(signal.SIGKILL)
        started.communicate(timeout=60)  # ends when the last process that writes to the pipe has ended
    place.run(experiment)
    assert place.policy("a", 3) == undisturbed
    # Whatever was complete when it was killed was not done again.
    assert not [line for line in place.stages() if "--iteration 000001" in line]


def test_interrupted_and_started_again(place, undisturbed):
    experiment = place.experiment("a", window_length=1)
    started = place.start(experiment, env={"STUB_DELAY": "0.3"})
    wait_until(lambda: any(line.startswith("train") for line in place.commands()))
    os.killpg(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode != 0
    place.run(experiment)
    assert place.policy("a", 3) == undisturbed


def test_failed_stage_stops_and_keeps_the_iterations_before_it(place, undisturbed):
    experiment = place.experiment("a")
    started = place.start(experiment, env={"STUB_FAIL": "train --config runs/a/config.json --iteration 000002"})
    output, _ = started.communicate(timeout=60)
    assert started.returncode != 0
    assert "this stage was told to fail" in output
    assert state.newest_complete(place.folder("a")) == 1
    place.run(experiment)
    assert [line.split()[0] for line in place.stages()] == ["train", "generate", "score", "train"]
    assert place.policy("a", 3) == undisturbed


def test_second_workflow_on_the_same_run_is_refused(place):
    experiment = place.experiment("a")
    (place.path / "runs" / "a").mkdir(parents=True)
    with processes.lock(state.lock_file(place.folder("a"))):
        output = place.run(experiment, fails=True)
    assert f"process {os.getpid()} is writing here" in output
    assert place.stages() == []


def shapes_experiment(place: Workplace, name: str, **fields: object) -> str:
    sft = {"base_model": "stage:shapes-policy", "train_paths_file": ["stage:tokenise/pairs"], "steps": 1}
    return place.experiment(
        name,
        raw_datasets={"pairs": {"source": "shapes", "count": 16, "seed": 1}},
        train_paths_file=["stage:tokenise/pairs"],
        model_path="stage:sft/s",
        sft={"s": sft},
        num_iterations=1,
        **fields,
    )


def test_experiments_in_one_call_share_what_they_have_in_common(place):
    both = [shapes_experiment(place, "a"), shapes_experiment(place, "b", kl_coeff=0.5)]
    place.run(",".join(both))
    kinds = [line.split(" --")[0] for line in place.stages()]
    once, each = ("shapes raw", "shapes policy", "tokenise", "sft"), ("start", "generate", "score", "train")
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(once, 1) | dict.fromkeys(each, 2)
    policies = [place.folder(name).iteration(0).policy.resolve() for name in "ab"]
    assert policies[0] == policies[1]
    assert not policies[0].is_symlink()


def test_a_second_workflow_waits_for_what_the_first_makes_and_uses_it(place):
    both = [shapes_experiment(place, "a"), shapes_experiment(place, "b")]
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
    kinds = [line.split(" --")[0] for line in place.stages()]
    once, each = ("shapes raw", "shapes policy", "tokenise", "sft"), ("start", "generate", "score", "train")
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(once, 1) | dict.fromkeys(each, 2)


def test_a_lock_that_a_killed_workflow_left_is_no_obstacle(place):
    experiment = shapes_experiment(place, "a")
    shared = place.path / "runs" / "shared"
    place.run(experiment)
    (tokenised,) = (shared / "tokenised").glob("pairs-*")
    (tokenised / "manifest.json").unlink()
    assert tokenised.with_name(f".{tokenised.name}.lock").read_text().strip().isdigit()
    assert "waiting for process" not in place.run(experiment)


def test_one_folder_spelled_in_several_ways_is_one_folder(place):
    (place.path / "runs").mkdir()
    (place.path / "link").symlink_to("runs")
    spellings = {"a": "runs", "b": "./runs/", "c": str(place.path / "runs"), "d": "link", "e": "link/../runs"}
    experiments = [shapes_experiment(place, name, base_exp_dir=path) for name, path in spellings.items()]
    place.run(",".join(experiments))
    kinds = [line.split(" --")[0] for line in place.stages()]
    assert {kind: kinds.count(kind) for kind in ("tokenise", "sft", "train")} == {"tokenise": 1, "sft": 1, "train": 5}
    again = shapes_experiment(place, "f", run_name="a", base_exp_dir=str(place.path / "runs"))
    assert "two of the experiments have this run folder" in place.run(f"{experiments[0]},{again}", "-n", fails=True)


def test_a_fine_tuning_that_goes_on_from_another_shares_it(place):
    common = {"train_paths_file": ["train.parquet"], "steps": 1}
    first = {"s": common | {"base_model": "model"}}
    then = first | {"sc": common | {"base_model": "stage:sft/s", "steps": 2}}
    both = [
        place.experiment("a", model_path="stage:sft/s", sft=first, num_iterations=1),
        place.experiment("b", model_path="stage:sft/sc", sft=then, num_iterations=1),
    ]
    place.run(",".join(both))
    assert [line.split()[3:5] for line in place.stages() if line.startswith("sft")] == [
        ["--name", "s"],
        ["--name", "sc"],
    ]
    first, then = (place.folder(name).iteration(0).policy.resolve() for name in "ab")
    assert (first.name[:2], then.name[:3]) == ("s-", "sc-")
    place.run(both[0])
    assert place.stages() == []


def test_experiments_of_one_run_folder_are_refused(place):
    both = [place.experiment("a"), place.experiment("b", run_name="a")]
    assert "two of the experiments have this run folder" in place.run(",".join(both), "-n", fails=True)


def test_changed_configuration_stops_until_it_is_accepted(place):
    experiment = place.experiment("a", num_iterations=1)
    place.run(experiment)
    output = place.run(experiment, fails=True, set="num_iterations=2,kl_coeff=0.5")
    assert re.search(r"kl_coeff +0.0003 +0.5", output)
    assert place.stages() == []
    place.run(experiment, set="num_iterations=2,kl_coeff=0.5", accept_changes=True)
    problems = json.loads(place.folder("a").verification.read_text())["problems"]
    assert [problem["problem"][:49] for problem in problems] == ["iterations 1 to 1 were made by another configurat"]


@pytest.mark.slow
def test_changes_are_accepted_only_where_the_setting_says_so(place):
    experiment = place.experiment("a", num_iterations=1)
    place.run(experiment)
    output = place.run(experiment, fails=True, set="kl_coeff=0.5", accept_changes="false")
    assert re.search(r"kl_coeff +0.0003 +0.5", output)
    # What is said is said in the workflow's own words.
    assert "set=run_name=..." in output
    assert "go on under this name with accept_changes=true" in output
    assert "--" not in output.split("was made with another configuration")[1].split("File ")[0]
    output = place.run(experiment, fails=True, set="kl_coeff=0.5", accept_changes="perhaps")
    assert "accept_changes=perhaps: is neither true nor false" in output


@pytest.mark.slow
def test_how_to_evaluate_may_change_until_there_are_results(place):
    experiment = place.experiment("a", num_iterations=1, evaluations={"e": {"prompts": 4}})
    place.run(experiment, set="evaluations.e.every_n_iterations=2")
    results = place.folder("a").evaluation("e", 0).summary.parent
    for more in ({}, {"accept_changes": True}):
        output = place.run(experiment, fails=True, set="evaluations.e.prompts=5", **more)
        assert re.search(r"evaluations\.e\.prompts +4 +5", output)
        assert "name of its own" in output
        assert place.stages() == []
    # Under another name, or once the old results are gone, it is made of the policies that are there.
    place.run(experiment, set='evaluations={"f":{"prompts":5}}')
    assert sorted(line.split()[0] for line in place.stages()) == ["evaluate"] * 2 + ["generate"] * 2 + ["score"] * 2
    shutil.rmtree(results)
    place.run(experiment, set="evaluations.e.prompts=5")
    assert results.is_dir()
    assert read(place.folder("a").config).evaluations["e"].prompts == 5


def test_a_setting_that_nothing_reads_is_refused(place):
    output = place.run(place.experiment("a"), temperature="1", fails=True)
    assert "--config temperature=...: is not a setting; to set the field, write set=temperature=..." in output
    output = place.run(place.experiment("a"), sett="temperature=1", fails=True)
    assert "--config sett=...: is not a setting; did you mean set?" in output


@pytest.mark.slow
def test_what_is_sure_to_fail_is_refused_before_a_job_starts(place):
    raw = {"pairs": {"source": "parquet", "path": "no/raw.parquet"}}
    held_out = {"e": {"prompts": 17}}
    data = {"raw_datasets": raw, "train_paths_file": ["stage:tokenise/pairs"]}
    output = place.run(place.experiment("a", **data, evaluations=held_out), fails=True)
    assert "field raw_datasets.pairs.path (in a.jsonnet) is 'no/raw.parquet', but there is no Parquet file" in output
    output = place.run(place.experiment("b", evaluations=held_out, val_paths_file=["no.json"]), fails=True)
    assert f"field val_paths_file (in b.jsonnet) names what is not there: {place.path}/no.json" in output
    output = place.run(place.experiment("c", evaluations=held_out), fails=True, set="evaluations.e.prompts=18")
    assert "field evaluations.e.prompts (in set=) asks for 18 prompts, but val_paths_file gives 16" in output
    assert "MissingInputException" not in output
    assert place.stages() == []
    # What is done asks for nothing any more.
    place.run(place.experiment("d", num_iterations=1))
    (place.path / "train.parquet").unlink()
    assert "Nothing to be done" in place.run(place.experiment("d", num_iterations=1))
    assert "names what is not there" in place.run(place.experiment("d", num_iterations=2), fails=True)


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_vllm_is_missed_only_where_stages_run_here(place, profile):
    hidden = place.path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules.update(vllm=None, wandb=None)\n")
    experiment = place.experiment("a", engine="vllm", wandb_mode="offline")
    command = [*SNAKEMAKE, "--snakefile", ROOT / "workflow" / "Snakefile", "--profile", ROOT / "profiles" / profile]
    command += ["-n", "--config", f"experiment={experiment}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{hidden}"}
    done = subprocess.run(list(map(str, command)), cwd=place.path, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if profile == "local":
        assert "field engine (in a.jsonnet) is `vllm`, which is not installed here; in EARL" in output
    else:
        # Tracking comes last, and training does not need it: one line says what will be missing.
        assert done.returncode == 0, output
        (line,) = (line for line in output.splitlines() if "wandb is not installed" in line)
        assert "runs/a: wandb_mode is `offline`" in line
        assert "pip install" in line


def test_one_shard_again_and_nothing_else(place):
    experiment = place.experiment("a", rollout_shards=2)
    place.run(experiment)
    before = place.policy("a", 3)
    target = "runs/a/iterations/000002/scores/0001.parquet"
    output = place.run(experiment, "--force", target, iteration=2)
    assert [line.split()[0] for line in place.commands()] == ["score"]
    assert "policy            -> iterations 3 to 3" in output
    # The same bytes came out, so what depends on them still fits.
    assert place.policy("a", 3) == before
    assert "Nothing to be done" in place.run(experiment)


def test_stage_of_a_dropped_policy_again_restores_the_policy(place):
    experiment = place.experiment("a", num_iterations=4)
    place.run(experiment)
    folder = place.folder("a")
    assert not folder.iteration(1).policy.exists()
    recorded = json.loads(folder.iteration(1).metrics.read_text())["policy_digest"]
    place.run(experiment, "--force", "runs/a/iterations/000002/train/metrics.json", iteration=2)
    assert [line.split()[0] for line in place.commands()] == ["restore", "train", "prune"]
    assert place.policy("a", 1) == recorded


def test_rewind_trains_again_from_there(place, undisturbed):
    experiment = place.experiment("a")
    place.run(experiment)
    assert state.rewind(place.folder("a"), 3) == [3]
    place.run(experiment)
    assert [line.split()[0] for line in place.stages()] == ["train"], "its rollouts and scores are still good"
    assert place.policy("a", 3) == undisturbed


def test_runs_of_one_plan_have_windows_of_their_own(place):
    first, second = place.experiment("a"), place.experiment("b")
    place.run(first, set="num_iterations=2")
    place.run(f"{first},{second}")
    assert sorted(line.split("--run ")[1] for line in place.stages() if line.startswith("train")) == [
        "runs/a", "runs/b", "runs/b", "runs/b"
    ]  # fmt: skip


@pytest.mark.parametrize("window_length", [50, 1])
def test_what_is_sent_elsewhere_waits_for_the_run_and_not_the_run_for_it(place, window_length, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    sending = {"wandb_mode": "online", "wandb_every_n_iterations": 1, "push_to_hub": True}
    sending |= {"push_to_hub_every_n_iterations": 2, "keep_checkpoints_every_n_iterations": 2}
    experiment = place.experiment("a", window_length=window_length, **sending)
    last = "track --run runs/a --out runs/a/tracking/wandb-000003.json"
    started = place.start(experiment, env={"STUB_FAIL": last})
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
    place.run(experiment)
    assert last in place.stages()
    assert {line.split()[0] for line in place.stages()} <= {"track", "push"}
    assert "Nothing to be done" in place.run(experiment)


def test_offline_is_written_once_at_the_end(place):
    counts = job_counts(place.run(place.experiment("a", wandb_mode="offline"), "-n"))
    assert (counts["track"], "push" in counts) == (1, False)


@pytest.mark.parametrize("window_length", [50, 1])
def test_one_pool_of_workers_for_all_windows_which_ends_with_the_workflow(place, window_length):
    place.run(place.experiment("a", workers="local", window_length=window_length))
    (folder,) = set((place.path / "log.txt.pools").read_text().split())
    assert Path(folder).name.startswith("earl-workers-")
    assert not Path(folder).exists()


def test_no_pool_where_none_is_wanted(place):
    place.run(place.experiment("a", workers="none"))
    assert set((place.path / "log.txt.pools").read_text().split()) == {"none"}


def test_what_a_killed_workflow_left_of_its_pool_is_cleared_up_by_one_that_has_none(place):
    open_and_die = """
import os, signal
from earl.workers.opening import open_pool
open_pool(60, beside="runs/.workers")
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", open_and_die], cwd=place.path, env=env).returncode == -signal.SIGKILL
    (left,) = (place.path / "runs" / ".workers").iterdir()
    place.run(place.experiment("a", workers="none"))
    assert not left.exists()


def test_workers_that_cannot_be_had_are_refused(place):
    local, submitit = place.experiment("a", workers="local"), place.experiment("b", workers="submitit")
    assert "take a profile that has stages run as Slurm jobs" in place.run(submitit, "-n", fails=True)
    assert "workers is local and submitit" in place.run(f"{local},{submitit}", "-n", fails=True)


def test_the_slurm_profile_says_what_each_job_asks_for(place):
    place.profile = "slurm"
    chosen = ["generate:constraint=a100", "score:constraint=h100", "train:nodes=2", "train:tasks_per_node=4"]
    options = ["-n", "-p", "--set-resources", *chosen]
    output = place.run(place.experiment("a", num_iterations=1), *options)
    jobs = {
        line.split("--name ")[1].split()[0]: line for line in output.splitlines() if " launch --launcher slurm" in line
    }
    assert jobs.keys() == {"generate-000001-0000", "score-000001-0000", "train-000001"}
    assert "--folder runs/a/logs/jobs/train-000001" in jobs["train-000001"]
    assert "--resource nodes=2 --resource tasks_per_node=4" in jobs["train-000001"]
    for job, kind in (("generate-000001-0000", "a100"), ("score-000001-0000", "h100")):
        assert f"--resource constraint={kind}" in jobs[job]
        assert "--resource slurm_partition=gpu" in jobs[job]
    output = place.run("a.jsonnet", *options, set="workers=submitit")
    assert re.findall(r"launch --launcher workers --name ([a-z]+)", output) == ["generate", "score", "train"]
    output = place.run("a.jsonnet", *options, granularity="segment", set="num_iterations=4,window_length=2")
    assert re.findall(r"launch --launcher slurm --name (\S+)", output) == ["window-000000", "window-000001"]


def test_a_fine_tuning_by_ranks_asks_for_their_processors_and_gpus(place):
    place.profile = "slurm"
    sft = {"base_model": "stage:shapes-policy", "train_paths_file": ["train.parquet"], "steps": 1}
    fields = {"model_path": "stage:sft/s", "sft": {"s": sft}, "num_iterations": 1, "cpu_threads": 2}
    experiment = place.experiment("a", train_processes=8, **fields)

    def asked(*resources: str) -> str:
        output = place.run(experiment, "-n", "-p", "--set-resources", *resources)
        (line,) = (line for line in output.splitlines() if " launch --launcher slurm --name sft-" in line)
        return line

    # By torchrun on one node, then as the tasks of a job.
    line = asked("sft:gpu=8")
    assert "--resource cpus_per_task=16" in line
    assert "--resource gpu=8" in line
    experiment = place.experiment("b", **fields)
    line = asked("sft:nodes=2", "sft:tasks_per_node=4", "sft:gpu=4")
    assert "--resource nodes=2 --resource tasks_per_node=4" in line
    assert "--resource gpu=4" in line


def test_lint_and_format():
    config = ["--config", "experiment=config/demo.jsonnet"]
    lint = subprocess.run([*SNAKEMAKE, "--lint", *config], cwd=ROOT, capture_output=True, text=True)
    assert "your workflow is in a good condition" in lint.stdout + lint.stderr, lint.stdout + lint.stderr
    formatted = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "workflow"], cwd=ROOT, capture_output=True, text=True
    )
    assert formatted.returncode == 0, formatted.stderr


def test_constraint_ties_iterations_to_their_run():
    pattern = plan.constraint({"runs/a": range(2, 4), "runs/b": [7], "runs/c": []}, "/iterations/")

    def matches(path: str) -> bool:
        return re.fullmatch(rf"(?P<run>{pattern})/iterations/(?P<step>\d{{6}})/train/metrics.json", path) is not None

    paths = [f"runs/{run}/iterations/{index:06d}/train/metrics.json" for run in "abc" for index in (1, 2, 3, 7)]
    assert [path for path in paths if matches(path)] == [paths[1], paths[2], paths[7]]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
