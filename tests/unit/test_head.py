"""The blocked head against the plain one: values, gradients, and what it never holds."""

import math

import pytest
import torch

from earl.learner import head, logprobs, objective
from earl.learner.logprobs import FULL
from tests.support.tensors import Largest

TOKENS, IDS, WIDTH, VOCABULARY = 23, 61, 8, 200
VISUAL = (130, 190)
SPLIT = logprobs.split_vocab(VISUAL)
SUPPORTS = pytest.mark.parametrize("support", [SPLIT, FULL], ids=["split", "full"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that divide neither tokens nor ids, and are passed by both."""
    monkeypatch.setattr(head, "TOKENS", 5)
    monkeypatch.setattr(head, "IDS", 17)


def make(dtype, width=WIDTH, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(TOKENS, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VISUAL[1], (TOKENS,), generator=generator)
    advantages = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
        advantages.to(dtype),
    )


def plain(hidden, weight, targets, temperature, support):
    return logprobs.token_logprobs(hidden @ weight.T, targets, temperature, support)


@SUPPORTS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_values_and_gradients_equal_the_plain_head(support, temperature, entropy_coeff, dtype, tolerance):
    found, expected = [], []
    for function, into in ((head.token_logprobs, found), (plain, expected)):
        hidden, weight, targets, advantages = make(dtype)
        if function is plain:
            logp, entropy = plain(hidden, weight, targets, temperature, support)
        else:
            logp, entropy = head.token_logprobs(hidden, weight, targets, temperature, support)
        more = {"entropy": entropy, "entropy_coeff": entropy_coeff}
        objective.grpo_loss(logp, advantages, TOKENS, logp.detach() - 0.3, kl_coeff=0.5, **more).backward()
        into += [logp.detach(), entropy.detach(), hidden.grad, weight.grad]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance * 10, rtol=tolerance * 10)
        assert theirs.abs().max() > 1e-2


def test_gradcheck():
    hidden, weight, targets, _ = make(torch.float64)

    def both(h, w):
        return head.token_logprobs(h, w, targets[:6], 0.9, SPLIT)

    for function in (both, lambda h, w: both(h, w)[0], lambda h, w: both(h, w)[1]):
        torch.autograd.gradcheck(function, (hidden[:6], weight), fast_mode=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_and_its_gradient_by_hand(monkeypatch, temperature):
    """Of probabilities 1/4 and 3/4, and 1/2, 1/4, 1/4 after them: dH / dlogit_j = -p_j (log p_j + H) / temperature."""
    monkeypatch.setattr(head, "IDS", 1)
    for chances in ([1 / 4, 3 / 4], [1 / 2, 1 / 4, 1 / 4]):
        logits = temperature * torch.tensor(chances, dtype=torch.float64).log() + 5
        weight = torch.eye(len(chances), dtype=torch.float64)  # so that the hidden state is the logits
        hidden = logits.unsqueeze(0).repeat(2, 1).requires_grad_()
        _, entropy = head.token_logprobs(hidden, weight, torch.tensor([0, 1]), temperature, FULL)
        expected = -sum(p * math.log(p) for p in chances)
        assert entropy.tolist() == pytest.approx([expected] * 2)
        (entropy * torch.tensor([1.0, 3.0])).sum().backward()
        one = [-p * (math.log(p) + expected) / temperature for p in chances]
        assert hidden.grad.tolist() == [pytest.approx(one), pytest.approx([3 * x for x in one])]


def test_the_entropy_of_a_truncated_support_is_over_what_is_kept():
    support = logprobs.Support(((0, None),), top_k=3, top_p=0.9)
    found = []
    for function in (head.token_logprobs, plain):
        hidden, weight, targets, weights = make(torch.float64)
        _, entropy = function(hidden, weight, targets, 0.7, support)
        (entropy * weights).sum().backward()
        found.append((entropy.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0][0].max() <= math.log(4) + 1e-9, "three ids, and the target"
    assert found[0][1].abs().max() > 1e-3


def test_large_logits_do_not_overflow():
    hidden, weight, targets, advantages = make(torch.float32, scale=300.0)
    logp, entropy = head.token_logprobs(hidden, weight, targets, 1.0, FULL)
    expected, expected_entropy = plain(hidden, weight, targets, 1.0, FULL)
    assert expected.min() < -1000
    torch.testing.assert_close(logp, expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-3, rtol=1e-4)
    (logp * advantages).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_ids_outside_the_support_get_no_gradient():
    hidden, weight, targets, _ = make(torch.float32)
    targets = targets.clamp(min=VISUAL[0])
    head.token_logprobs(hidden, weight, targets, 1.0, SPLIT)[0].sum().backward()
    assert weight.grad[slice(*VISUAL)].abs().sum(1).min() > 0
    assert not weight.grad[: VISUAL[0]].any()
    assert not weight.grad[VISUAL[1] :].any()


def test_a_uniform_head_by_hand():
    hidden, targets = torch.zeros(TOKENS, WIDTH), torch.full((TOKENS,), 3)
    logp, entropy = head.token_logprobs(hidden, torch.randn(VOCABULARY, WIDTH), targets, 1.0, SPLIT)
    assert logp.tolist() == pytest.approx([-math.log(130)] * TOKENS, abs=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(130)] * TOKENS, abs=1e-6)


def test_an_id_in_no_support_is_refused():
    hidden, weight, targets, _ = make(torch.float32)
    with pytest.raises(ValueError, match="195"):
        head.token_logprobs(hidden, weight, targets.clone().fill_(195), 1.0, SPLIT)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["cast", "as they are"])
@pytest.mark.parametrize("blocks", [(5, 17), (TOKENS, VOCABULARY)], ids=["several", "one"])
def test_logits_of_bfloat16_factors_are_float32(monkeypatch, stored, blocks):
    """Products of two bfloat16 numbers are exact in float32; rounded to bfloat16, logits near 16 are 0.125 apart."""
    monkeypatch.setattr(head, "TOKENS", blocks[0])
    monkeypatch.setattr(head, "IDS", blocks[1])
    hidden, weight, targets, advantages = make(torch.float32, scale=6.0)
    factors = [x.detach().bfloat16().to(stored).requires_grad_() for x in (hidden, weight)]
    logp, entropy = head.token_logprobs(*factors, targets, 1.0, SPLIT, bfloat16=True)
    (logp * advantages).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in factors]
    expected, expected_entropy = plain(*exact, targets, 1.0, SPLIT)
    (expected * advantages).sum().backward()
    assert (exact[0] @ exact[1].T).abs().max() > 16
    torch.testing.assert_close(logp, expected.float(), atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(entropy, expected_entropy.float(), atol=2e-5, rtol=2e-6)
    for ours, theirs in zip(factors, exact, strict=True):
        assert ours.grad.dtype == stored
        # The logits' gradient is rounded before it is multiplied.
        assert (ours.grad - theirs.grad).norm() < 4e-3 * theirs.grad.norm()


def test_what_a_rounded_head_kept_is_found_from_float32_logits():
    """Three logits that are one in bfloat16: 16, 16.04 and 16.05."""
    hidden = torch.tensor([[1.0, 0.04, 0.05]]).bfloat16()
    weight = torch.tensor([[16.0, 0, 0], [16.0, 1, 0], [16.0, 0, 1], [0, 0, 0]]).bfloat16()
    support = logprobs.Support(((0, None),), top_k=2)
    kept = head.kept_ids(hidden, weight, torch.tensor([2]), 1.0, support, bfloat16=True)
    assert head._unpack(kept[0], 0, 4).tolist() == [[False, True, True, False]]


def gradients(weight, before=None, accumulate=True):
    """Those of hidden states and weight, the latter by way of `accumulate`."""
    hidden, _, targets, advantages = make(torch.float32)
    weight.grad = before
    logp, _ = head.token_logprobs(hidden, weight, targets, 0.8, FULL, accumulate=accumulate)
    (logp * advantages).sum().backward()
    return hidden.grad, weight.grad


def test_accumulating_in_place_gives_the_same_gradients():
    weight, before = make(torch.float32)[1], torch.randn(VOCABULARY, WIDTH)
    expected_hidden, expected = gradients(weight, accumulate=False)
    hidden, fresh = gradients(weight)
    assert torch.equal(hidden, expected_hidden)
    assert torch.equal(fresh, expected)
    old = before.clone()
    _, added = gradients(weight, old)
    assert added is old
    torch.testing.assert_close(added, before + expected)


def test_accumulating_in_place_needs_no_second_gradient():
    found = []
    for accumulate in (True, False):
        hidden, weight, targets, advantages = make(torch.float32)
        weight.grad = torch.zeros_like(weight)
        with Largest() as largest:
            logp, _ = head.token_logprobs(hidden, weight, targets, 0.8, FULL, accumulate=accumulate)
            (logp * advantages).sum().backward()
        found.append(largest.elements)
    assert found[0] <= max(TOKENS * WIDTH, head.IDS * WIDTH)
    assert found[1] == VOCABULARY * WIDTH


def test_what_is_not_a_plain_leaf_gets_its_gradient_the_usual_way():
    """A weight that was computed (gathered, cast), one that is frozen, and one whose gradient others wait for."""
    leaf = make(torch.float32)[1]
    _, expected = gradients(leaf)
    hidden, _, targets, advantages = make(torch.float32)
    other = leaf.detach().clone().requires_grad_()
    logp, _ = head.token_logprobs(hidden, other * 1.0, targets, 0.8, FULL, accumulate=True)
    (logp * advantages).sum().backward()
    assert torch.equal(other.grad, expected)
    _, frozen = gradients(leaf.detach().clone())
    assert frozen is None
    seen = []
    watched = leaf.detach().clone().requires_grad_()
    watched.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    gradients(watched)
    assert torch.equal(seen[0], expected)


@SUPPORTS
def test_no_tensor_of_tokens_by_vocabulary_exists(support):
    found = []
    for function in (lambda h, w, t: head.token_logprobs(h, w, t, 1.0, support), _plain(support)):
        hidden, weight, targets, advantages = make(torch.float32, width=3)
        with Largest() as largest:
            logp, entropy = function(hidden, weight, targets)
            (logp * advantages - entropy).sum().backward()
        found.append(largest.elements)
    # The largest tensor of the blocked head is the gradient of its weight; the plain one's are its logits.
    assert found == [VOCABULARY * 3, TOKENS * VOCABULARY]


def _plain(support):
    return lambda h, w, t: plain(h, w, t, 1.0, support)


def test_what_fits_in_a_block_is_computed_whole_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(head, "IDS", VOCABULARY)
    monkeypatch.setattr(head, "TOKENS", TOKENS)
    hidden, weight, targets, _ = make(torch.float32)
    found, _ = head.token_logprobs(hidden, weight, targets, 0.8, SPLIT)
    assert torch.equal(found, plain(hidden, weight, targets, 0.8, SPLIT)[0])
