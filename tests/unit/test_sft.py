"""Supervised fine-tuning: its loss against plain cross-entropy, what must not change it, its recipes, and kills."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from earl.config import freeze, paths
from earl.config.schema import Config
from earl.emu3 import checkpoint
from earl.files import manifest
from earl.learner import head, sft
from earl.messages.errors import EarlError
from earl.stages import sft as stage
from tests.support.forked import Forked
from tests.support.sft_files import SETTINGS, plain_cross_entropy
from tests.support.tensors import Largest


@pytest.fixture
def batch(vocabulary):
    """Five sequences of unequal lengths; two neighbours share their prompt."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary.size, length) for length in (9, 4, 12, 7)]
    prompts.insert(2, prompts[1])
    return [sft.Example(prompt, rng.integers(0, vocabulary.size, 3 + 2 * i)) for i, prompt in enumerate(prompts)]


@pytest.fixture
def step(policy_folder):
    """Return a function that takes a step of rate 0, and gives its loss and its gradient, whole."""

    def run(batch, settings=SETTINGS, change=lambda policy: None):
        policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
        with torch.no_grad():
            change(policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        settings = replace(settings, learning_rate=0.0, max_gradient_norm=None)
        loss, norm, *_ = sft.train_step(policy, optimizer, batch, settings, 0)
        squared = sum(parameter.grad.double().square().sum() for parameter in policy.parameters())
        assert np.isnan(norm) or norm == pytest.approx(float(squared.sqrt()), rel=1e-4)
        return loss, {name: parameter.grad for name, parameter in policy.named_parameters()}

    return run


def assert_same(found, expected, tolerance=1e-4):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    flat, other = (torch.cat([part.flatten() for part in side.values()]) for side in (gradient, expected_gradient))
    assert other.norm() > 1e-3
    assert (flat - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(batch, step, policy_folder, packed, micro_batch):
    found = step(batch, replace(SETTINGS, packed=packed, micro_batch=micro_batch))
    assert_same(found, plain_cross_entropy(batch, policy_folder))


def test_a_head_of_zeros_by_hand(batch, step, policy_folder, vocabulary):
    """All ids are equally likely: the loss is ln V, and d loss / d head = mean over tokens of (1/V - one-hot) h."""
    loss, gradient = step(batch, change=lambda policy: policy.lm_head.weight.zero_())
    assert loss == pytest.approx(math.log(vocabulary.size), abs=1e-5)
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    expected = torch.zeros_like(policy.lm_head.weight)
    tokens = sum(len(example.completion) for example in batch)
    for example in batch:
        ids = torch.from_numpy(np.concatenate([example.prompt, example.completion]))
        with torch.no_grad():
            hidden = policy.model(input_ids=ids[None]).last_hidden_state[0]
        for place in range(len(example.prompt), len(ids)):
            expected += hidden[place - 1] / vocabulary.size / tokens
            expected[ids[place]] -= hidden[place - 1] / tokens
    torch.testing.assert_close(gradient["lm_head.weight"], expected, atol=1e-6, rtol=1e-4)
    assert not gradient["model.embed_tokens.weight"].any(), "a head of zeros passes nothing on"


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_by_blocks_changes_the_step_by_rounding_alone(batch, step, vocabulary, monkeypatch, packed):
    settings = replace(SETTINGS, packed=packed)
    expected = step(batch, settings)
    monkeypatch.setattr(head, "TOKENS", 7)
    monkeypatch.setattr(head, "IDS", 50)
    assert_same(step(batch, settings), expected)


def test_no_tensor_of_tokens_by_vocabulary_exists(batch, step, vocabulary, monkeypatch):
    monkeypatch.setattr(head, "TOKENS", 16)
    monkeypatch.setattr(head, "IDS", 64)
    long = [replace(example, completion=np.resize(example.completion, 300)) for example in batch]
    with Largest() as largest:
        step(long)
    assert largest.elements < 5 * 300 * vocabulary.size


def test_what_the_prompt_says_is_not_learned(batch, step):
    _, gradient = step(batch, change=lambda policy: policy.lm_head.weight.zero_())
    rows = gradient["lm_head.weight"]
    prompt, completion = (
        set(np.concatenate([getattr(example, part) for example in batch]).tolist()) for part in ("prompt", "completion")
    )
    never = sorted(set(range(len(rows))) - prompt - completion)[0]
    assert all(torch.equal(rows[one], rows[never]) for one in prompt - completion)
    assert not any(torch.equal(rows[one], rows[never]) for one in completion)


def test_examples_of_a_step_follow_from_its_number():
    epochs = [index for step in range(6) for index in sft.batch_indices(1, step, 4, 8)]
    assert sorted(epochs[:8]) == sorted(epochs[8:16]) == list(range(8)), "every example once an epoch"
    assert epochs[:8] != epochs[8:16]
    assert sft.batch_indices(1, 4, 4, 8) == epochs[16:20]
    assert sft.batch_indices(2, 0, 8, 8) != epochs[:8]


def test_learning_rate_by_hand():
    """Up in 2 steps, then down a cosine over 8: half way, at step 6, half of the peak."""
    rates = [sft.learning_rate(step, SETTINGS) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[6] == pytest.approx(0.5e-3)
    assert rates[9] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 7 / 8)))


