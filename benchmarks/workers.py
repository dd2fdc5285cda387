"""What resident workers save: the demo's iterations with the stages' commands, cold and in workers, in turns.

    PYTHONPATH=. python benchmarks/workers.py --iterations 4

Both run the same commands over the same starting policy, an iteration cold, then the same one in workers, so that a
changing load of the machine hits both alike. Prints wall and CPU seconds by stage, and stops where a byte differs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import one_process
from earl.config import freeze, load, paths
from earl.config.schema import Config
from earl.execution import processes
from earl.files import manifest
from earl.run import state
from earl.run.layout import Run
from earl.workers import opening, pool

TICK = os.sysconf("SC_CLK_TCK")


def start_run(config: Config, folder: Path) -> Run:
    """Return a run folder with the configuration and the link to the starting policy."""
    run = Run(folder)
    freeze.write(config, run.config)
    state.start(run, paths.policy_folder(config, config.model_path))
    return run


def stages(config: Config, run: Run, index: int) -> dict[str, list[list[object]]]:
    """Return the commands of an iteration by stage, as the workflow gives them; those of a stage run side by side."""
    here, policy = run.iteration(index), run.iteration(index - 1).policy
    at = ["--config", run.config, "--iteration", index]
    shards = range(config.rollout_shards)
    return {
        "generate": [
            ["generate", *at, "--shard", shard, "--policy", policy, "--out", here.rollouts(shard)] for shard in shards
        ],
        "score": [
            ["score", "--config", run.config, "--rollouts", here.rollouts(shard), "--out", here.scores(shard)]
            for shard in shards
        ],
        "train": [["train", *at, "--run", run.path]],
        "prune": [["prune", "--run", run.path, "--after", index]],
    }


def worker_seconds(folder: str | None) -> float:
    """Return the CPU seconds that the workers of a pool have taken so far."""
    total = 0.0
    for lock in Path(folder).glob("*.worker") if folder else ():
        fields = Path(f"/proc/{lock.read_text().strip()}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICK
    return total


def timed(commands: list[list[object]], folder: str | None) -> tuple[float, float]:
    """Run commands side by side, in a pool's workers or cold; return wall and CPU seconds."""
    environment = {**os.environ, pool.VARIABLE: folder or "", "OMP_NUM_THREADS": "1"}
    before, start = worker_seconds(folder) + os.times().children_user + os.times().children_system, time.monotonic()
    started = [
        subprocess.Popen([sys.executable, "-m", "earl", *map(str, command)], env=environment, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    for command, process in zip(commands, started, strict=True):
        if process.wait():
            raise SystemExit(f"failed: earl {' '.join(map(str, command))}")
    wall = time.monotonic() - start
    return wall, worker_seconds(folder) + os.times().children_user + os.times().children_system - before


def same(first: Run, second: Run) -> int:
    """Return how many files two runs have; stop where one differs, but for those that tell how long things took."""
    files = (path for path in first.path.rglob("*") if path.is_file() and path.name != "performance.json")
    found = sorted(path.relative_to(first.path) for path in files)
    for name in found:
        if manifest.digest_file(first.path / name) != manifest.digest_file(second.path / name):
            raise SystemExit(f"{name} differs")
    return len(found)


def client_seconds(run: Run, folder: str, repeats: int = 9) -> tuple[float, float]:
    """Return the median wall time of a client whose worker has next to nothing to do, and of Python alone."""
    nothing = [timed([["prune", "--run", run.path, "--after", 1]], folder)[0] for _ in range(repeats)]
    python = []
    for _ in range(repeats):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        python.append(time.monotonic() - start)
    return statistics.median(nothing), statistics.median(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="config/demo.jsonnet")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--iterations", type=int, default=4)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="earl-benchmark-"))
    overrides = {"base_exp_dir": str(base), **load.parse_overrides(arguments.set)}
    config = load.load(arguments.experiment, overrides).config
    one_process.make_shared(config)
    processes.end_stages_with_this_process()
    workers = opening.open_pool(idle_seconds=3600).path
    ways = {"cold": (None, start_run(config, base / "cold")), "workers": (workers, start_run(config, base / "workers"))}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for index in range(1, arguments.iterations + 1):
        for way, (folder, run) in ways.items():
            for stage, commands in stages(config, run, index).items():
                taken[way, stage].append(timed(commands, folder))
    print("| stage | cold: wall s | CPU s | workers, first: wall s | CPU s | workers, then: wall s | CPU s |")
    print("|---|---|---|---|---|---|---|")
    totals = [0.0] * 6
    for stage in ("generate", "score", "train", "prune"):
        cold, warm = taken["cold", stage], taken["workers", stage]
        row = [*median(cold), *warm[0], *median(warm[1:])]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        print(f"| {stage} |", " | ".join(f"{value:.2f}" for value in row), "|")
    print("| iteration |", " | ".join(f"{value:.2f}" for value in totals), "|")
    nothing, python = client_seconds(ways["workers"][1], workers)
    print(f"\nclient with nothing to do: {nothing:.3f} s, of them Python's own start {python:.3f} s")
    print(f"{same(ways['cold'][1], ways['workers'][1])} files, equal byte for byte")
    shutil.rmtree(base)


def median(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    walls, processors = zip(*pairs, strict=True)
    return statistics.median(walls), statistics.median(processors)


if __name__ == "__main__":
    main()
