"""The learner's formulas: numbers worked out by hand, gradients against plain dense code, invariances."""

import math

import pytest
import torch

from earl.learner import logprobs, objective

VISUAL = (4, 6)  # ids 0..3 are text, 4 and 5 visual
SPLIT = logprobs.split_vocab(VISUAL)


def test_k3_by_hand():
    logp, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2)])
    assert objective.kl_estimate(logp, reference, "k3").tolist() == pytest.approx([0.0, 2 - 1 - math.log(2)], abs=1e-6)


def test_loss_by_hand():
    logp, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 + math.log(2), -2.0])
    advantages = torch.tensor([2.0, -1.0])
    found = objective.grpo_loss(logp, advantages, 4, reference, kl_coeff=0.5)
    # (-2 * -1 + 0.5 * (1 - ln 2)) + (1 * -2 + 0), over 4 tokens.
    assert found.item() == pytest.approx(0.5 * (1 - math.log(2)) / 4, abs=1e-6)
    masked = objective.grpo_loss(logp, advantages, 4, reference, kl_coeff=0.5, mask=torch.tensor([True, False]))
    assert masked.item() == pytest.approx((2 + 0.5 * (1 - math.log(2))) / 4, abs=1e-6)


def test_sft_loss_by_hand():
    """Probabilities 1/4 and 1/2, of two tokens out of five that count."""
    found = objective.sft_loss(torch.tensor([0.25, 0.5]).log(), 5)
    assert found.item() == pytest.approx((math.log(4) + math.log(2)) / 5, abs=1e-6)


def _dense_loss(logits, targets, advantages, mask, reference, temperature, kl_coeff, denominator):
    """The specification, word for word: one token at a time, the support by masking with -inf."""
    total = torch.zeros((), dtype=logits.dtype)
    for t in range(len(targets)):
        support = torch.full((logits.shape[1],), -math.inf, dtype=logits.dtype)
        support[slice(*VISUAL) if targets[t] >= VISUAL[0] else slice(0, VISUAL[0])] = 0.0
        logp = torch.log_softmax(logits[t] / temperature + support, -1)[targets[t]]
        kl = torch.exp(reference[t] - logp) - 1 - (reference[t] - logp)
        total = total + mask[t] * (-advantages[t] * logp + kl_coeff * kl)
    return total / denominator


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    count = 24
    return {
        "logits": torch.randn(count, 6, generator=generator, dtype=torch.float64),
        "targets": torch.randint(0, 6, (count,), generator=generator),
        "advantages": torch.randn(count, generator=generator, dtype=torch.float64),
        "mask": torch.rand(count, generator=generator) < 0.7,
        "reference": -torch.rand(count, generator=generator, dtype=torch.float64) * 3,
    }


def _loss(tokens, logits, part=slice(None)):
    logp, _ = logprobs.token_logprobs(logits[part], tokens["targets"][part], 0.8, SPLIT)
    return objective.grpo_loss(
        logp, tokens["advantages"][part], 24, tokens["reference"][part], kl_coeff=0.1, mask=tokens["mask"][part]
    )


def test_value_and_gradient_equal_a_naive_dense_computation(tokens):
    ours, naive = (tokens["logits"].clone().requires_grad_() for _ in range(2))
    loss = _loss(tokens, ours)
    parts = (tokens[name] for name in ("targets", "advantages", "mask", "reference"))
    expected = _dense_loss(naive, *parts, temperature=0.8, kl_coeff=0.1, denominator=24)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, naive.grad)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 5, 24])
def test_any_split_into_micro_batches_sums_to_one_loss_and_gradient(tokens, size):
    whole, split = (tokens["logits"].float().clone().requires_grad_() for _ in range(2))
    expected = _loss(tokens, whole)
    expected.backward()
    total = 0.0
    for start in range(0, 24, size):
        loss = _loss(tokens, split, slice(start, start + size))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(split.grad, whole.grad, atol=1e-7, rtol=1e-5)


def test_on_policy_gradient_is_the_policy_gradient(tokens):
    """At reference = policy the KL term has no gradient: d loss / d logp = -A / denominator."""
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -5.0])
    objective.grpo_loss(logp, advantages, 10, logp.detach().clone(), kl_coeff=1.0).backward()
    assert logp.grad.tolist() == pytest.approx([-0.3, 0.5])


@pytest.mark.parametrize(
    ("text_only", "vision_only", "expected"),
    [
        (None, None, ["all"] * 7),
        ((2, 3), None, ["text", "text", "visual"] * 2 + ["text"]),
        (None, (1, 3), ["visual", "all", "all"] * 2 + ["visual"]),
        ((0, 2), None, ["visual"] * 7),
        ((3, 3), None, ["text"] * 7),
    ],
)
def test_cycles_of_counted_tokens(text_only, vision_only, expected):
    assert [objective.counted_tokens(i, text_only, vision_only) for i in range(1, 8)] == expected


def test_both_cycles_at_once_are_refused():
    with pytest.raises(ValueError, match="exclude"):
        objective.counted_tokens(1, (1, 2), (1, 2))


@pytest.mark.parametrize(
    ("counted", "expected"),
    [("all", [True, True, False, True]), ("text", [True, False, False, False]), ("visual", [False, True, False, True])],
)
def test_forced_tokens_never_count(counted, expected):
    targets, forced = torch.tensor([1, 4, 2, 5]), torch.tensor([False, False, True, False])
    assert objective.token_mask(targets, forced, VISUAL, counted).tolist() == expected
