"""The reference of the KL term that is refreshed: by stage, in memory, restored, replayed, verified, planned."""

import json
import shutil

import pytest
import torch

from earl.config import load
from earl.emu3 import checkpoint
from earl.execution import ranks
from earl.files import manifest
from earl.files.layout import Run
from earl.learner import sharding
from earl.messages.errors import EarlError
from earl.run import plan, state, verify
from earl.stages import iterate, replay, restore, train
from tests.support import bare_loop, forked_ranks
from tests.support.segment_runs import assert_same, begin, command, configure, contents
from tests.support.train_files import made_of, train_iterations

CPU = torch.device("cpu")
EVERY_SECOND = {"reference_refresh_iterations": 2, "learning_rate": 1e-3}


def metrics(run: Run, index: int) -> dict:
    return json.loads(run.iteration(index).metrics.read_text())


def drop(run: Run, *iterations: int) -> None:
    for index in iterations:
        shutil.rmtree(run.iteration(index).policy)
        shutil.rmtree(run.iteration(index).trainer)


@pytest.mark.parametrize(
    ("every", "expected"),
    [(None, [0, 0, 0, 0, 0, 0]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 2, 2, 4, 4]), (4, [0, 0, 0, 0, 4, 4])],
)
def test_the_reference_is_the_newest_multiple_before(every, expected):
    assert [state.reference_of(index, every) for index in range(1, 7)] == expected


def test_the_first_iteration_with_a_new_reference_has_no_kl(new_run, vocabulary):
    config, run = new_run(**EVERY_SECOND)
    train_iterations(config, run, vocabulary, 5)
    digests = [manifest.digest_folder(run.iteration(index).policy) for index in range(6)]
    references = [metrics(run, index)["inputs"]["reference"] for index in range(1, 6)]
    assert references == [digests[i] for i in (0, 0, 2, 2, 4)]
    kl = [metrics(run, index)["kl"] for index in range(1, 6)]
    assert kl[0::2] == pytest.approx([0, 0, 0], abs=1e-9)
    assert min(kl[1::2]) > 1e-6


@pytest.mark.parametrize(
    "types",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "policy_dtype": "bfloat16"}, {"reference_offload": True}],
    ids=["float32", "bfloat16", "rounded policies", "offloaded"],
)
def test_a_reference_replaced_in_memory_is_the_one_that_is_loaded(new_run, vocabulary, types):
    config, run = new_run(**EVERY_SECOND, **types)
    _, other = new_run("other", **EVERY_SECOND, **types)
    train_iterations(config, run, vocabulary, 3)
    for index in range(1, 4):
        for kind in ("rollouts", "scores"):
            shutil.copytree(run.iteration(index).path / kind, other.iteration(index).path / kind)
    with ranks.joined(CPU, train.splits_alone(config)) as team:
        learner = train.load(config, other, 0, team)
        frozen = next(learner.reference.parameters()).dtype
        for index in range(1, 4):
            train.step(config, other, learner, team, checkpoint=index == 3)
        assert next(learner.reference.parameters()).dtype == frozen
        assert not next(learner.reference.parameters()).requires_grad
    assert made_of(other, 3) == made_of(run, 3)
    assert metrics(other, 3)["inputs"]["reference"] == metrics(run, 3)["inputs"]["reference"]


def test_weights_of_unlike_models_are_not_copied(policy_folder):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"weight is not"):
        sharding.copy_weights(policy.model.layers[0], policy)


def test_a_missing_reference_is_named_and_comes_back(new_run, vocabulary):
    config, run = new_run(**EVERY_SECOND)
    train_iterations(config, run, vocabulary, 4)
    before = made_of(run, 4)
    drop(run, 2)
    with pytest.raises(
        EarlError, match=r"000002/policy: is missing, but .* reference of iteration 4; .*earl restore .*--iteration 2"
    ):
        train.run(config, run.path, 4)
    restore.run(run.path, 2)
    train.run(config, run.path, 4)
    assert made_of(run, 4) == before


@pytest.mark.slow
def test_restore_starts_where_the_reference_is_there_too(new_run, vocabulary):
    """Of 5, the reference is 4; of 3 and 4 it is 2, so that 3 alone is nothing to start from."""
    config, run = new_run(**EVERY_SECOND)
    train_iterations(config, run, vocabulary, 5)
    before = made_of(run, 5)
    for number, gone in enumerate([(1, 2, 3, 4, 5), (2, 4, 5), (2, 3, 5)]):
        shutil.copytree(run.path, run.path.with_name(f"copy{number}"), symlinks=True)
        copy = Run(run.path.with_name(f"copy{number}"))
        drop(copy, *gone)
        restore.run(copy.path, 5)
        assert made_of(copy, 5) == before, gone
        assert [i for i in gone if copy.iteration(i).policy.exists()] == [5]


