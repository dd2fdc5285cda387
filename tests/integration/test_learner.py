"""The learner in memory: many steps of one program leave the files that one stage an iteration leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from earl.emu3 import saving
from earl.execution import ranks, runtime
from earl.files import manifest
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.stages import train
from tests.support import first_ranks_program, forked_ranks
from tests.support.train_files import train_iterations, write_inputs

ITERATIONS = 3


def take_inputs(source: Run, run: Run, iterations: int = ITERATIONS) -> None:
    """Give a run the rollouts and scores of another one."""
    for index in range(1, iterations + 1):
        run.iteration(index).path.mkdir()
        for name in ("rollouts", "scores"):
            (run.iteration(index).path / name).symlink_to(source.iteration(index).path / name)


def all_alike(row: dict) -> None:
    """Give an episode the score that all others have."""
    row |= dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts"), 5.0)


def record(run: Run, index: int) -> tuple[bytes, bytes]:
    return run.iteration(index).metrics.read_bytes(), run.iteration(index).episodes.read_bytes()


def checkpoint(run: Run, index: int) -> list[str]:
    current = run.iteration(index)
    for folder in (current.policy, current.trainer):
        manifest.check(folder, deep=True)
    return [manifest.digest_folder(folder) for folder in (current.policy, current.trainer)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_coeff": 0.0, "optimizer_steps_per_iteration": 2, "importance_ratio": "behavior"},
        {"dtype": "bfloat16", "policy_dtype": "bfloat16", "learning_rate": 1e-3},
        {"zero_variance_groups": "mask"},
    ],
    ids=["float32", "two steps", "bfloat16", "no step in the first"],
)
def test_steps_in_memory_leave_the_bytes_of_a_stage_an_iteration(new_run, vocabulary, monkeypatch, changes):
    monkeypatch.setattr(saving, "FILE_SIZE", 300_000)
    config, staged = new_run("run", **changes)
    for index in range(1, ITERATIONS + 1):
        masked = index == 1 and "zero_variance_groups" in changes
        write_inputs(staged, index, vocabulary, edit=all_alike if masked else lambda row: None)
        train.run(config, staged.path, index)
    _, kept = new_run("kept", **changes)
    take_inputs(staged, kept)
    with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as team:
        learner = train.load(config, kept, 0, team)
        for index in range(1, ITERATIONS + 1):
            metrics = train.step(config, kept, learner, team, checkpoint=index == 2)
            assert record(kept, index) == record(staged, index)
            assert metrics == json.loads(kept.iteration(index).metrics.read_text())
            assert learner.policy_digest == manifest.digest_folder(staged.iteration(index).policy)
            assert kept.iteration(index).policy.exists() == kept.iteration(index).trainer.exists() == (index == 2)
        train.write_checkpoint(config, kept, learner, team)
        for dtype in (torch.float32, torch.bfloat16):
            found = dict(learner.weights(dtype))
            assert {weight.dtype for weight in found.values()} == {dtype}
        stored = {}
        for path in kept.iteration(ITERATIONS).policy.glob("*.safetensors"):
            stored |= load_file(path)
        weights = dict(learner.weights(runtime.dtype(config.policy_dtype)))
        assert stored.keys() == weights.keys()
        assert all(torch.equal(weight, stored[name]) for name, weight in weights.items())
    for index in (2, 3):
        assert checkpoint(kept, index) == checkpoint(staged, index)


def test_the_learner_loads_from_any_checkpoint_and_goes_on(new_run, vocabulary):
    """By stage, then in memory from its checkpoint, then by stage again; no policy is there between."""
    config, staged = new_run()
    train_iterations(config, staged, vocabulary, ITERATIONS)
    expected = [record(staged, index) for index in range(1, ITERATIONS + 1)], checkpoint(staged, 3)
    _, mixed = new_run("mixed")
    take_inputs(staged, mixed)
    train.run(config, mixed.path, 1)
    team = ranks.alone(runtime.prepare(config))
    learner = train.load(config, mixed, 1, team)
    assert (learner.iteration, learner.optimizer_steps) == (1, 1)
    assert learner.reference_digest == manifest.digest_folder(mixed.iteration(0).policy)
    train.step(config, mixed, learner, team, checkpoint=False)
    train.write_checkpoint(config, mixed, learner, team)
    train.run(config, mixed.path, 3)
    assert ([record(mixed, index) for index in range(1, ITERATIONS + 1)], checkpoint(mixed, 3)) == expected


def test_a_step_reads_the_rollouts_of_the_policy_in_memory_alone(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    team = ranks.alone(runtime.prepare(config))
    learner = train.load(config, run, 0, team)
    learner.iteration = 1  # whose rollouts another policy sampled
    with pytest.raises(EarlError, match=r"000002/rollouts/0000\.parquet: policy_digest"):
        train.step(config, run, learner, team, checkpoint=False)
    assert run.iteration(2).metrics.is_file(), "nothing has been touched"


def test_what_is_left_of_another_attempt_is_not_taken_for_the_checkpoint(new_run, vocabulary):
    """An attempt that was killed before its metrics leaves folders whose digest nobody recorded."""
    config, run = new_run()
    train_iterations(config, run, vocabulary, 1)
    run.iteration(1).metrics.unlink()
    team = ranks.alone(runtime.prepare(config))
    train.step(config, run, train.load(config, run, 0, team), team, checkpoint=False)
    assert sorted(path.name for path in run.iteration(1).path.iterdir()) == ["rollouts", "scores", "train"]


# Of all ranks of a program, the first ones


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "last", "changes"),
    [(1, 2, {}), (2, 1, {"dtype": "bfloat16", "policy_dtype": "bfloat16"})],
    ids=["one", "two in bfloat16"],
)
def test_the_first_ranks_of_three_train_as_so_many_by_stage(new_run, vocabulary, count, last, changes):
    config, staged = new_run("run", train_processes=count, **changes)
    for index in range(1, last + 1):
        write_inputs(staged, index, vocabulary)
        if count == 1:
            train.run(config, staged.path, index)
        else:
            stage = ["train", "--config", staged.config, "--iteration", index, "--run", staged.path]
            forked_ranks.launch(count, "earl", *stage)
    _, kept = new_run("kept", train_processes=count, **changes)
    take_inputs(staged, kept, last)
    ranks_program = first_ranks_program.__name__, count, staged.config, kept.path, last
    said = forked_ranks.launch(3, *ranks_program).splitlines()
    told = [line.removeprefix("> ") for line in said if line.startswith("> ")]
    *team, total_and_digest = {line.partition(": ")[2] for line in told[:count]}
    assert team == [], "every rank had the same whole weights, and knew the digest"
    assert [line.partition(":")[0] for line in told[:count]] == [f"{rank} of {count}" for rank in range(count)]
    assert told[count:] == ["waits"] * (3 - count)
    for index in range(1, last + 1):
        assert record(kept, index) == record(staged, index)
    assert checkpoint(kept, last) == checkpoint(staged, last)
    assert json.loads(record(kept, 1)[0])["ranks"] == count

    several = kept.path / "several"
    manifest.check(several, deep=True)
    assert total_and_digest.split()[1] == manifest.digest_folder(several)
    assert len(list(several.glob("model-*-of-*.safetensors"))) > 3
    weights, found = {}, {}
    for folder, into in ((several, found), (staged.iteration(last).policy, weights)):
        for path in folder.glob("*.safetensors"):
            into |= load_file(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in weights.items())
