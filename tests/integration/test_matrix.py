"""The ten experiments in the shapes world, cut down: one as `make matrix` makes it, up to a table with another one, and
others in this process."""

import json
import re
import sys
from pathlib import Path

import pytest

from earl.config import load
from earl.emu3 import sequence
from earl.emu3.vocabulary import Vocabulary
from earl.files import manifest, tables
from earl.files.layout import Run
from tests.support import bare_loop, forked
from tests.support.html_page import Page
from tests.support.make import make

ROOT = Path(__file__).parents[2]
MADE = ("sft_s__rl_s", "sft_think_s__rl_s")
"""They need one data set and its like with mistakes, and nothing but their fine-tuning to differ in."""
IN_PROCESS = ("sft_sc__rl_c", "sft_sc2stage__rl_sc")
STEPS = 4
SMALL = {
    "heldout": 4,
    "raw_datasets.omniedit.count": 60,
    "sft_steps": STEPS,
    "episodes_per_iteration": 8,
    "generations_per_sample": 4,
    "engine_batch_size": 4,
    # A few steps teach nobody to think: those who were made to would write until they may no more.
    "max_response_tokens": 96,
}
THINKING = " Let's think step by step. <|start thinking|>"


def test_make_matrix_names_all_ten():
    makefile = (ROOT / "Makefile").read_text()
    names = re.search(r"^MATRIX := ((?:.*\\\n)*.*)$", makefile, re.M)[1].replace("\\", " ").split()
    assert sorted(names) == sorted(path.stem for path in (ROOT / "config" / "shapes").glob("sft_*.jsonnet"))
    assert len(names) == 10


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> tuple[Path, str]:
    """Run the target with this Python's packages; return the folder of the runs and what was printed.

    The second run is there already, made in this process: the target finds it complete, and its data.
    """
    runs = tmp_path_factory.mktemp("matrix") / "runs"
    overrides = SMALL | {"base_exp_dir": str(runs), "num_iterations": 1}
    bare_loop.run_all(load.load(ROOT / "config" / "shapes" / f"{MADE[1]}.jsonnet", overrides).config)
    arguments = ["matrix", f"VENV={sys.prefix}", f"RUNS={runs}", "ITERATIONS=1"]
    arguments.append(f"BIN={forked.python('snakemake', 'earl').parent}")
    # What is installed here may be older than pyproject.toml, and is not for a test to change.
    arguments += ["--old-file", f"{sys.prefix}/.installed", f"MATRIX={' '.join(MADE)}"]
    arguments.append("SET=" + " ".join(f"{field}={value}" for field, value in SMALL.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forked.PYTHON, f"{forked.python()}")
        done = make(ROOT, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.parent.name for path in runs.glob("*/segments")] == [f"shapes_{MADE[0]}"]
    return runs, done.stdout


@pytest.fixture(scope="module")
def made_here(tmp_path_factory) -> Path:
    """Return the folder of the runs of `IN_PROCESS`."""
    runs = tmp_path_factory.mktemp("in-process") / "runs"
    small = SMALL | {f"raw_datasets.{name}.count": 30 for name in ("aurora_kubric", "ss2")}
    for name in IN_PROCESS:
        experiment = ROOT / "config" / "shapes" / f"{name}.jsonnet"
        overrides = small | {"base_exp_dir": str(runs), "num_iterations": 1, "evaluations": {}, "rollout_shards": 1}
        bare_loop.run_all(load.load(experiment, overrides).config)
    return runs


def run_of(runs: Path, experiment: str) -> Run:
    return Run(runs / f"shapes_{experiment}")


@pytest.mark.slow
def test_one_table_compares_all_runs(matrix):
    runs, printed = matrix
    labels = [f"shapes_{name}" for name in MADE]
    found = json.loads((runs / "matrix.json").read_text())
    assert [entry["label"] for entry in found["entries"]] == labels
    for entry in found["entries"]:
        assert {name: part["n"] for name, part in entry["evaluations"].items()} == {"simple": 4, "complex": 4}
        assert all(entry["start"].values()), "the policy it started from was evaluated too"
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| shapes_sft")]
    assert rows == [*labels, *labels[1:], *labels], "means, changes from the first, changes in training"
    assert len(found["published"]["rows"]) == 7, "five of the paper, two of model cards"
    html = (runs / "matrix.html").read_text()
    assert Page(html).open == []
    charts = re.findall(r'<svg class="chart dots".*?</svg>', html)
    assert [all(label in chart for label in labels) for chart in charts] == [True, True], "simple and complex"


def tuned(runs: Path) -> dict[str, list[float]]:
    """Return the losses of each fine-tuning."""
    folders = (runs / "shared" / "sft").glob("[!.]*")
    return {folder.name.rpartition("-")[0]: json.loads((folder / "sft.json").read_text())["loss"] for folder in folders}


def check_trained(runs: Path, experiment: str) -> None:
    run = run_of(runs, experiment)
    metrics = json.loads(run.iteration(1).metrics.read_text())
    start = manifest.digest_folder(run.iteration(0).policy)
    assert metrics["inputs"]["policy"] == metrics["inputs"]["reference"] == start
    assert metrics["logprob_mismatch_mean"] < 1e-4, "sampler and learner saw the same sequences"
    kind = experiment.removeprefix("sft_").partition("__")[0]
    assert run.iteration(0).policy.resolve().parent == (runs / "shared" / "sft").resolve()
    assert run.iteration(0).policy.resolve().name.startswith(f"{kind}-")


@pytest.mark.slow
def test_runs_share_their_data_and_train_their_own_policies(matrix):
    runs, _ = matrix
    made = {kind: len(list((runs / "shared" / kind).glob("[!.]*"))) for kind in ("raw", "tokenised")}
    assert made == {"raw": 4, "tokenised": 4}, "one to train on, its like with mistakes, two held out"
    losses = tuned(runs)
    assert {name: len(values) for name, values in losses.items()} == {"s": STEPS, "think_s": STEPS}
    # The base policy has never seen reasoning.
    assert losses["think_s"][0] > 2 * losses["s"][0]
    for name in MADE:
        check_trained(runs, name)
        assert run_of(runs, name).report.is_file()


@pytest.mark.slow
def test_recipes_of_several_data_sets_and_stages_end_in_a_policy_that_rl_has_trained(made_here):
    assert tuned(made_here).keys() == {"s", "sc", "sc2stage"}, "the first stage of sc2stage is s"
    for name in IN_PROCESS:
        check_trained(made_here, name)


@pytest.mark.slow
def test_forced_reasoning_is_sampled_kept_and_trained(matrix):
    runs, _ = matrix
    run = run_of(runs, "sft_think_s__rl_s")
    vocabulary = Vocabulary.from_folder(run.iteration(0).policy)
    shards = [run.iteration(1).rollouts(shard) for shard in range(2)]
    rows = [row for path in shards for row in tables.read_table(path, tables.ROLLOUTS).to_pylist()]
    assert len(rows) == 8
    for row in rows:
        assert vocabulary.decode(row["prompt_token_ids"]).endswith(row["instruction"] + THINKING)
        assert row["completion_text"] == sequence.completion_text(row["completion_token_ids"], vocabulary)
    assert any(len(row["completion_text"]) > 40 for row in rows)
    metrics = json.loads(run.iteration(1).metrics.read_text())
    words = sum(token < vocabulary.first_visual for row in rows for token in row["completion_token_ids"])
    assert metrics["counted_tokens"] > words / 2, "words are counted, not the image alone"
