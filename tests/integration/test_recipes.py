"""The four ways to a starting policy, from raw data to RL, through the real workflow in the shapes world."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from earl.emu3 import sequence
from earl.emu3.vocabulary import Vocabulary
from earl.execution import processes
from earl.files import manifest, tables
from earl.run.layout import Run

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("sft_s__rl_s", "sft_sc__rl_c", "sft_sc2stage__rl_sc", "sft_think_s__rl_s")
THINKING = " Let's think step by step. <|start thinking|>"
STEPS = 4
SMALL = f"""
local whole = import '{ROOT}/config/shapes/%(name)s.jsonnet';
whole + {{
  run_name: '%(name)s',
  base_exp_dir: '%(base)s',
  raw_datasets: {{
    [name]: whole.raw_datasets[name] + {{ count: 24 }} for name in std.objectFields(whole.raw_datasets)
  }},
  fine_tuning(mixing, steps):: super.fine_tuning(mixing, steps) + {{ steps: {STEPS}, batch_size: 4, warmup_steps: 0 }},
  num_iterations: 1,
  episodes_per_iteration: 8,
  generations_per_sample: 4,
  engine_batch_size: 4,
  rollout_shards: 1,
  evaluations: {{}},
}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The base folder of four runs that one call made, and what Snakemake said."""
    place = tmp_path_factory.mktemp("recipes")
    base = place / "runs"
    for name in EXPERIMENTS:
        (place / f"{name}.jsonnet").write_text(SMALL % {"name": name, "base": base})
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--profile", ROOT / "profiles" / "local", "--config"]
    command += ["experiment=" + ",".join(f"{name}.jsonnet" for name in EXPERIMENTS)]
    inherited = {key: value for key, value in os.environ.items() if key != processes.WATCHED}
    done = subprocess.run(
        list(map(str, command)),
        cwd=place,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return base, done.stdout


@pytest.mark.slow
def test_each_recipe_ends_in_a_policy_that_rl_has_trained(finished):
    base, _ = finished
    for name in EXPERIMENTS:
        run = Run(base / name)
        metrics = json.loads(run.iteration(1).metrics.read_text())
        start = manifest.digest_folder(run.iteration(0).policy)
        assert metrics["inputs"]["policy"] == metrics["inputs"]["reference"] == start
        assert metrics["logprob_mismatch_mean"] < 1e-4, "sampler and learner saw the same sequences"
        kind = name.removeprefix("sft_").partition("__")[0]
        assert run.iteration(0).policy.resolve().parent == (base / "shared" / "sft").resolve()
        assert run.iteration(0).policy.resolve().name.startswith(f"{kind}-")
        assert run.report.is_file()


@pytest.mark.slow
def test_what_recipes_have_in_common_is_made_once(finished):
    base, output = finished
    counts = {
        name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output.split("Job stats:")[1], re.MULTILINE)
    }
    assert (counts["raw"], counts["tokenise"], counts["sft"], counts["train"]) == (7, 7, 4, 4)
    tuned = {folder.name.rpartition("-")[0]: folder for folder in (base / "shared" / "sft").glob("[!.]*")}
    assert tuned.keys() == {"s", "sc", "sc2stage", "think_s"}, "the first stage of sc2stage is s, and nothing half-made"
    losses = {name: json.loads((folder / "sft.json").read_text())["loss"] for name, folder in tuned.items()}
    assert {len(values) for values in losses.values()} == {STEPS}
    # The base policy has never seen reasoning.
    assert losses["think_s"][0] > 2 * losses["s"][0]


@pytest.mark.slow
def test_forced_reasoning_is_sampled_kept_and_trained(finished):
    base, _ = finished
    run = Run(base / "sft_think_s__rl_s")
    vocabulary = Vocabulary.from_folder(run.iteration(0).policy)
    rows = tables.read_table(run.iteration(1).rollouts(0), tables.ROLLOUTS).to_pylist()
    assert len(rows) == 8
    for row in rows:
        assert vocabulary.decode(row["prompt_token_ids"]).endswith(row["instruction"] + THINKING)
        assert row["completion_text"] == sequence.completion_text(row["completion_token_ids"], vocabulary)
    assert any(len(row["completion_text"]) > 40 for row in rows)
    metrics = json.loads(run.iteration(1).metrics.read_text())
    words = sum(token < vocabulary.first_visual for row in rows for token in row["completion_token_ids"])
    assert metrics["counted_tokens"] > words / 2, "words are counted, not the image alone"