def test_a_step_that_is_not_finite_is_named(batch, step):
    with pytest.raises(EarlError, match=r"sft step 0: loss nan .* lower learning_rate"):
        step(batch, change=lambda policy: policy.lm_head.weight.fill_(float("nan")))


# The stage


def losses_of(policy: Path) -> list[float]:
    return json.loads((policy / "sft.json").read_text())["loss"]


def tuned(config: Config, name: str) -> Path:
    """Make a fine-tuning in the place where the pipeline puts it."""
    out = paths.resolve(config, f"stage:sft/{name}")
    stage.run(config, name, out)
    return out


@pytest.mark.slow
def test_it_learns(make, tmp_path):
    """That it repeats its bytes is shown below, where it is killed."""
    stage.run(make(one={}), "one", tmp_path / "out")
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 16
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    assert not list(tmp_path.glob("*.partial"))
    checkpoint.load_policy(tmp_path / "out", torch.float32, "cpu")


def test_packing_changes_the_weights_by_rounding_alone(make, tmp_path):
    weights = []
    for packing in ("none", "groups"):
        stage.run(make(packing, one={"steps": 4}), "one", tmp_path / packing)
        policy = checkpoint.load_policy(tmp_path / packing, torch.float32, "cpu")
        weights.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    # Adam's first steps have the size of the rate, 3e-3, whatever the gradient's: rounding counts where it is near 0.
    assert (weights[0] - weights[1]).abs().mean() < 1e-6
    assert losses_of(tmp_path / "none") == pytest.approx(losses_of(tmp_path / "groups"), rel=1e-4)


def test_mixed_takes_each_data_set_by_its_coefficient(make, data, seen, vocabulary, tmp_path):
    mixed = {"train_paths_file": [data("simple"), data("complex", rows=4)], "coefficients": [0.5, 3.0]}
    stage.run(make(mixed=mixed), "mixed", tmp_path / "out")
    prompts = [vocabulary.decode(example.prompt) for example in seen]
    counts = {kind: [prompts.count(prompt) for prompt in set(prompts) if kind in prompt] for kind in ("simple", "comp")}
    assert counts == {"simple": [1] * 5, "comp": [3] * 4}


