"""The workflow at home with Snakemake: its options, profiles and reports, and paths as people have them."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.workplace import ROOT, Workplace, job_counts

ODD = "my [odd] run's folder"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def snakemake(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)


class TestAsItStands:
    def test_the_demo_is_planned_without_a_word_and_in_one_screen(self, tmp_path):
        done = snakemake("-n", "-q")
        assert done.returncode == 0, done.stderr
        assert "runs/demo: " in done.stderr
        assert len((done.stdout + done.stderr).splitlines()) <= 25
        counts = job_counts(snakemake("-n", "--config", f"set=base_exp_dir={tmp_path}", "granularity=stage").stdout)
        assert counts["train"] == 20
        assert counts.keys() >= {"raw", "tokenise", "sft", "start", "generate", "score", "evaluate", "report"}

    def test_lint_and_format(self):
        lint = snakemake("--lint")
        assert "your workflow is in a good condition" in lint.stdout + lint.stderr, lint.stdout + lint.stderr
        formatted = [sys.executable, "-m", "snakefmt", "--check", "workflow"]
        done = subprocess.run(formatted, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_rules_hold_no_python_but_input_functions(self):
        """Whoever reads a rule sees all of it: `run:` and `script:` blocks are not used, locks are not in the rules."""
        for path in (ROOT / "workflow").rglob("*.smk"):
            text = path.read_text()
            assert not [word for word in ("    run:", "    script:", "import os") if word in text], path

    def test_python_of_the_rules_imports_nothing_of_snakemake(self):
        code = "import sys, earl.workflow.inputs, earl.workflow.opening; sys.exit('snakemake' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestGpus:
    """What profile and command line say of a rule's GPUs is compared with what its stage takes."""

    @pytest.mark.slow
    def test_too_few_for_the_ranks(self, place):
        asked = place.experiment("a", train_processes=2, device="auto")
        output = place.run(asked, "-n", "--set-resources", "iterate:gpu=1", fails=True)
        assert "iterate: field train_processes (in a.jsonnet) = 2: makes a job of 2 GPUs, but the profile" in output
        place.run(asked, "-n", "--set-resources", "iterate:gpu=2")
        place.run(asked, "-n", "--default-resources", "gpu=2")

    def test_a_plan_without_gpus_needs_no_torch(self):
        code = "import sys, earl.workflow.inputs, earl.workflow.opening; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestSettings:
    @pytest.mark.slow
    def test_texts_reach_the_configuration_as_they_were_typed(self, place):
        place.run(place.experiment("a", num_iterations=1), set="run_name=007,assistant_prefill=say: this # that")
        config = json.loads((place.path / "runs" / "007" / "config.json").read_text())
        assert (config["run_name"], config["assistant_prefill"]) == ("007", "say: this # that")

    def test_a_configuration_file_says_what_the_command_line_does_not(self, place):
        (place.path / "config").mkdir()
        (place.path / "config" / "config.yaml").write_text("granularity: stage\nset: {num_iterations: 2}\n")
        assert job_counts(place.run(place.experiment("a"), "-n"))["train"] == 2
        assert "iterate" in job_counts(place.run("a.jsonnet", "-n", granularity="segment"))

    def test_a_profile_chooses_the_granularity_by_its_default_resources(self, place):
        experiment = place.experiment("a")
        assert "train" in job_counts(place.run(experiment, "-n", "--default-resources", "granularity=stage"))
        options = ("-n", "--default-resources", "granularity=stage")
        assert "iterate" in job_counts(place.run(experiment, *options, granularity="segment"))

    @pytest.mark.slow
    def test_jobs_elsewhere_have_the_settings_that_were_typed(self, place):
        """A job is told by a command line of Snakemake's, through a shell."""
        place.profile = "slurm"
        prefill = """it's "$HOME": `a` \\ # b"""
        settings = json.dumps(["run_name=b", f"assistant_prefill={prefill}"])
        options = ("--submitit-cluster", "local", "--submitit-seconds", "1", "--latency-wait", "2")
        place.run(place.experiment("a", num_iterations=1), *options, set=settings)
        config = json.loads((place.path / "runs" / "b" / "config.json").read_text())
        assert (config["assistant_prefill"], place.folder("b").report.is_file()) == (prefill, True)

    def test_an_unknown_setting_is_refused(self, place):
        output = place.run(place.experiment("a"), "-n", sett="temperature=1", fails=True)
        assert "--config sett=...: is not a setting; did you mean set?" in output


