"""Runs that train an adapter: by stage, by segment, restored, moved, verified; what they refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from earl.config import load
from earl.config.schema import Config
from earl.emu3 import adapter, checkpoint
from earl.execution import ranks
from earl.files import manifest
from earl.files.layout import Run
from earl.learner import grpo, sharding
from earl.messages.errors import EarlError
from earl.run import preflight, state, verify
from earl.stages import iterate, restore, train
from tests.support import adapters, bare_loop
from tests.support.segment_runs import assert_same, begin, configure
from tests.support.train_files import made_of, make_config, train_iterations, write_inputs

LORA = {"rank": 4}
SHORT = {"lora": LORA, "learning_rate": 3e-3, "num_iterations": 2, "random_seed": 3, "evaluations": {}}
ALONE = ranks.alone(torch.device("cpu"))


@pytest.fixture
def lora_run(new_run):
    return lambda name="run", **changes: new_run(name, lora=LORA, learning_rate=1e-3, **changes)


def metrics(run: Run, index: int) -> dict:
    return json.loads(run.iteration(index).metrics.read_text())


# The train stage


def test_the_base_stays_and_only_the_adapter_is_trained_and_kept(lora_run, vocabulary, policy_folder):
    config, run = lora_run()
    start = manifest.digest_folder(run.iteration(0).policy)
    train_iterations(config, run, vocabulary, 2)
    assert manifest.digest_folder(run.iteration(0).policy) == start
    first, second = (load_file(run.iteration(i).policy / adapter.WEIGHTS) for i in (1, 2))
    assert all(weight.any() for name, weight in first.items() if ".lora_B." in name)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert sum(path.stat().st_size for path in run.iteration(2).policy.glob("*.safetensors")) < 200_000
    [moments] = (load_file(path) for path in run.iteration(2).trainer.glob("*.safetensors"))
    assert sum(x.numel() for x in moments.values()) == 2 * sum(x.numel() for x in second.values())
    assert json.loads((run.iteration(2).policy / adapter.BASE).read_text()) == {
        "path": "../../000000/policy",
        "policy_digest": start,
    }


def test_the_reference_is_the_policy_without_its_adapter(lora_run, vocabulary):
    """KL to the start: 0 before the first step, and after it what a policy and a reference of full weights have."""
    config, run = lora_run()
    train_iterations(config, run, vocabulary, 2)
    assert metrics(run, 1)["kl"] == 0
    learner = train.load(config, run, 1, ALONE)
    assert learner.reference is learner.policy
    assert learner.reference_digest == manifest.digest_folder(run.iteration(0).policy)
    found = metrics(run, 2)
    reference = sharding.load(run.iteration(0).policy, ALONE, False, frozen=True)
    batch = train._read(config, run, 2, 1, learner.policy_digest, learner.vocabulary, ALONE)
    expected = grpo.train_iteration(learner.policy, reference, learner.optimizer, batch.used, batch.settings)
    assert found["kl"] > 1e-6
    assert {name: found[name] for name in ("loss", "kl", "kl_k1", "gradient_norm")} == {
        name: expected[name] for name in ("loss", "kl", "kl_k1", "gradient_norm")
    }


def test_a_learner_in_memory_writes_the_bytes_of_one_that_is_loaded_each_time(lora_run, vocabulary):
    config, run = lora_run()
    _, other = lora_run("other")
    train_iterations(config, run, vocabulary, 3)
    learner = None
    for index in (1, 2, 3):
        shutil.copytree(run.iteration(index).path / "rollouts", other.iteration(index).path / "rollouts")
        shutil.copytree(run.iteration(index).path / "scores", other.iteration(index).path / "scores")
        learner = learner or train.load(config, other, 0, ALONE)
        train.step(config, other, learner, ALONE, checkpoint=index == 3)
    assert made_of(other, 3) == made_of(run, 3)
    assert not other.iteration(2).policy.exists()


@pytest.mark.parametrize("policy_dtype", ["float32", "bfloat16"])
def test_in_bfloat16_the_base_is_held_in_it_and_the_adapter_is_not(lora_run, vocabulary, policy_dtype):
    config, run = lora_run(dtype="bfloat16", policy_dtype=policy_dtype)
    train_iterations(config, run, vocabulary, 2)
    with ranks.joined(torch.device("cpu"), splits_alone=True) as team:
        learner = train.load(config, run, 1, team)
        assert {weight.dtype for weight in adapter.base_weights(learner.policy).values()} == {torch.bfloat16}
        assert {weight.dtype for weight in adapter.weights(learner.policy).values()} == {torch.float32}
    stored = load_file(run.iteration(2).policy / adapter.WEIGHTS)
    assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{policy_dtype}"}
    again = made_of(run, 2)
    train.run(config, run.path, 2)
    assert made_of(run, 2) == again


def test_a_checkpoint_comes_back(lora_run, vocabulary):
    config, run = lora_run()
    train_iterations(config, run, vocabulary, 3)
    before = made_of(run, 2)
    for folder in (run.iteration(i).path / name for i in (1, 2) for name in ("policy", "trainer")):
        shutil.rmtree(folder)
    restore.run(run.path, 2)
    assert made_of(run, 2) == before
    checkpoint.check_policy(run.iteration(2).policy)


def test_a_run_can_be_moved(lora_run, vocabulary, tmp_path):
    config, run = lora_run()
    train_iterations(config, run, vocabulary, 1)
    moved = Run(tmp_path / "elsewhere" / "moved")
    shutil.copytree(run.path, moved.path, symlinks=True)
    shutil.rmtree(run.path)
    checkpoint.check_policy(moved.iteration(1).policy)
    write_inputs(moved, 2, vocabulary)
    train.run(config, moved.path, 2)


# What is refused


@pytest.mark.parametrize("now", [None, {"rank": 8}, {"rank": 4, "alpha": 4}, {"rank": 4, "targets": ["q_proj"]}])
def test_the_kind_of_training_cannot_change_within_a_run(lora_run, vocabulary, now):
    config, run = lora_run()
    train_iterations(config, run, vocabulary, 1)
    write_inputs(run, 2, vocabulary)
    with pytest.raises(EarlError, match=r"policy: was trained with another value of the field lora"):
        train.run(Config(**config.model_dump() | {"lora": now}), run.path, 2)


def test_full_weights_are_not_gone_on_with_by_an_adapter(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 1)
    write_inputs(run, 2, vocabulary)
    with pytest.raises(EarlError, match="another value of the field lora"):
        train.run(Config(**config.model_dump() | {"lora": LORA}), run.path, 2)


def test_an_adapter_is_no_starting_policy(policy_folder, tmp_path):
    folder = adapters.write(tmp_path / "adapter", policy_folder, adapters.strong(policy_folder))
    complaint = r"adapter: is a LoRA adapter, and what starts from a policy needs full weights; .*earl export --policy"
    with pytest.raises(EarlError, match=complaint):
        state.start(Run(tmp_path / "run"), folder)
    with pytest.raises(EarlError, match=f"field model_path is .*{complaint}"):
        preflight.check(configure(tmp_path, model_path=str(folder)))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lora": {"rank": 513}}, r"lora\.rank is 513, above 512, vLLM's largest"),
        ({"lora": {"rank": 0}}, r"lora\.rank"),
        ({"lora": {"rank": 4, "targets": ["q_proj", "q_proj"]}}, r"lora\.targets names a layer twice"),
        ({"lora": {"rank": 4, "targets": ["lm_head"]}}, r"lora\.targets"),
        ({"lora": {"rank": 4}, "reference_offload": True}, "reference_offload is true, but with lora"),
    ],
)
def test_settings_that_cannot_be(tmp_path, fields, complaint):
    with pytest.raises(EarlError, match=complaint):
        load.validate(make_config(tmp_path).model_dump() | fields, "here")


def test_the_order_of_targets_changes_nothing(tmp_path):
    one, other = (
        make_config(tmp_path, lora={"rank": 4, "targets": t}) for t in (["q_proj", "o_proj"], ["o_proj", "q_proj"])
    )
    assert one.lora.settings == other.lora.settings
    assert one.lora.settings.alpha == 8


# Whole runs


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> Run:
    """A run of the shapes world as the stages make it."""
    return bare_loop.run_all(configure(tmp_path_factory.mktemp("by-stage"), **SHORT))


@pytest.mark.slow
def test_a_segment_writes_the_bytes_of_the_stages(by_stage, tmp_path):
    run = begin(tmp_path, by_stage, **SHORT)
    iterate.run(load.read(run.config), run.path, 2)
    assert_same(run, by_stage, checkpoints=(2,))
    assert verify.verify(run, deep=True).problems == []


@pytest.mark.slow
def test_sampler_and_learner_agree_on_an_adapter(by_stage):
    assert metrics(by_stage, 2)["kl"] > 1e-6, "the adapter is not that of the start any more"
    assert metrics(by_stage, 2)["logprob_mismatch_mean"] < 1e-5


@pytest.mark.slow
def test_verify_finds_an_adapter_of_another_base(by_stage, tmp_path):
    shutil.copytree(by_stage.path, tmp_path / "copy", symlinks=True)
    run = Run(tmp_path / "copy")
    path = run.iteration(2).policy / adapter.BASE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policy_digest": "0" * 64}))
    manifest.seal(run.iteration(2).policy)
    problems = {item.problem for item in verify.verify(run).problems if item.file == path.as_posix()}
    assert any("names the base 000000000000, but the run started from" in problem for problem in problems)
