"""Does the workflow stay as quick and as small however many iterations are done? The real rules, without models.

    python benchmarks/dag.py                   plan and run windows of a short and of a long run, side by side
    python benchmarks/dag.py --full            run all iterations of the long run, and report its windows one by one

The stage command is a shell script that makes its outputs in milliseconds; what is measured is the workflow. A run's
history is written to disk as a workflow leaves it: every rollout, score and metrics file, checkpoints of the newest
two iterations alone, and Snakemake's own records.
"""

import argparse
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from earl.config import load
from earl.config.freeze import config_digest, frozen_text
from earl.run.layout import Run

ROOT = Path(__file__).parent.parent

STAGE = r"""#!/bin/bash
# Stands in for `python -m earl`: the same commands, outputs without content.
stage=$1; shift
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2 ;; --run) run=$2 ;; --iteration) iteration=$2 ;; --policy) policy=$2 ;;
  esac
  shift
done
case $stage in
  start) mkdir -p $run/iterations/000000; ln -sfn ../../../../model $run/iterations/000000/policy
         echo '{}' > $run/iterations/000000/start.json ;;
  train) here=$run/iterations/$iteration; mkdir -p $here/policy $here/trainer $here/train
         : > $here/policy/manifest.json; : > $here/trainer/manifest.json
         : > $here/train/episodes.parquet; echo '{}' > $here/train/metrics.json ;;
  prune) ;;
  evaluate) : > $out; : > ${out%.parquet}.json ;;
  *) : > $out ;;
esac
"""


@dataclass
class Measured:
    """Wall time in seconds, peak resident memory of the largest process in MiB, and what was printed."""

    seconds: float
    mebibytes: float
    output: str

    @property
    def jobs(self) -> int:
        """Jobs of the plan, without the target rule."""
        counts = re.findall(r"^total +(\d+)$", self.output, re.MULTILINE)
        return int(counts[0]) - 1 if counts else 0