class TestPaths:
    @pytest.mark.slow
    @pytest.mark.parametrize("granularity", ["segment", "stage"])
    def test_spaces_quotes_and_brackets(self, place, granularity):
        experiment = place.shapes_experiment("a", base_exp_dir=ODD, evaluations={"e": {"prompts": 4}})
        place.run(experiment, granularity=granularity)
        assert json.loads((place.path / ODD / "a" / "verify.json").read_text())["problems"] == []
        assert "Nothing to be done" in place.run(experiment, granularity=granularity)

    def test_braces_are_refused(self, place):
        output = place.run(place.experiment("a", base_exp_dir="runs/{x}"), "-n", fails=True)
        assert "field base_exp_dir (in a.jsonnet) is runs/{x}: Snakemake takes no braces" in output

    @pytest.mark.slow
    def test_another_working_folder(self, place):
        elsewhere = place.path / "elsewhere"
        elsewhere.mkdir()
        for name in ("model", "train.parquet", "held_out.parquet"):
            shutil.move(place.path / name, elsewhere / name)
        experiment = place.path / place.experiment("a", num_iterations=1)
        place.run(str(experiment), "--directory", "elsewhere")
        assert (elsewhere / "runs" / "a" / "report.html").is_file()
        assert not (place.path / "runs").exists()


class TestOptions:
    @pytest.mark.slow
    def test_retries_and_keep_going(self, place):
        """A stage that fails is tried again; what does not depend on it goes on."""
        both = ",".join(place.experiment(name, num_iterations=1) for name in "ab")
        started = place.start(both, "-k", "-p", "--retries", "1", env={"STUB_FAIL": "score --config runs/a/"})
        output, _ = started.communicate(timeout=120)
        assert started.returncode != 0
        assert "earl iterate --run runs/a --to 000001" in output
        assert len([line for line in place.commands() if line.startswith("score --config runs/a/")]) == 2
        assert place.folder("b").report.is_file()
        assert not place.folder("a").report.exists()

    @pytest.mark.slow
    def test_until_and_forcerun(self, place):
        experiment = place.shapes_experiment("a")
        place.run(experiment, "--until", "tokenise")
        assert [line.split(" --")[0] for line in place.commands()] == ["shapes raw", "tokenise"]
        place.run(experiment)
        place.run(experiment, "-R", "report", "--notemp", "--latency-wait", "1")
        assert [line.split()[0] for line in place.commands()] == ["report"]

    @pytest.mark.slow
    def test_a_report_shows_pages_curves_and_tables(self, place):
        place.run(place.experiment("a", num_iterations=1))
        place.run("a.jsonnet", "--report", "report.zip")
        names = [Path(name).name for name in zipfile.ZipFile(place.path / "report.zip").namelist()]
        assert {"curves.svg", "evaluations.csv", "report.html"} <= set(names)


def test_a_job_elsewhere_asks_for_what_its_experiment_says(place):
    """Not for what the machine has that the workflow is started on."""
    place.profile = "slurm"
    fields = {"num_iterations": 1, "cpu_threads": 2, "train_processes": 40, "segment_processes": 48, "engine": "vllm"}
    asked = place.run(place.experiment("a", **fields), "-n", "--cores", "2", granularity="stage")
    jobs = dict(re.findall(r"^rule (\w+):.*?resources: ([^\n]*)", asked, re.DOTALL | re.MULTILINE))
    assert "gpu=40" in jobs["train"]
    assert "cpus_per_task=80" in jobs["train"]
    assert "gpu=1" in jobs["generate"]
    chosen = place.run(
        "a.jsonnet", "-n", "--set-resources", "iterate:constraint=h100", "iterate:nodes=6", "iterate:gpu=8"
    )
    jobs = dict(re.findall(r"^rule (\w+):.*?resources: ([^\n]*)", chosen, re.DOTALL | re.MULTILINE))
    assert all(word in jobs["iterate"] for word in ("gpu=8", "nodes=6", "constraint=h100"))


@pytest.mark.parametrize("profile", [None, "slurm"])
def test_vllm_is_missed_only_where_stages_run_here(place, profile):
    hidden = place.path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules.update(vllm=None, wandb=None)\n")
    experiment = place.experiment("a", engine="vllm", wandb_mode="offline")
    options = ["--profile", ROOT / "profiles" / profile] if profile else []
    arguments = ["--snakefile", ROOT / "workflow" / "Snakefile", *options, "-n", "--config", f"experiment={experiment}"]
    done = snakemake(*arguments, cwd=place.path, PYTHONPATH=f"{ROOT}:{hidden}")
    output = done.stdout + done.stderr
    if profile is None:
        assert "field engine (in a.jsonnet) is `vllm`, which is not installed here; in EARL" in output
    else:
        # Tracking comes last, and training does not need it: one line says what will be missing.
        assert done.returncode == 0, output
        (line,) = (line for line in output.splitlines() if "wandb is not installed" in line)
        assert "runs/a: wandb_mode is `offline`" in line
        assert "pip install" in line