def test_verify_looks_at_the_reference(new_run, vocabulary):
    config, run = new_run(**EVERY_SECOND)
    train_iterations(config, run, vocabulary, 4)
    state.start_record(run.iteration(0)).write_text(
        json.dumps({"policy_digest": manifest.digest_folder(run.iteration(0).policy), "policy": "unused"})
    )

    def problems() -> list[str]:
        return [item.problem for item in verify.verify(run).problems if item.file.endswith("metrics.json")]

    assert problems() == []
    path, found = run.iteration(4).metrics, metrics(run, 4)
    found["inputs"]["reference"] = metrics(run, 2)["inputs"]["reference"]
    path.write_text(json.dumps(found))
    [problem] = problems()
    assert problem.startswith("was trained with reference")
    assert manifest.digest_folder(run.iteration(2).policy)[:12] in problem


RARE = {
    "reference_refresh_iterations": 2,
    "segment_checkpoint_every_n_iterations": 10,
    "save_checkpoints_every_n_iterations": None,
    "keep_checkpoints_every_n_iterations": None,
    "learning_rate": 1e-3,
    "evaluations": {},
}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> Run:
    return bare_loop.run_all(configure(tmp_path_factory.mktemp("by-stage"), **RARE))


@pytest.mark.slow
def test_a_segment_writes_the_references_and_the_bytes_of_the_stages(tmp_path, by_stage):
    run = begin(tmp_path / "whole", by_stage, **RARE)
    iterate.run(load.read(run.config), run.path, 4)
    assert_same(run, by_stage, checkpoints=(2, 4))
    assert verify.verify(run, deep=True).problems == []


@pytest.mark.slow
def test_a_segment_resumes_with_the_reference_of_then(tmp_path, by_stage):
    run = begin(tmp_path / "stopped", by_stage, **RARE)
    config = load.read(run.config)
    iterate.run(config, run.path, 3)
    assert [i for i in range(1, 4) if run.iteration(i).policy.is_dir()] == [2, 3]
    drop(run, 2)
    for look in (lambda: plan.plan(config), lambda: iterate.run(config, run.path, 4)):
        with pytest.raises(EarlError, match=r"000002/policy: is missing, .*reference of iteration 4"):
            look()
    plan.plan(config, by_segment=False)  # where the rule restores it
    restore.run(run.path, 2)
    iterate.run(config, run.path, 4)
    assert_same(run, by_stage, checkpoints=(2, 3, 4))


@pytest.mark.slow
def test_a_replay_has_references_of_its_own(tmp_path, by_stage):
    """Over the same iterations, so that it ends in the same policy, also when it is stopped and continued."""
    found = replay.run(by_stage.path, tmp_path / "replay", {"num_iterations": 3})
    assert metrics(found.run, 3)["policy_digest"] == metrics(by_stage, 3)["policy_digest"]
    assert [i for i in range(1, 4) if found.run.iteration(i).policy.is_dir()] == [2, 3]
    replay.run(by_stage.path, tmp_path / "replay", {"num_iterations": 4})
    assert metrics(found.run, 4)["policy_digest"] == metrics(by_stage, 4)["policy_digest"]
    never = replay.run(by_stage.path, tmp_path / "never", {"reference_refresh_iterations": None})
    assert metrics(never.run, 4)["policy_digest"] != metrics(by_stage, 4)["policy_digest"]


@pytest.mark.slow
def test_ranks_replace_their_parts_of_the_reference(tmp_path, by_stage):
    """Two ranks in bfloat16, in one segment, and in a second one that loads the reference from its folder."""
    fields = RARE | {"train_processes": 2, "segment_processes": 2, "dtype": "bfloat16", "parity_tolerance": None}
    whole = begin(tmp_path / "whole", by_stage, **fields | {"segment_checkpoint_every_n_iterations": 2})
    forked_ranks.launch(2, "earl", *command(whole, 3))
    before = contents(whole)
    assert state.rewind(whole, 3) == [3]
    assert contents(whole) != before
    forked_ranks.launch(2, "earl", *command(whole, 3))
    assert contents(whole) == before
    assert metrics(whole, 3)["ranks"] == 2
    assert metrics(whole, 3)["inputs"]["reference"] == metrics(whole, 2)["policy_digest"]