class Bench:
    """A folder with one experiment in it."""

    def __init__(self, folder: Path, iterations: int, shards: int, window: int) -> None:
        self.folder = folder
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "data.parquet").write_text("")
        script = folder / "stage.sh"
        script.write_text(STAGE)
        script.chmod(0o755)
        experiment = {
            "run_name": "bench", "base_exp_dir": "runs", "train_paths_file": ["data.parquet"],
            "val_paths_file": ["data.parquet"], "model_path": "model", "vision_tokenizer_path": "model",
            "judge": "program", "engine": "torch",
            "num_iterations": iterations, "rollout_shards": shards, "window_length": window, "cpu_threads": 1,
            "engine_batch_size": 16,
            "evaluations": {"held_out": {"prompts": 1, "every_n_iterations": 20}},
        }  # fmt: skip
        (folder / "bench.jsonnet").write_text(json.dumps(experiment))
        self.config = load.load(folder / "bench.jsonnet").config
        self.run = Run(folder / "runs" / "bench")

    def pretend_done(self, done: int) -> None:
        """Write what a workflow leaves behind after ``done`` iterations."""
        first = self.run.iteration(0)
        first.path.mkdir(parents=True)
        first.policy.symlink_to("../../../../model")
        start = first.path / "start.json"
        start.write_text(json.dumps({"policy_digest": "0"}))
        self.run.config.write_text(frozen_text(self.config))
        made = [start]
        for index in range(1, done + 1):
            made += self._pretend_iteration(index, index >= done - 1)
        for index in range(0, done + 1, 20):
            made += self._pretend_evaluation(index)
        self._pretend_records(made)

    def _pretend_iteration(self, index: int, with_checkpoint: bool) -> list[Path]:
        here = self.run.iteration(index)
        shards = range(self.config.rollout_shards)
        paths = [path_of(shard) for path_of in (here.rollouts, here.scores) for shard in shards]
        if with_checkpoint:
            paths += [folder / "manifest.json" for folder in (here.policy, here.trainer)]
        paths += [here.episodes, here.metrics]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        inputs = {"policy": str(index - 1), "rollouts": [], "scores": []}
        metrics = {"inputs": inputs, "policy_digest": str(index), "config_digest": config_digest(self.config)}
        here.metrics.write_text(json.dumps(metrics | {"code_version": "benchmark"}))
        return paths

    def _pretend_evaluation(self, index: int) -> list[Path]:
        evaluation = self.run.evaluation("held_out", index)
        evaluation.folder.mkdir(parents=True, exist_ok=True)
        paths = [evaluation.rollouts, evaluation.scores, evaluation.table, evaluation.summary]
        for path in paths:
            path.write_text(json.dumps({"policy_digest": str(index)}))
        return paths

    def _pretend_records(self, made: list[Path]) -> None:
        """Snakemake keeps a record for each output, in files named by the encoded path."""
        records = self.folder / ".snakemake" / "metadata"
        records.mkdir(parents=True, exist_ok=True)
        for path in made:
            name = base64.b64encode(path.relative_to(self.folder).as_posix().encode()).decode()
            (records / name).write_text(json.dumps({"record_format_version": 6, "incomplete": False}))

    def snakemake(self, *options: str, **config: str) -> Measured:
        settings = {"experiment": "bench.jsonnet", "earl_command": str(self.folder / "stage.sh")} | config
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
        command += ["--profile", ROOT / "profiles" / "local", *options]
        command += ["--config", *(f"{key}={value}" for key, value in settings.items())]
        return self._measure(command)

    def earl(self, *arguments: str) -> Measured:
        return self._measure([sys.executable, "-m", "earl", *arguments])

    def _measure(self, command: list[object]) -> Measured:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with tempfile.TemporaryFile("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                list(map(str, command)), cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            output.seek(0)
            text = output.read()
        if os.waitstatus_to_exitcode(status) not in (0, 1) or "Error" in text:
            sys.exit(f"{command} failed:\n{text}")
        return Measured(seconds, usage.ru_maxrss / 1024, text)


def best(measurements: list[Measured]) -> Measured:
    """Return the quickest: others were disturbed."""
    return min(measurements, key=lambda measured: measured.seconds)


def compare(folder: Path, total: int, shards: int, window: int, repeats: int) -> None:
    """Print the short and the long run side by side."""
    short, long = Bench(folder / "short", 20, shards, window), Bench(folder / "long", total, shards, window)
    short.pretend_done(10)
    long.pretend_done(total - 10)
    plans = [best([bench.snakemake("-n", "--quiet", "rules") for _ in range(repeats)]) for bench in (short, long)]
    checks = [best([bench.earl("verify", "--run", "runs/bench") for _ in range(repeats)]) for bench in (short, long)]
    ends = [bench.snakemake("--quiet", "rules") for bench in (short, long)]
    print(f"{shards} shards, window of {window}; 10 iterations left to do")
    print(f"{'':34}{'10 of 20 done':>16}{f'{total - 10} of {total}':>16}{'ratio':>8}")
    row("snakemake -n, s", [one.seconds for one in plans])
    row("snakemake -n, peak MiB", [one.mebibytes for one in plans])
    row("the rest run, ms a job", [1000 * one.seconds / one.jobs for one in ends])
    row("the rest run, peak MiB", [one.mebibytes for one in ends])
    row("earl verify, s", [one.seconds for one in checks])
    chain = Bench(folder / "chain", total, shards, window)
    started = chain.snakemake("-n", "--quiet", "rules")
    print(f"{'snakemake -n, nothing done':34}{'':16}{started.seconds:>16.2f} s, {started.mebibytes:.0f} MiB")


def row(name: str, values: list[float]) -> None:
    print(f"{name:34}{values[0]:>16.2f}{values[1]:>16.2f}{values[1] / values[0]:>8.2f}")


def full(folder: Path, total: int, shards: int, window: int) -> None:
    """Run every iteration, window after window, and print how long the windows took."""
    bench = Bench(folder / "full", total, shards, window)
    measured = bench.snakemake("--quiet", "rules")
    times = sorted(path.stat().st_mtime for path in bench.run.path.glob("iterations/*/train/metrics.json"))
    marks = [times[min(i, len(times)) - 1] for i in range(window, total + window, window)]
    spans = [after - before for before, after in itertools.pairwise(marks)]
    print(f"{total} iterations x {shards} shards in {measured.seconds:.0f} s, peak {measured.mebibytes:.0f} MiB")
    print("seconds a window:", " ".join(f"{span:.1f}" for span in spans))
    third = max(1, len(spans) // 3)
    first, last = sum(spans[:third]) / third, sum(spans[-third:]) / third
    print(f"first third {first:.1f} s, last third {last:.1f} s a window: {last / first:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="run all iterations instead of the last ten")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="earl-dag-"))
    try:
        if options.full:
            full(folder, options.iterations, options.shards, options.window)
        else:
            compare(folder, options.iterations, options.shards, options.window, options.repeats)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
