"""A run that is killed again and again, by segment and by stage: is anything lost, and are the final bytes the same?

    PYTHONPATH=. python benchmarks/kills.py --kills 200

Every process of a workflow is ended with SIGKILL at random moments, and the workflow is started again. When a run has
been killed `--per-run` times it is left to end; then every file of its iterations, evaluations and weights is compared
with those of a run that nothing disturbed. Meanwhile no rollout or score file that was there may change: what the
policy and the judge have done is never done again. Half of the kills are by segment, half by stage.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from earl.execution import processes
from earl.files import manifest
from tests.support.demo import SMALL

ROOT = Path(__file__).parents[1]
GRANULARITIES = ("segment", "stage")
SETTINGS = SMALL | {
    "model_path": "package:shapes/base_policy",
    "num_iterations": 6,
    "episodes_per_iteration": 16,
    "rollout_shards": 2,
    "segment_length": 4,
    "segment_checkpoint_every_n_iterations": 2,
}
MARK = "EARL_KILLS"
"""Environment variable by which every process of an attempt is found, whatever session it is in."""
LONGEST = 15.0
"""Seconds after which an attempt is killed at the latest: by stage it is then not much longer than a stage."""
MUST_STAY = ("iterations/*/rollouts/*.parquet", "iterations/*/scores/*.parquet")
MAY_DIFFER = ("start.json", "performance.json", "config.json")
"""Where the starting policy lies, how long things took, and the name of the folder."""


@dataclass
class Tally:
    """What came of the kills of one granularity."""

    kills: int = 0
    runs: int = 0
    same_bytes: int = 0
    files: int = 0
    rewritten: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)


def start(folder: Path, granularity: str) -> subprocess.Popen:
    """Start the workflow of the run in ``folder``, as a user would; its name and base folder are the same for all."""
    overrides = json.dumps([f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()])
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--cores", "2"]
    command += ["--workflow-profile", ROOT / "profiles" / "default"]
    command += ["--config", f"experiment={ROOT / 'config' / 'demo.jsonnet'}", f"granularity={granularity}"]
    command += [f"set={overrides}"]
    inherited = {key: value for key, value in os.environ.items() if key != processes.WATCHED}
    with (folder / "output.txt").open("a") as stream:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=inherited | {"PYTHONPATH": str(ROOT), MARK: str(folder)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(folder: Path, leader: subprocess.Popen) -> None:
    """End every process of the attempt at once, without a warning."""
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()
    while left := processes_of(folder):
        for process in left:
            process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the live processes of an attempt, whatever session they are in."""
    return [process for process in psutil.process_iter() if _mark(process) == str(folder)]


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def contents(run: Path) -> dict[str, str]:
    """Digest of every file of iterations and evaluations, links not followed; of checkpoints, of the last one alone.

    A segment that has caught up with an earlier one writes a checkpoint where an undisturbed one has none.
    """
    last = max(run.glob("iterations/*"))
    checkpoints = [path for path in run.glob("iterations/*/*") if path.name in ("policy", "trainer")]
    left_out = [path for path in checkpoints if path.parent != last]
    files = [path for kind in ("iterations", "evaluations") for path in (run / kind).rglob("*")]
    kept = [path for path in files if path.is_file() and path.name not in MAY_DIFFER]
    kept = [path for path in kept if not any(path.is_relative_to(folder) for folder in left_out)]
    return {path.relative_to(run).as_posix(): manifest.digest_file(path) for path in kept}


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file that must not be made twice."""
    found = {}
    for path in (path for pattern in MUST_STAY for path in run.glob(pattern)):
        status = path.stat()
        found[path.relative_to(run).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def finish(folder: Path, granularity: str) -> float:
    """Run the workflow to its end; return the seconds that it took."""
    began = time.monotonic()
    if start(folder, granularity).wait():
        sys.exit(f"{granularity}: the workflow failed\n{(folder / 'output.txt').read_text()[-4000:]}")
    return time.monotonic() - began


def disturb(folder: Path, granularity: str, kills: int, longest: float, rng: random.Random, tally: Tally) -> int:
    """Kill a run up to ``kills`` times; fewer where it has ended before."""
    run, known, done = folder / "runs" / "killed", {}, 0
    while done < kills:
        leader = start(folder, granularity)
        try:
            leader.wait(timeout=rng.uniform(0.2, longest))
            break
        except subprocess.TimeoutExpired:
            kill(folder, leader)
            done += 1
        now = stamps(run)
        tally.rewritten |= {name for name in known if now.get(name) != known[name]}
        known = now
    tally.kills += done
    return done


def measure(base: Path, granularity: str, kills: int, per_run: int, rng: random.Random) -> Tally:
    """Kill runs of one granularity until ``kills`` is reached, and compare each with an undisturbed one."""
    tally = Tally()
    plain = base / f"{granularity}-plain"
    plain.mkdir()
    longest = finish(plain, granularity)
    expected = contents(plain / "runs" / "killed")
    tally.files = len(expected)
    while tally.kills < kills:
        folder = base / f"{granularity}-{tally.runs:03d}"
        folder.mkdir()
        disturb(folder, granularity, min(per_run, kills - tally.kills), min(longest / 2, LONGEST), rng, tally)
        tally.seconds.append(finish(folder, granularity))
        tally.runs += 1
        found = contents(folder / "runs" / "killed")
        tally.same_bytes += found == expected
        for name in sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            print(f"{granularity}, run {tally.runs}: {name} differs", file=sys.stderr, flush=True)
        print(f"{granularity}: {tally.kills} kills, {tally.same_bytes} of {tally.runs} runs equal", file=sys.stderr)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--granularity", choices=GRANULARITIES, nargs="+", default=GRANULARITIES)
    options = parser.parse_args()
    SETTINGS.update(run_name="killed", base_exp_dir="runs")
    print("| granularity | kills | runs | ended in the bytes of an undisturbed one | rollouts or scores made twice |")
    print("|---|---|---|---|---|")
    for granularity in options.granularity:
        rng = random.Random(f"{options.seed} {granularity}")
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), granularity, options.kills // len(options.granularity), options.per_run, rng)
        same = f"{found.same_bytes} of {found.runs} ({found.files} files each)"
        print(f"| {granularity} | {found.kills} | {found.runs} | {same} | {len(found.rewritten)} |", flush=True)


if __name__ == "__main__":
    main()
