"""Which weights are kept, updated and written in which precision: the train stage with bfloat16, on files."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from earl.emu3 import checkpoint, saving
from earl.execution import ranks
from earl.files import manifest
from earl.learner import batches, grpo, logprobs, parts, sharding
from earl.learner.batches import Episode
from earl.learner.settings import Settings
from earl.messages.errors import EarlError
from earl.stages import train
from tests.support import train_files

RATE = 1e-6
"""AdamW's first step moves a weight by this. A weight of 0.02 in bfloat16 has neighbours 1.2e-4 apart."""


@pytest.fixture
def rounded(new_run):
    return new_run(dtype="bfloat16", policy_dtype="bfloat16", learning_rate=RATE, kl_coeff=0.0)


def stored(run, iteration: int) -> dict[str, torch.Tensor]:
    [path] = run.iteration(iteration).trainer.glob("*.safetensors")
    return {name.removeprefix("weight."): x for name, x in load_file(path).items() if name.startswith("weight.")}


def test_small_updates_add_up_though_the_policy_is_rounded(rounded, vocabulary):
    """Over two iterations, the second from files: the float32 weights move step by step, their rounding hardly does."""
    config, run = rounded
    start = load_file(run.iteration(0).policy / "model.safetensors")
    for iteration in (1, 2):
        train_files.write_inputs(run, iteration, vocabulary)
        train.run(config, run.path, iteration)
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = ((stored(run, i)[name] - start[name].float()).abs() for i in (1, 2))
    assert first.median().item() == pytest.approx(RATE, rel=0.05)
    assert second.max().item() > 1.7 * RATE
    assert (second > 1.1 * first).float().mean() > 0.3
    policy = load_file(run.iteration(2).policy / "model.safetensors")
    assert {weight.dtype for weight in policy.values()} == {torch.bfloat16}
    assert all(torch.equal(policy[key], weight.bfloat16()) for key, weight in stored(run, 2).items())
    assert (policy[name] == start[name].bfloat16()).float().mean() > 0.9
    assert json.loads((run.iteration(2).policy / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_that_the_policy_does_not_round_are_foreign(rounded, vocabulary):
    config, run = rounded
    train_files.write_inputs(run, 1, vocabulary)
    train.run(config, run.path, 1)
    train_files.write_inputs(run, 2, vocabulary)
    [path] = run.iteration(1).trainer.glob("*.safetensors")
    tensors = load_file(path)
    tensors["weight.lm_head.weight"][3, 3] += 1
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, metadata={parts.OFFSETS: file.metadata()[parts.OFFSETS]})
    manifest.seal(run.iteration(1).trainer)
    with pytest.raises(EarlError, match=r"trainer: tensor 'weight\.lm_head\.weight' is not what the policy rounds"):
        train.run(config, run.path, 2)


def test_bfloat16_repeats_its_bytes_and_learns_from_what_engines_sample(new_run, vocabulary):
    """Written rounded or not, the learner computes with the same bfloat16 weights."""
    metrics = []
    for name, policy_dtype in (("one", "bfloat16"), ("two", "bfloat16"), ("three", "float32")):
        config, run = new_run(name, dtype="bfloat16", policy_dtype=policy_dtype, learning_rate=1e-3)
        for iteration in (1, 2):
            train_files.write_inputs(run, iteration, vocabulary)
            train.run(config, run.path, iteration)
        found = json.loads(run.iteration(2).metrics.read_text())
        digests = manifest.digest_folder(run.iteration(2).policy), manifest.digest_folder(run.iteration(2).trainer)
        metrics.append(({key: found[key] for key in ("loss", "entropy", "kl", "gradient_norm")}, digests))
    assert metrics[0] == metrics[1]
    assert metrics[2][0] == metrics[0][0]
    assert metrics[2][1][0] != metrics[0][1][0]


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
def test_the_reference_is_held_as_it_computes(policy_folder, vocabulary, offload):
    """In bfloat16, at half the size, with the log-probs of a model whose weights are float32: to the same bits."""
    visual = vocabulary.first_visual, vocabulary.size
    settings = Settings(0.1, 1.0, 4, visual, logprobs.split_vocab(visual), "all", bfloat16=True, packed=True)
    rng = np.random.default_rng(0)
    prompt, nothing = rng.integers(0, vocabulary.size, 20), np.zeros(12)
    episodes = [
        Episode(f"0-{k}", "0", prompt, rng.integers(0, vocabulary.size, 12), nothing > 0, nothing.astype("f4"), 1.0)
        for k in range(3)
    ]
    with ranks.joined(torch.device("cpu"), splits_alone=True) as team:
        policy = sharding.load(policy_folder, team, bfloat16=True)
        reference = sharding.load(policy_folder, team, bfloat16=True, frozen=True, offload=offload)
        assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
        assert {weight.dtype for weight in reference.parameters()} == {torch.bfloat16}
        batch = batches.collate(episodes, settings, team.device)
        with torch.no_grad():
            expected, found = (grpo.completion_logprobs(model, batch, settings)[0] for model in (policy, reference))
    assert torch.equal(found, expected)
    whole = sharding.load(policy_folder, ranks.alone(torch.device("cpu")), bfloat16=True, frozen=True)
    assert {weight.dtype for weight in whole.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(grpo.completion_logprobs(whole, batch, settings)[0], expected), "split or not"


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
def test_in_float32_the_reference_is_float32(policy_folder, splits):
    with ranks.joined(torch.device("cpu"), splits_alone=splits) as team:
        reference = sharding.load(policy_folder, team, bfloat16=False, frozen=True)
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32}


def test_weights_of_many_bytes_go_into_several_files(policy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "FILE_SIZE", 150_000)
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    saving.save_policy(model, tmp_path, saving.companions(policy_folder))
    sizes = [path.stat().st_size for path in tmp_path.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3
    largest = max(weight.nbytes for weight in model.parameters())
    assert max(sizes) < max(150_000, largest) + 10_000
    again = checkpoint.load_policy(tmp_path, torch.float32, "cpu")
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())
