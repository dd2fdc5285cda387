"""How long does it take to show a run on Weights & Biases? Offline, on episodes of the demo's number and size.

    python benchmarks/tracking.py [--iterations 20] [--episodes 256] [--side 64]

Pictures are noise, which compresses worst. A process for each call, as in the workflow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from earl.config import freeze, load
from earl.files import atomic, images, manifest, tables
from earl.files.layout import Run

ROOT = Path(__file__).parent.parent
GROUP = 8


def write_iteration(run: Run, index: int, episodes: int, side: int) -> None:
    """Write a complete iteration as the pipeline leaves it, without a model."""
    here, rng = run.iteration(index), np.random.default_rng(index)
    for folder in (here.policy, here.trainer):
        with atomic.folder(folder) as temporary:
            (temporary / "config.json").write_text(str(index))
            manifest.seal(temporary)
    pictures = [
        images.struct(images.encode(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))) for _ in range(episodes)
    ]
    columns = {
        "episode_id": [f"{index}-{i}" for i in range(episodes)],
        "group_id": [f"{index}-{i // GROUP}" for i in range(episodes)],
        "sample_index": [i % GROUP for i in range(episodes)],
        "dataset": ["made up"] * episodes,
        "example_id": [str(i // GROUP) for i in range(episodes)],
        "task": ["add"] * episodes,
        "instruction": ["add a red circle to the left"] * episodes,
        "prompt_token_ids": [[1]] * episodes,
        "completion_token_ids": [[2]] * episodes,
        "behavior_logprobs": [[-1.0]] * episodes,
        "finish_reason": ["stop"] * episodes,
        "completion_text": [""] * episodes,
        "original": [pictures[i // GROUP * GROUP] for i in range(episodes)],
        "target": [None] * episodes,
        "edited": pictures,
        "status": ["ok"] * episodes,
        "raw": ["the circle is there"] * episodes,
        "judge": ["program"] * episodes,
    } | {name: [5.0] * episodes for name in tables.SCORE_COLUMNS}
    tables.write_table(here.rollouts(0), tables.ROLLOUTS, columns, {})
    tables.write_table(
        here.scores(0), tables.SCORES, columns, {"rollouts_digest": manifest.digest_file(here.rollouts(0))}
    )
    same = {"reward": 5.0, "advantage": 0.0, "used": True, "reason": None, "viescore": 5.0}
    same |= {"completion_tokens": 1, "prompt_digest": "p"}
    outcomes = {name: columns[name] for name in ("episode_id", "group_id")}
    outcomes |= {name: [value] * episodes for name, value in same.items()}
    tables.write_table(here.episodes, tables.EPISODES, outcomes, {})
    metrics = {f"figure_{i}": float(i) for i in range(40)} | {"policy_digest": manifest.digest_folder(here.policy)}
    atomic.write_text(here.metrics, json.dumps(metrics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--side", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fields = {"base_exp_dir": folder, "run_name": "bench", "evaluations": {}, "wandb_mode": "offline"}
        run = Run(Path(folder) / "bench")
        freeze.write(load.load(ROOT / "config" / "demo.jsonnet", fields).config, run.config)
        atomic.write_text(run.iteration(0).path / "start.json", json.dumps({"policy_digest": "0"}))
        for index in range(1, asked.iterations + 1):
            write_iteration(run, index, asked.episodes, asked.side)
        for what in ("everything", "nothing new"):
            started, before = time.monotonic(), os.times()
            subprocess.run([sys.executable, "-m", "earl", "track", "--run", str(run.path)], check=True)
            after = os.times()
            cpu = sum(after[2:4]) - sum(before[2:4])
            print(f"{what}: {time.monotonic() - started:.1f} s, {cpu:.1f} s of CPU")
        size = sum(path.stat().st_size for path in (run.path / "tracking").rglob("*") if path.is_file())
        print(f"{size / 1e6:.1f} MB in {run.path / 'tracking'}")


if __name__ == "__main__":
    main()
