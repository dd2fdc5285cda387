"""The demo through the real workflow: killed in each phase, it ends in the bytes of an undisturbed run by stage."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import kills
from earl.config import load
from earl.execution import processes
from earl.files.layout import Run
from earl.run import state
from tests.support import bare_loop
from tests.support.demo import DEMO, SHORT
from tests.support.workplace import wait_until

SEED = 20261126
MOMENTS = {
    # In the fine-tuning, and in the training.
    "stage": ("shared/logs/sft/*.log", "killed/logs/train/000001.log"),
    # Between sampling and training, and between two iterations.
    "segment": ("killed/iterations/000001/rollouts/0000.parquet", "killed/iterations/000001/train/metrics.json"),
}
"""Files below the base folder that appear shortly before each kill: by stage, logs of what begins then."""
SETTINGS = SHORT | {
    "run_name": "killed",
    # One data set for all: fewer stages that show the same.
    "train_paths_file": ["stage:tokenise/shapes_sft"],
    "val_paths_file": ["stage:tokenise/shapes_sft"],
    # The last two checkpoints stay by stage, and so they do by segment.
    "segment_checkpoint_every_n_iterations": 1,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    config = load.load(DEMO, SETTINGS | {"base_exp_dir": str(tmp_path_factory.mktemp("undisturbed"))}).config
    run = bare_loop.run_all(config)
    state.prune(run, state.Retention.of(config))
    return run


def kill_the_leader(place: Path, leader: subprocess.Popen) -> None:
    """Kill the workflow's main process alone: its stages end with it."""
    leader.kill()
    leader.wait()
    wait_until(lambda: not kills.processes_of(place))


@pytest.mark.slow
@pytest.mark.parametrize("granularity", kills.GRANULARITIES)
def test_killed_again_and_again_it_ends_in_the_bytes_of_an_undisturbed_run(
    tmp_path, undisturbed, granularity, monkeypatch
):
    monkeypatch.setattr(kills, "SETTINGS", SETTINGS | {"base_exp_dir": "runs"})
    base, run, chance = tmp_path / "runs", tmp_path / "runs" / "killed", random.Random(f"{SEED} {granularity}")
    made: dict[str, tuple[int, int]] = {}
    for moment, kill in zip(MOMENTS[granularity], (kills.kill, kill_the_leader), strict=True):
        leader = kills.start(tmp_path, granularity)
        while not list(base.glob(moment)):
            assert leader.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.02)
        time.sleep(2 * chance.random())
        kill(tmp_path, leader)
        assert made.items() <= kills.stamps(run).items(), "what was sampled and judged stays"
        made = kills.stamps(run)
    kills.finish(tmp_path, granularity)
    assert made.items() <= kills.stamps(run).items()
    assert kills.contents(run) == kills.contents(undisturbed.path)
    assert "no problems" in (run / "logs" / "verify.log").read_text()
    assert Run(run).report.stat().st_size > 10_000
    assert_nothing_is_left_behind(tmp_path)


def assert_nothing_is_left_behind(place: Path) -> None:
    leftovers = [p for p in place.rglob("*") if ".tmp-" in p.name or ".old-" in p.name or p.name.endswith(".partial")]
    assert leftovers == []
    for path in place.rglob("*.lock"):
        processes.lock(path, patience=0).close()  # nobody holds it
    assert list((place / ".snakemake" / "locks").glob("*")) == []
