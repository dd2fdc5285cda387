"""What the torch engine does by itself: drawing, truncation, batches."""

import dataclasses

import numpy as np
import pytest
import torch

from earl.emu3 import checkpoint, grid, sequence
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine, sample, truncate
from earl.messages.errors import EarlError
from tests.support.distributions import truncated_softmax

FREE = SamplingParams(temperature=1.0, max_tokens=64)


@pytest.fixture(scope="module")
def request_(vocabulary):
    return Request(sequence.prompt_ids(np.zeros((3, 3), int), "x", "<|image start|>", vocabulary), (3, 3), [1, 2])


def test_without_the_constraint_any_id_may_come(policy_folder, request_, vocabulary):
    free = TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, context=512, constrained=False)
    free.load(policy_folder)
    hot = dataclasses.replace(FREE, temperature=5.0)
    kept = [
        grid.allowed_masks(vocabulary)[grid.kinds_of_completion(c.token_ids, (3, 3), vocabulary), c.token_ids].all()
        for c in free.generate([request_], hot)[0]
    ]
    assert not all(kept)


def test_weights_from_memory_are_rounded_as_those_of_a_folder(policy_folder, request_, vocabulary):
    """A float32 policy in an engine that computes in bfloat16."""
    fresh, updated = (TorchEngine(torch.device("cpu"), torch.bfloat16, 8, 512, constrained=True) for _ in range(2))
    fresh.load(policy_folder)
    updated.load(policy_folder)
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    weights = [(name, weight.detach()) for name, weight in policy.named_parameters()]
    updated.update(((name, torch.zeros_like(weight)) for name, weight in weights), "nothing")
    assert updated.generate([request_], FREE) != fresh.generate([request_], FREE)
    updated.update(weights, "the policy")
    assert updated.generate([request_], FREE) == fresh.generate([request_], FREE)


def test_logits_in_bfloat16_are_not_rounded(policy_folder, request_):
    """Log-probs are those of float32 logits of the hidden states, which are bfloat16 as the weights are."""
    engine = TorchEngine(torch.device("cpu"), torch.bfloat16, 2, 512, constrained=False)
    engine.load(policy_folder)
    with torch.no_grad():
        engine.policy.lm_head.weight.mul_(16)  # of a size at which bfloat16 rounds them by up to 0.06
    hidden = []
    engine.policy.model.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state[:, -1].double()))
    [completions] = engine.generate([request_], dataclasses.replace(FREE, max_tokens=8))
    assert len(hidden) == 8, "the prompt, and each token but the last"
    weight = engine.policy.lm_head.weight.detach().double()
    for row, completion in enumerate(completions):
        exact = [(states[row % len(states)] @ weight.T).log_softmax(-1) for states in hidden]
        expected = [logprobs[token].item() for logprobs, token in zip(exact, completion.token_ids, strict=True)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (5, 1.0), (-1, 0.6), (6, 0.8)])
def test_samples_follow_the_truncated_softmax(top_k, top_p):
    # Not at the top, where every process that collects tests would import it.
    from scipy import stats

    torch.manual_seed(0)
    logits = torch.randn(1, 40)
    logits[0, 7:12] = -torch.inf
    params = SamplingParams(temperature=0.9, top_p=top_p, top_k=top_k)
    count = 20_000
    noise = torch.from_numpy(np.random.default_rng(1).random(count))
    tokens, logprobs = sample(logits.expand(count, -1), noise, params)
    p = truncated_softmax(logits[0].double().numpy() / 0.9, top_p, top_k)
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], count * p[p > 0]).pvalue > 0.001
    assert np.allclose(logprobs.numpy(), np.log(p[tokens.numpy()]), atol=1e-5)


def test_noise_at_its_ends_hits_ids_that_have_probability():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    noise = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample(logits, noise, FREE)[0].tolist() == [1, 2]


def test_truncation_to_one_keeps_the_likeliest():
    logprobs = torch.log_softmax(torch.tensor([[0.0, 3.0, 1.0]]), -1)
    for params in (SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-9)):
        assert truncate(logprobs, params)[0].tolist() == [-torch.inf, 0.0, -torch.inf]


def test_samples_that_do_not_fill_batches_are_an_error(torch_engine, policy_folder, request_):
    torch_engine.load(policy_folder)
    with pytest.raises(EarlError, match="engine_batch_size is 8, which is no multiple of the 3 samples"):
        torch_engine.generate([dataclasses.replace(request_, seeds=[1, 2, 3])], FREE)


def test_memory_that_does_not_suffice_is_an_error_that_names_the_numbers(torch_engine, policy_folder, request_):
    torch_engine.load(policy_folder)
    endless = TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, context=10**14, constrained=True)
    endless.load(policy_folder)
    params = dataclasses.replace(FREE, max_tokens=10**13)
    with pytest.raises(EarlError, match=r"out of memory .*; lower engine_batch_size \(8\) or max_response_tokens"):
        endless.generate([request_], params)
