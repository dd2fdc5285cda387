"""Makes the files of small runs, for the tests of what is sent elsewhere: no model, a few bytes a policy."""

import json
from pathlib import Path

from earl.config import freeze
from earl.config.schema import Config
from earl.files import atomic, manifest, tables
from earl.files.layout import Run
from tests.support import evaluation_files

GROUP = 2
"""Episodes in an iteration: one group."""


def new_run(path: Path, **overrides) -> tuple[Run, Config]:
    """A run folder with its configuration (the demo's, without evaluations) and a starting policy."""
    changes = {"base_exp_dir": str(path.parent), "run_name": path.name, "evaluations": {}} | overrides
    config = evaluation_files.demo_config(**changes)
    run = Run(path)
    freeze.write(config, run.config, accept_changes=True)
    atomic.write_text(run.iteration(0).path / "start.json", json.dumps({"policy_digest": "0" * 64}))
    run.iteration(0).policy.mkdir()
    return run, config


def train(run: Run, *indices: int, variant: str = "") -> None:
    """Write complete iterations; another ``variant`` trains other policies."""
    for index in indices:
        _write_policy(run, index, variant)
        _write_episodes(run, index)
        digest = manifest.digest_folder(run.iteration(index).policy)
        metrics = {
            "iteration": index,
            "policy_digest": digest,
            "reward_mean": index + 0.5,
            "kl": None,
            "counted": "all",
        }
        atomic.write_text(run.iteration(index).metrics, json.dumps(metrics | {"inputs": {"shards": 1}}))


def _write_policy(run: Run, index: int, variant: str) -> None:
    for folder in (run.iteration(index).policy, run.iteration(index).trainer):
        with atomic.folder(folder) as temporary:
            (temporary / "config.json").write_text("{}")
            (temporary / "model.safetensors").write_text(f"weights {index} {variant}")
            manifest.seal(temporary)


def _write_episodes(run: Run, index: int) -> None:
    words = [f"judged {index}.{sample}" for sample in range(GROUP)]
    rows = [evaluation_files.episode(index, 3.0 + sample, sample, raw=words[sample]) for sample in range(GROUP)]
    rows[-1]["edited"] = None
    folder = run.iteration(index).path
    rollouts, scores = evaluation_files.write_inputs(folder, index, rows)
    for path, kind in ((rollouts, "rollouts"), (scores, "scores")):
        (folder / kind).mkdir(exist_ok=True)
        path.rename(folder / kind / "0000.parquet")
    outcomes = {
        "episode_id": [row["episode_id"] for row in rows],
        "group_id": [row["group_id"] for row in rows],
        "reward": [3.0, 4.0],
        "advantage": [-1.0, 1.0],
        "used": [True, True],
        "reason": [None, None],
        "viescore": [3.0, 4.0],
        "completion_tokens": [2, 2],
        "prompt_digest": ["p", "p"],
    }
    tables.write_table(run.iteration(index).episodes, tables.EPISODES, outcomes, {})


def evaluate(run: Run, name: str, index: int) -> None:
    """Write the summary of an evaluation."""
    summary = {"iteration": index, "policy_digest": "ab", "reward": {"mean": 4.0 + index, "n": 2}}
    atomic.write_text(run.evaluation(name, index).summary, json.dumps(summary))
