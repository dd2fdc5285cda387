"""RL, then fine-tunings on its best completions and on preferences, then evaluations, by real stages.

In what order one plan has them: see test_selections.py.
"""

import json

import pytest

from earl.config import load
from earl.data.tokenised import open_dataset
from earl.files import manifest
from earl.files.layout import Run
from tests.support import bare_loop, forked
from tests.support.demo import DEMO, SHORT
from tests.support.workplace import job_counts

SELECTED = """
(import '%s') + {
  run_name: '%s', base_exp_dir: '%s', num_iterations: 0,
  selections: { x: { run: $.base_exp_dir + '/rl' } },
  sft+: {
    tuned: $.sft.shapes + { base_model: 'stage:sft/shapes', train_paths_file: ['stage:select/x'], steps: 3 } + %s,
  },
  model_path: 'stage:sft/tuned',
}
"""


@pytest.mark.slow
def test_from_rl_to_evaluations(tmp_path):
    """The workflow selects and fine-tunes once, by processes of its own; the rest is done here."""
    runs = tmp_path / "runs"
    experiments = {
        "rl": f"(import '{DEMO}') + {{ run_name: 'rl', base_exp_dir: '{runs}', num_iterations: 1 }}",
        "best": SELECTED % (DEMO, "best", runs, "{}"),
        "dpo": SELECTED % (DEMO, "dpo", runs, "{ objective: 'dpo', dpo_beta: 0.1 }"),
    }
    for name, text in experiments.items():
        (tmp_path / f"{name}.jsonnet").write_text(text)
    # One data set and one evaluation for all: what comes of them is not looked at.
    fewer = {f"{name}_paths_file": ["stage:tokenise/shapes_sft"] for name in ("train", "val")}
    fewer["evaluations"] = {"heldout": {"prompts": 2}}
    changes = {name: value for name, value in (SHORT | fewer).items() if name != "num_iterations"}
    configs = {name: load.load(tmp_path / f"{name}.jsonnet", changes).config for name in experiments}
    bare_loop.run_all(configs["rl"])

    words = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    asked = [Run(runs / "best").iteration(0).path / "start.json"]
    asked += ["--config", f"experiment={tmp_path / 'best.jsonnet'}", f"set={json.dumps(words)}"]
    done = forked.run("snakemake", *asked, **{forked.PYTHON: forked.python("earl")})
    assert done.returncode == 0, done.stdout
    assert job_counts(done.stdout) == {"select": 1, "sft": 1, "start": 1, "total": 3}
    bare_loop.evaluate(configs["best"], Run(runs / "best"), 0)
    bare_loop.run_all(configs["dpo"])

    (selected,) = (runs / "shared" / "selected").glob(f"*/{manifest.NAME}")
    metrics = json.loads(Run(runs / "rl").iteration(1).metrics.read_text())
    assert 0 < len(open_dataset(selected.parent)) <= metrics["groups"] == 4
    policies = {name: Run(runs / name).iteration(0).policy.resolve() for name in experiments}
    assert len(set(policies.values())) == 3
    curve = json.loads((policies["dpo"] / "sft.json").read_text())
    assert len(curve["margin"]) == 3
    for name in experiments:
        summary = json.loads(Run(runs / name).evaluation("heldout", 0).summary.read_text())
        assert summary["policy_digest"] == manifest.digest_folder(policies[name])