@pytest.mark.parametrize("reasoning", [False, True])
def test_sequences_are_those_of_the_grammar(make, seen, vocabulary, tmp_path, reasoning):
    stage.run(make(one={"reasoning": reasoning}), "one", tmp_path / "out")
    thought = " Let's think step by step. <|start thinking|> box: [0, 0, 7, 8]<|end thinking|>" if reasoning else ""
    assert vocabulary.decode(seen[7].prompt).endswith("<|image end|>simple 7")
    completion = vocabulary.decode(seen[7].completion)
    assert completion.startswith(f"{thought}<|image start|>2*3<|image token|><|visual token ")
    assert completion.endswith("<|extra_201|><|image end|><|extra_204|>")


def test_two_stages_are_one_after_the_other(make, data, tmp_path):
    both = {"train_paths_file": [data("simple"), data("complex", 4)], "coefficients": [1.0, 2.0], "steps": 4}
    config = make(first={}, then=both | {"base_model": "stage:sft/first"})
    start = {"model_path": "stage:sft/then", "vision_tokenizer_path": "package:shapes/vision_tokenizer"}
    assert list(paths.shared_stages(config.model_copy(update=start))) == [
        paths.resolve(config, f"stage:sft/{name}") for name in ("first", "then")
    ]
    first, then = tuned(config, "first"), tuned(config, "then")
    assert losses_of(then)[0] < losses_of(first)[0] - 0.5, "it goes on from what the first has learned"
    by_folder = make(then=both | {"base_model": str(first)})
    stage.run(by_folder, "then", tmp_path / "by-folder")
    assert manifest.digest_folder(then) == manifest.digest_folder(tmp_path / "by-folder")


def test_an_unknown_name_is_named_with_those_there_are(make, tmp_path):
    with pytest.raises(EarlError, match="sft has no entry 'two'; it has one"):
        stage.run(make(one={}), "two", tmp_path / "out")


