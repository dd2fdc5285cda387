"""What an experiment takes of a node: the published policy has 8,492,011,520 weights."""

import pytest

from earl.config import load
from earl.doctor import needs
from earl.estimate import fit
from tests.support.demo import ROOT
from tests.support.evaluation_files import demo_config

WEIGHTS = 8_492_011_520
CHECKPOINT = 12 * WEIGHTS
"""Float32 weights and Adam's two moments."""


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Return what one of the paper's experiments needs, with some fields changed."""
    places = {"DATA_DIR": "data", "BASE_EXP_DIR": str(tmp_path), "RUN_NAME": "x"}
    for name, value in (places | {"REWARD_FUNCTION_API_BASE": "http://judge:1"}).items():
        monkeypatch.setenv(f"APP__{name}", value)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)

    def of(by_segment=True, **changes):
        return needs.of(load.load(ROOT / "config" / "sft_s__rl_s.jsonnet", changes).config, by_segment=by_segment)

    return of


def test_a_segment_keeps_engines_in_main_memory_while_it_trains(published):
    wanted = published(train_processes=4, segment_processes=8)
    checkpoint = 4 * WEIGHTS
    assert wanted.memory.size == 8 * needs.PROCESS + checkpoint + 8 * 2 * WEIGHTS
    assert "engines asleep, 135.9 GB" in wanted.memory.what
    assert published(by_segment=False, train_processes=4).memory.size == 4 * needs.PROCESS + checkpoint
    offloaded = published(by_segment=False, train_processes=4, reference_offload=True)
    assert offloaded.memory.size == 4 * needs.PROCESS + checkpoint + 2 * WEIGHTS


def test_nodes_share_the_ranks(published, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    wanted = published(train_processes=16)
    assert wanted.memory.size == 8 * needs.PROCESS + 4 * WEIGHTS + 8 * 2 * WEIGHTS
    assert wanted.splits_gpus
    assert not published(train_processes=2).splits_gpus, "a rank a node"


def test_a_run_needs_disk_for_what_it_has_not_written(published, tmp_path):
    before = published()
    assert before.disk.size > 20 * CHECKPOINT, "one of every hundred of 2,000 iterations"
    assert "checkpoints of 101.9 GB" in before.disk.what
    (tmp_path / "x" / "iterations").mkdir(parents=True)
    (tmp_path / "x" / "iterations" / "weights").write_bytes(b"x" * 1000)
    assert published().disk.size == before.disk.size - 1000


def test_the_judge_and_the_folder_are_the_experiments(published, tmp_path):
    wanted = published()
    assert (wanted.path, wanted.judge, wanted.gpus) == (tmp_path, "http://judge:1", 1)
    demo = needs.of(demo_config())
    assert (demo.judge, demo.gpus, demo.splits_gpus) == (None, None, False)
    assert demo.memory.size < 10e9


def test_stages_are_compared_with_the_gpus_that_are_there(published, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    asked = []

    def check(config, by_segment, gpus_of):
        asked.append((config.train_processes, by_segment, gpus_of("train")))
        return [fit.Problem("train", "train_processes", "= 1: is too few")]

    monkeypatch.setattr(fit, "check", check)
    misfits = published(by_segment=False, train_processes=1).misfits
    assert misfits("H100", 85_000_000_000, 4) == ["train: train_processes = 1: is too few"]
    [(processes, by_segment, gpus)] = asked
    assert (processes, by_segment, gpus.count, gpus.nodes) == (1, False, 4, 2)
    assert (gpus.gpu.name, gpus.gpu.memory) == ("H100", 85_000_000_000)
