"""What does it cost to cut a run into processes, jobs and allocations? The same iterations of the demo, in many ways.

    PYTHONPATH=. python benchmarks/orchestration.py --iterations 20 2> /dev/null

| way | |
|---|---|
| one process | calls the stage functions one after the other (benchmarks/one_process.py) |
| workers | Snakemake, stages in resident workers |
| cold | Snakemake, a process for each stage |
| segment | Snakemake, one Slurm job for all iterations, stages in resident workers there |
| stage | Snakemake, a Slurm job for each stage |
| stage-workers | Snakemake, stages in resident workers that are Slurm jobs, one a kind |

Data and a hardly trained SFT model are made beforehand. One shard and no evaluation, so that nothing runs side by side
and times add up: what a way takes is the time in its stages' commands plus what Snakemake takes between them. The Slurm
is that of the tests, on this machine (root and Debian's packages needed), with nodes that are free.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.slurm_cluster import Cluster, missing

from earl.config import load
from earl.config.schema import Config
from tests.support import bare_loop

ROOT = Path(__file__).parent.parent
WAYS = ("one-process", "workers", "cold", "segment", "stage", "stage-workers")
STAGES = ("generate", "score", "train")
SLURM = ["launcher=slurm", "slurm_partition=gpu", "mem_mb=2000", "disk_mb=0", "runtime=60", "cpus_per_task=1"]
RULES = ("generate", "score", "train", "window")
WORKERS = {"workers": "local", "segment": "local", "stage-workers": "submitit"}


@dataclass(frozen=True)
class Measured:
    """Seconds: of the whole, and in the commands of all stages together where these are processes."""

    way: str
    seconds: float
    in_stages: float | None
    stages: int


def overrides(base: Path, way: str, iterations: int) -> dict[str, object]:
    return {
        "base_exp_dir": str(base), "run_name": way, "num_iterations": iterations, "rollout_shards": 1,
        "evaluations": {}, "sft.shapes.steps": 20, "window_length": max(iterations, 1),
        "workers": WORKERS.get(way, "none"),
    }  # fmt: skip


def timed(command: list[str], env: dict[str, str]) -> float:
    start = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}{ended.stderr}")
    return time.monotonic() - start


def settings(values: dict[str, object]) -> list[str]:
    return [f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in values.items()]


def in_one_process(experiment: str, values: dict[str, object], env: dict[str, str]) -> float:
    command = [sys.executable, "benchmarks/one_process.py", experiment]
    for setting in settings(values):
        command += ["--set", setting]
    return timed(command, env)


def in_snakemake(experiment: str, values: dict[str, object], env: dict[str, str], options: list[str]) -> float:
    command = [sys.executable, "-m", "snakemake", *options, "--config", f"experiment={experiment}"]
    return timed([*command, f"set={json.dumps(settings(values))}"], env)


def slurm_options(granularity: str) -> list[str]:
    options = ["--profile", "profiles/slurm", "--default-resources", *SLURM, f"granularity={granularity}"]
    return [*options, "--set-resources", *(f"{rule}:gpu=0" for rule in RULES), "window:cpus_per_task=1"]


def seconds_in_stages(config: Config) -> tuple[float, int]:
    """Return what Snakemake wrote down about a run: seconds in its stages' commands, and how many there were."""
    files = [
        path for stage in STAGES for path in Path(config.base_exp_dir, config.run_name, "benchmarks", stage).glob("*")
    ]
    rows = [row for path in files for row in csv.DictReader(path.read_text().splitlines(), delimiter="\t")]
    return sum(float(row["s"]) for row in rows), len(rows)


def measure(experiment: str, base: Path, iterations: int, env: dict[str, str], ways: list[str]) -> list[Measured]:
    bare_loop.make_shared(load.load(experiment, overrides(base, "shared", iterations)).config)
    found = []
    for way in ways:
        values = overrides(base, way, iterations)
        match way:
            case "one-process":
                found.append(Measured(way, in_one_process(experiment, values, env), None, 0))
                continue
            case "cold" | "workers":
                options = ["--profile", "profiles/local", "--cores", "1"]
            case _:
                options = slurm_options(way.partition("-")[0])
        seconds = in_snakemake(experiment, values, env, options)
        in_stages, stages = seconds_in_stages(load.load(experiment, values).config)
        found.append(Measured(way, seconds, in_stages, stages))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def table(found: list[Measured]) -> str:
    """Return the times, and what a stage costs in each way, as a Markdown table."""
    base = found[0].seconds
    lines = [
        "| way | seconds | to the first | in stages' commands | a stage | outside of them |",
        "|---|---|---|---|---|---|",
    ]
    for item in found:
        line = f"| {item.way} | {item.seconds:.1f} | {item.seconds / base:.2f} |"
        if item.in_stages is not None:
            line += (
                f" {item.in_stages:.1f} | {item.in_stages / item.stages:.2f} | {item.seconds - item.in_stages:.1f} |"
            )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="config/demo.jsonnet")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "slurm")
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if any(way.startswith(("segment", "stage")) for way in options.ways):
            if reason := missing():
                sys.exit(reason)
            cluster.folder.mkdir()
            cluster.start()
            env |= cluster.env
        try:
            print(table(measure(options.experiment, Path(folder) / "runs", options.iterations, env, options.ways)))
        finally:
            if cluster.daemons:
                cluster.stop()


if __name__ == "__main__":
    main()
