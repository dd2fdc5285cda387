"""Adapters: what a policy with one computes, what its folder holds, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import earl
from earl.emu3 import adapter, checkpoint, export, merge, saving, sequence
from earl.emu3.adapter import TARGETS, Lora
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine
from earl.files import manifest
from earl.learner import grpo, sharding
from earl.messages.errors import EarlError
from tests.support import adapters, ranks_program
from tests.support.adapters import LORA

IDS = torch.arange(24)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def strong(policy_folder):
    return adapters.strong(policy_folder)


@pytest.fixture
def written(tmp_path, policy_folder, strong):
    """An adapter in a folder, beside a copy of its base."""
    shutil.copytree(policy_folder, tmp_path / "base")
    return adapters.write(tmp_path / "adapter", tmp_path / "base", strong)


# What it computes


def test_a_new_adapter_changes_nothing_and_is_drawn_by_its_seed_alone(policy_folder):
    base = logits(checkpoint.load_policy(policy_folder, torch.float32, "cpu"))
    torch.manual_seed(0)
    drawn = []
    for seed in (1, 1, 2):
        model = checkpoint.load_policy(policy_folder, torch.float32, "cpu", LORA)
        adapter.fill(model, adapter.drawn(model, seed))
        assert torch.equal(logits(model), base)
        drawn.append({name: weight.detach().clone() for name, weight in adapter.weights(model).items()})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    for name, weight in drawn[0].items():
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            assert not torch.equal(weight, drawn[2][name])
            assert 0.9 * bound < weight.abs().max() <= bound, "as peft draws it: Kaiming's uniform with a = sqrt(5)"


def test_without_its_adapter_a_policy_is_its_base(strong, policy_folder):
    base, changed = logits(checkpoint.load_policy(policy_folder, torch.float32, "cpu")), logits(strong)
    assert (changed - base).abs().max() > 0.1
    with adapter.disabled(strong):
        assert torch.equal(logits(strong), base)
    assert torch.equal(logits(strong), changed)
    assert all(weight.requires_grad for weight in adapter.weights(strong).values())
    assert sharding.trained(strong).keys() == {name for name, _ in strong.named_parameters() if ".lora_" in name}, (
        "and the base stays frozen"
    )


def test_an_adapter_of_full_rank_learns_what_full_weights_learn(policy_folder, vocabulary, monkeypatch):
    """Full weights W + D against W with A the identity and B = D: equal loss, KL to W, entropy, gradient of D."""
    monkeypatch.setattr(grpo, "MAX_GRADIENT_NORM", float("inf"))
    episodes, settings = ranks_program.episodes(vocabulary), ranks_program.settings(vocabulary, packed=True)
    base = checkpoint.load_policy(policy_folder, torch.float32, "cpu").requires_grad_(False)
    rank = max(base.config.hidden_size, base.config.intermediate_size)
    lora = Lora(rank, rank)
    full = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    adapted = checkpoint.load_policy(policy_folder, torch.float32, "cpu", lora)
    parts, generator = adapter.weights(adapted), torch.Generator().manual_seed(0)
    targeted = {name for name in dict(full.named_parameters()) if adapter.weight_name(name, "A") in parts}
    assert len(targeted) == len(TARGETS) * base.config.num_hidden_layers
    with torch.no_grad():
        for name, weight in full.named_parameters():
            if name in targeted:
                difference = 0.05 * torch.randn(weight.shape, generator=generator)
                weight += difference
                parts[adapter.weight_name(name, "A")].copy_(torch.eye(rank, weight.shape[1]))
                parts[adapter.weight_name(name, "B")][:, : weight.shape[1]] = difference
            else:
                weight.requires_grad_(False)
    found = []
    for policy, reference in ((full, base), (adapted, adapted)):
        optimizer = torch.optim.SGD(sharding.trained(policy).values(), lr=0.0)
        metrics = grpo.train_iteration(policy, reference, optimizer, episodes, settings)
        found.append({name: value for name, value in metrics.items() if value is not None and "gradient" not in name})
    assert found[0]["kl"] > 0.01
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    for name in targeted:
        expected = full.get_parameter(name).grad
        gradient = parts[adapter.weight_name(name, "B")].grad[:, : expected.shape[1]]
        assert (gradient - expected).norm() < 1e-4 * expected.norm(), name


def test_a_merged_policy_computes_what_adapter_and_base_do(strong, written, tmp_path, policy_folder):
    """The sum, from memory and from files; the other weights as they are."""
    (tmp_path / "merged").mkdir()
    saving.save_policy(strong, tmp_path / "merged", saving.companions(policy_folder), torch.float32, merge=LORA)
    merged = checkpoint.load_policy(tmp_path / "merged", torch.float32, "cpu")
    assert logits(merged).sub(logits(strong)).abs().max() < 1e-3
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    named, base = dict(merge.merged_weights(written)), load_file(policy_folder / "model.safetensors")
    assert stored.keys() == named.keys() == base.keys()
    for name, weight in stored.items():
        changed = adapter.weight_name(name, "A") in adapter.weights(strong)
        assert torch.equal(weight, base[name]) == (not changed), name
        assert torch.equal(named[name], weight), name
        assert named[name].dtype == torch.float32 or not changed
    full = dict(merge.merged_weights(policy_folder))
    assert all(torch.equal(full[name], weight) for name, weight in base.items())


def test_an_exported_adapter_is_the_sum(strong, written, tmp_path):
    vision = Path(earl.__file__).parent / "shapes" / "vision_tokenizer"
    export.write(written, vision, tmp_path / "exported", export.Use(4096, ""), causal_lm=False)
    found = checkpoint.load_policy(tmp_path / "exported", torch.float32, "cpu")
    assert logits(found).sub(logits(strong)).abs().max() < 1e-3
    assert not adapter.is_adapter(tmp_path / "exported")


# Its folder


def test_the_folder_is_small_and_is_what_peft_reads(written, strong, policy_folder):
    from peft import PeftModel

    assert {path.name for path in written.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base.json", "config.json", "manifest.json"),
        *saving.companions(policy_folder),
    }
    stored = load_file(written / adapter.WEIGHTS)
    outputs_and_inputs = sum(
        sum(weight.shape) for name, weight in load_file(policy_folder / "model.safetensors").items() if "_proj" in name
    )
    assert sum(weight.numel() for weight in stored.values()) == LORA.rank * outputs_and_inputs
    model = PeftModel.from_pretrained(checkpoint.load_policy(policy_folder, torch.float32, "cpu"), written)
    assert torch.equal(logits(model), logits(strong))


def test_it_comes_back_and_its_digest_is_known_before_it_is_written(written, strong, tmp_path):
    again = checkpoint.load_policy(written, torch.float32, "cpu")
    assert torch.equal(logits(again), logits(strong))
    beside = saving.companions(written)
    assert saving.save_policy(again, None, beside) == manifest.digest_folder(written)
    other = beside | adapter.files(LORA, "../base", "0" * 64)
    assert saving.save_policy(again, None, other) != manifest.digest_folder(written), "the digest binds the base"
    assert checkpoint.check_policy(written).size == checkpoint.check_policy(tmp_path / "base").size


def test_bfloat16_rounds_the_adapter_by_itself(written, strong):
    """Not the sum with the base, in which it would be lost."""
    model = checkpoint.load_policy(written, torch.bfloat16, "cpu")
    for name, weight in adapter.weights(strong).items():
        assert torch.equal(adapter.weights(model)[name], weight.bfloat16()), name


def test_another_base_is_refused(written, tmp_path):
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    manifest.seal(tmp_path / "base")
    for use in (checkpoint.check_policy, lambda folder: checkpoint.load_policy(folder, torch.float32, "cpu")):
        with pytest.raises(EarlError, match=r"base: is policy \w{12}, but the adapter .*adapter was trained on \w{12}"):
            use(written)
    (tmp_path / "base" / manifest.NAME).unlink()
    with pytest.raises(EarlError, match="base: is policy"):
        checkpoint.check_policy(written)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder.parent / "base"), r"base\.json: names the base .*, where no folder is"),
        (lambda folder: (folder / "base.json").unlink(), r"base\.json: is missing"),
        (lambda folder: (folder / adapter.WEIGHTS).unlink(), r"adapter_model\.safetensors: is missing"),
        (lambda folder: _set(folder / adapter.CONFIG, use_dora=True), r"adapter_config\.json: was not written by this"),
        (lambda folder: _set(folder / adapter.CONFIG, r=3), r"weight '.*' has shape \[4, 128\] where"),
        (lambda folder: _set(folder / adapter.CONFIG, target_modules=["q_proj", "lm_head"]), "is missing"),
    ],
)
def test_a_folder_that_is_incomplete_or_not_ours_is_refused(written, harm, complaint):
    harm(written)
    (written / manifest.NAME).unlink()
    for use in (checkpoint.check_policy, lambda folder: checkpoint.load_policy(folder, torch.float32, "cpu")):
        with pytest.raises(EarlError, match=complaint):
            use(written)


def _set(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=1, sort_keys=True) + "\n")


def test_a_damaged_adapter_is_found_when_it_is_read(written):
    data = bytearray((written / adapter.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (written / adapter.WEIGHTS).write_bytes(data)
    with pytest.raises(EarlError, match=r"adapter_model\.safetensors: is damaged"):
        checkpoint.load_policy(written, torch.float32, "cpu")


def test_weights_that_are_not_finite_are_not_written(strong, written):
    with torch.no_grad():
        next(iter(adapter.weights(strong).values()))[0, 0] = float("nan")
    with pytest.raises(EarlError, match=r"lora_A\.weight' is not finite, so the policy was not written"):
        saving.save_policy(strong, None, saving.companions(written))


# In the torch engine


@pytest.fixture
def engine():
    return TorchEngine(torch.device("cpu"), torch.float32, 4, 512, constrained=True, lora=LORA)


@pytest.fixture
def request_(vocabulary):
    prompt = sequence.prompt_ids(np.zeros((3, 3), int), "x", "<|image start|>", vocabulary)
    return Request(prompt, (3, 3), [1, 2, 3, 4])


def test_an_engine_samples_with_an_adapter_of_a_folder_or_of_memory(engine, written, strong, policy_folder, request_):
    params, plain = SamplingParams(1.0, max_tokens=40), TorchEngine(torch.device("cpu"), torch.float32, 4, 512, True)
    plain.load(policy_folder)
    base = plain.generate([request_], params)
    plain.load(written)
    changed = plain.generate([request_], params)
    assert changed != base
    engine.load(policy_folder)
    assert engine.generate([request_], params) == base
    engine.update(saving.whole_weights(strong), "the adapter")
    assert engine.generate([request_], params) == changed
    engine.load(written)
    assert engine.generate([request_], params) == changed


def test_an_update_must_be_of_the_adapter(engine, policy_folder, strong):
    engine.load(policy_folder)
    with pytest.raises(EarlError, match=r"weight 'model\.embed_tokens\.weight' is not one of the policy"):
        engine.update(adapter.base_weights(strong).items(), "full weights")