@pytest.mark.slow
def test_by_an_adapter_it_ends_in_full_weights_that_anything_can_start_from(make, tmp_path, policy_folder, monkeypatch):
    """Only the weights that the adapter adds to are others; stopped, it resumes to the same bytes."""
    recipe = {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}, "keep_checkpoints_every_n_steps": 8}
    stage.run(make(one=recipe), "one", tmp_path / "out")
    losses = losses_of(tmp_path / "out")
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    before, after = (load_file(folder / "model.safetensors") for folder in (policy_folder, tmp_path / "out"))
    changed = {name.rsplit(".", 2)[1] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"q_proj", "down_proj"}
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    kept = tmp_path / "out.checkpoints" / "step-000008"
    assert checkpoint.check_policy(kept) == checkpoint.check_policy(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("earl.stages.sft.saving.save_policy", _stopped)
        with pytest.raises(KeyboardInterrupt):
            stage.run(make(one=recipe), "one", tmp_path / "stopped")
    assert list((tmp_path / "stopped.partial").glob("step-*"))
    stage.run(make(one=recipe), "one", tmp_path / "stopped")
    assert manifest.digest_folder(tmp_path / "stopped") == manifest.digest_folder(tmp_path / "out")


def _stopped(*args, **options):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_bytes(make, tmp_path, caplog):
    config, out, partial = make(one={"steps": 24}), tmp_path / "killed", tmp_path / "killed.partial"
    freeze.write(config, tmp_path / "config.json")
    process = Forked("earl", ["sft", "--config", tmp_path / "config.json", "--name", "one", "--out", out])
    while process.poll() is None and not list(partial.glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with caplog.at_level("INFO", "earl.learner.sft"):
        stage.run(config, "one", out)
    assert "resumed at step" in caplog.text
    assert not partial.exists()
    stage.run(config, "one", tmp_path / "undisturbed")
    assert manifest.digest_folder(out) == manifest.digest_folder(tmp_path / "undisturbed")


def test_what_another_configuration_left_is_not_resumed(make, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("earl.stages.sft.saving.save_policy", _stopped)
        with pytest.raises(KeyboardInterrupt):
            stage.run(make(one={"learning_rate": 1e-3, "steps": 4}), "one", out)
    assert list((tmp_path / "out.partial").glob("step-*"))
    (tmp_path / "out.checkpoints" / "step-000002").mkdir(parents=True)
    stage.run(make(one={"steps": 4}), "one", out)
    assert not list((tmp_path / "out.checkpoints").glob("*")), "what it had kept goes, too"
    stage.run(make(one={"steps": 4}), "one", tmp_path / "undisturbed")
    assert manifest.digest_folder(out) == manifest.digest_folder(tmp_path / "undisturbed")


def test_an_example_that_is_too_long_gives_its_place_to_the_next_one_and_is_counted(make, data, seen, tmp_path):
    # Sequences of instructions of 1 word fit, those of 200 do not.
    config = make(s={"train_paths_file": [data("mixed", long=(0, 5, 6))]}).model_copy(update={"model_context_size": 64})
    stage.run(config, "s", tmp_path / "s")
    assert json.loads((tmp_path / "s" / "sft.json").read_text())["left_out_examples"] == 3
    lengths = [len(example) for example in seen]
    assert max(lengths) <= 64
    # In the place of 0, 5 and 6 stand 1, 7 and 7.
    for place, other in ((0, 1), (5, 7), (6, 7)):
        assert np.array_equal(seen[place].completion, seen[other].completion)
    strict = config.model_copy(update={"long_prompts": "stop"})
    wanted = r"field sft\.s\.train_paths_file: 3 of \d+ examples are too long; first mixed: example 0: \d+ tokens"
    with pytest.raises(EarlError, match=wanted):
        stage.run(strict, "s", tmp_path / "strict")
    with pytest.raises(EarlError, match="all of them"):
        stage.run(config.model_copy(update={"model_context_size": 2, "max_response_tokens": 1}), "s", tmp_path / "none")


def test_what_cannot_be_learned_from_is_found_before_the_first_step(make, data, monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "fine_tune", lambda *_: pytest.fail("the fine-tuning has begun"))
    config = make(s={"train_paths_file": [data("silent", reasoned=False)], "reasoning": True})
    with pytest.raises(
        EarlError, match=r"field sft\.s\.train_paths_file: silent: example 0: column 'reasoning' is empty"
    ):
        stage.run(config, "s", tmp_path / "s")


def test_instructions_count_by_their_weight(batch, step):
    """Three tokens of each completion become its instruction: gradients add up, and a weight of 0 leaves them out."""
    whole = [replace(example, instruction_tokens=3) for example in batch]
    assert_same(step(whole, replace(SETTINGS, instruction_loss_weight=0.0)), step([split(e, 3) for e in batch]))
    answers, everything = (step(whole, replace(SETTINGS, instruction_loss_weight=w)) for w in (0.0, 1.0))
    half_loss, half = step(whole, replace(SETTINGS, instruction_loss_weight=0.5))
    between = {name: (answers[1][name] + everything[1][name]) / 2 for name in half}
    assert_same((half_loss, half), ((answers[0] + everything[0]) / 2, between))
    # By another path: all tokens count, and are divided by those of the answers alone.
    loss, gradient = step(batch)
    factor = sum(len(e.completion) for e in batch) / sum(len(e.completion) - 3 for e in batch)
    assert_same(everything, (loss * factor, {name: grad * factor for name, grad in gradient.items()}))


def split(example: sft.Example, tokens: int) -> sft.Example:
    """The same sequence, of which the first tokens of the completion are prompt."""
    head, tail = np.split(example.completion, [tokens])
    return sft.Example(np.concatenate([example.prompt, head]), tail)


@pytest.mark.parametrize("packed", [False, True])
def test_the_held_out_loss_leaves_instructions_out(batch, policy_folder, packed):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    settings = replace(SETTINGS, instruction_loss_weight=1.0, packed=packed)
    whole = [replace(example, instruction_tokens=3) for example in batch]
    expected = sft.validation_loss(policy, [split(example, 3) for example in batch], settings)
    assert sft.validation_loss(policy, whole, settings) == pytest.approx(expected, rel=1e-5)
