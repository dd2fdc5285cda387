"""What does it cost to cut a run into segments, jobs and allocations? The same iterations of the demo, in several ways.

    PYTHONPATH=. python benchmarks/orchestration.py --iterations 12

| way | |
|---|---|
| bare-loop | calls the stage functions in turn, models in memory, without workflow: tests/support/bare_loop.py |
| segment | Snakemake, one job: `earl iterate` |
| stage | Snakemake, a cold process for each stage |
| slurm-segment | Snakemake, executor `submitit`: one Slurm job |
| slurm-stage | Snakemake, executor `submitit`: a Slurm job for each stage |

Data and a hardly trained SFT model are made beforehand. One shard and no evaluation, so that nothing runs side by side
and times add up. The Slurm is that of the tests, on this machine (root and Debian's packages needed), its nodes free.
The ways are run in the given order, `--repeats` times over; the least time of each counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.slurm_cluster import Cluster, missing

ROOT = Path(__file__).parents[1]
WAYS = ("bare-loop", "segment", "slurm-segment", "stage", "slurm-stage")
STAGES = 3
SLURM = ["slurm_partition=gpu", "mem_mb=2000", "disk_mb=0", "runtime=60", "cpus_per_task=1"]
RULES = ("generate", "score", "train", "iterate")


def overrides(base: Path, name: str, iterations: int) -> dict[str, object]:
    return {
        "base_exp_dir": str(base), "run_name": name, "num_iterations": iterations, "rollout_shards": 1,
        "evaluations": {}, "sft.shapes.steps": 20, "segment_length": max(iterations, 1),
        "cpu_threads": 1, "train_processes": 1,
    }  # fmt: skip


def settings(values: dict[str, object]) -> list[str]:
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def command(way: str, experiment: str, values: dict[str, object]) -> list[str]:
    """Return the command of one way."""
    if way == "bare-loop":
        chosen = [word for setting in settings(values) for word in ("--set", setting)]
        return [sys.executable, "-m", "tests.support.bare_loop", "--in-memory", experiment, *chosen]
    granularity = way.removeprefix("slurm-")
    words = [sys.executable, "-m", "snakemake"]
    if way.startswith("slurm-"):
        words += ["--profile", "profiles/slurm", "--jobs", "1", "--default-resources", *SLURM]
        words += ["--set-resources", *(f"{rule}:{name}" for rule in RULES for name in ("gpu=0", "mem_mb=2000"))]
    else:
        words += ["--cores", "1"]
    chosen = f"set={json.dumps(settings(values))}"
    return [*words, "--config", f"experiment={experiment}", f"granularity={granularity}", chosen]


def timed(words: list[str], env: dict[str, str]) -> float:
    start = time.monotonic()
    ended = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(words)}\n{ended.stdout}{ended.stderr}")
    return time.monotonic() - start


def measure(options: argparse.Namespace, base: Path, env: dict[str, str]) -> dict[str, float]:
    """Return the least seconds of each way."""
    timed(command("segment", options.experiment, overrides(base, "shared", 1)), env)  # makes what all share
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    for repeat in range(options.repeats):
        for way in options.ways:
            words = command(way, options.experiment, overrides(base, f"{way}-{repeat}", options.iterations))
            seconds[way].append(timed(words, env))
            print(way, f"{seconds[way][-1]:.1f}", file=sys.stderr, flush=True)
    return {way: min(found) for way, found in seconds.items()}


def table(seconds: dict[str, float], iterations: int) -> str:
    """Return the times as a Markdown table, and what a Slurm job adds to a cold stage."""
    base, stages = next(iter(seconds.values())), STAGES * iterations
    lines = [f"| way | seconds | to {next(iter(seconds))} | a stage |", "|---|---|---|---|"]
    lines += [f"| {way} | {found:.1f} | {found / base:.3f} | {found / stages:.2f} |" for way, found in seconds.items()]
    if {"stage", "slurm-stage"} <= seconds.keys():
        added = (seconds["slurm-stage"] - seconds["stage"]) / stages
        lines += ["", f"By stage, a Slurm job adds {added:.2f} s to a cold local stage."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="config/demo.jsonnet")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "slurm")
        cluster.folder.mkdir()
        cluster.start()
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | cluster.env
        try:
            found = measure(options, Path(folder) / "runs", env)
            print(table(found, options.iterations))
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
