"""Several ranks: real processes on the CPU, against one process."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from earl.execution import ranks
from earl.execution.ranks import Ranks
from earl.files import manifest
from earl.learner import batches
from earl.stages import restore, train
from tests.support import forked, forked_ranks, ranks_program
from tests.support.forked import Forked
from tests.support.train_files import made_of, write_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "size"), [(1, 4), (5, 2), (8, 4), (9, 4), (3, 1)])
def test_rounds_give_every_batch_once_and_every_rank_as_many(count, size):
    shares = [list(ranks.rounds(range(count), Ranks(rank, size, CPU))) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(count))


def test_episodes_are_cut_so_that_no_rank_goes_without(vocabulary):
    episodes = ranks_program.episodes(vocabulary)
    settings = ranks_program.settings(vocabulary, micro_batch=8)
    for size, lengths in ((1, [8, 2]), (2, [5, 5]), (4, [3, 3, 3, 1])):
        assert [len(part) for part in batches.cut_episodes(episodes, settings, size)] == lengths
    nothing_counts = [episode for episode in episodes if episode.forced.all()]
    assert len(nothing_counts) == 1
    assert batches.cut_episodes(nothing_counts, settings, 2) == []


# Steps in memory


@pytest.mark.slow
def test_ranks_change_the_step_by_rounding_alone(policy_folder, tmp_path):
    """Loss, gradient norm and every other metric, and the weights after one and after two steps."""
    alone, together = tmp_path / "alone", tmp_path / "three"
    for folder in (alone, together):
        folder.mkdir()
    # Not in this process, in which vLLM may have opened a process group; models are split for bfloat16 alone.
    done = forked.run(ranks_program.__name__, policy_folder, alone)
    assert done.returncode == 0, done.stdout
    forked_ranks.launch(3, ranks_program.__name__, policy_folder, together)
    start = load_file(policy_folder / "model.safetensors")
    for case in ranks_program.CASES:
        expected, found = (_known(out / f"{case}.json") for out in (alone, together))
        tolerance = 1e-2 if "bfloat16" in case else 1e-5
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6), case
        if "bfloat16" not in case:
            weights, others = (load_file(out / case / "model.safetensors") for out in (alone, together))
            moved = sum((weights[name] - start[name].float()).square().sum() for name in weights).sqrt()
            apart = sum((weights[name] - others[name]).square().sum() for name in weights).sqrt()
            assert apart < 1e-4 * moved, case


def _known(path: Path) -> dict[str, float]:
    """Known metrics, but for the one that compares halves: what is in a half depends on the number of ranks."""
    metrics = json.loads(path.read_text())
    return {name: value for name, value in metrics.items() if value is not None and name != "gradient_cosine"}


# The stage, as a command


def train_by(processes: int, run, iteration: int) -> None:
    """Train an iteration by so many ranks, as where torchrun starts them by hand."""
    stage = ["train", "--config", run.config, "--iteration", iteration, "--run", run.path]
    said = forked_ranks.launch(processes, "earl", *stage)
    assert f"loaded iteration {iteration - 1}" in said


def update_of(run, iteration: int) -> torch.Tensor:
    after, before = (load_file(run.iteration(i).policy / "model.safetensors") for i in (iteration, 0))
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in sorted(after)])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(new_run, vocabulary, monkeypatch):
    """1 -> 2 -> 3 -> 1 against one process all along; then one is restored, by as many as then."""
    config, run = new_run(train_processes=2, learning_rate=1e-4)
    _, other = new_run("other", learning_rate=1e-4)
    numbers = {1: 1, 2: 2, 3: 3, 4: 1}
    for iteration, processes in numbers.items():
        for each in (run, other):
            write_inputs(each, iteration, vocabulary)
        train.run(config, other.path, iteration)
        if processes == 1:
            train.run(config, run.path, iteration)
        elif processes == config.train_processes:
            done = forked.run("earl", "train", "--config", run.config, "--iteration", iteration, "--run", run.path)
            assert done.returncode == 0, done.stdout
        else:
            train_by(processes, run, iteration)
        manifest.check(run.iteration(iteration).trainer, deep=True)
        parts = sorted(path.name for path in run.iteration(iteration).trainer.glob("*.safetensors"))
        assert parts == [f"optimizer-{i:05d}-of-{processes:05d}.safetensors" for i in range(1, processes + 1)]
        assert json.loads(run.iteration(iteration).metrics.read_text())["ranks"] == processes
        performance = json.loads(run.iteration(iteration).performance.read_text())
        assert len(performance["peak_memory_bytes"]) == processes
    found, alone = update_of(run, 4), update_of(other, 4)
    assert (found - alone).norm() < 1e-3 * alone.norm()

    expected = made_of(run, 2)
    shutil.rmtree(run.iteration(2).policy)
    shutil.rmtree(run.iteration(2).trainer)
    monkeypatch.setenv("PYTHON_EXEC", str(forked.python("earl")))  # What torchrun starts ranks with.
    restore.run(run.path, 2)
    assert made_of(run, 2) == expected


def stop(run, iteration: int = 1) -> str:
    """Train by two ranks, which must fail and say one thing; return what they say."""
    stage = "train", "--config", run.config, "--iteration", iteration, "--run", run.path
    done = forked.run("earl", *stage, PYTHON_EXEC=forked.python("earl"))
    assert done.returncode not in (0, None)
    assert done.stdout.count("error: ") == 1
    assert "Traceback" not in done.stdout
    assert sorted(path.name for path in run.iteration(iteration).path.iterdir()) == ["rollouts", "scores"]
    return done.stdout


@pytest.mark.slow
def test_what_all_ranks_meet_is_said_once(new_run, vocabulary):
    _, run = new_run(train_processes=2, parity_tolerance=0.1)
    write_inputs(run, 1, vocabulary)
    assert "more than parity_tolerance = 0.1; no step was done" in stop(run)


@pytest.mark.slow
def test_what_one_rank_meets_ends_all(new_run, vocabulary, policy_folder, tmp_path):
    """Of weights that nobody sealed each rank looks at its own part: here it is the second that finds something."""
    _, run = new_run(train_processes=2)
    broken = shutil.copytree(policy_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][-1, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / manifest.NAME).unlink()
    run.iteration(0).policy.unlink()
    run.iteration(0).policy.symlink_to(broken)
    write_inputs(run, 1, vocabulary)
    assert "weight 'lm_head.weight' is not finite" in stop(run)


@pytest.mark.slow
def test_a_killed_rank_ends_all(new_run, vocabulary):
    _, run = new_run(train_processes=2)
    write_inputs(run, 1, vocabulary)
    process = Forked("earl", ["train", "--config", run.config, "--iteration", 1, "--run", run.path])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(found := children.read_text().split()) < 2:
        time.sleep(0.05)
    os.kill(int(found[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "of 2 was ended by SIGKILL" in said
