"""The learner's loss variants: hand-worked tables, and losses and gradients equal to TRL's and Liger's."""

import math
from types import SimpleNamespace

import pytest
import torch

from earl.learner import logprobs, objective
from earl.learner.logprobs import FULL

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    # d = reference - logp = 0, ln 2, -ln 2.
    [
        ("k1", [0, -LN2, LN2], [1, 1, 1]),
        ("k2", [0, LN2**2 / 2, LN2**2 / 2], [0, -LN2, LN2]),
        ("k3", [0, 1 - LN2, LN2 - 0.5], [0, -1, 0.5]),
        ("k3+", [0, 1 - LN2, LN2 - 0.5], [0, -LN2, LN2]),
        # At ratio 3; the gradient is -ratio d.
        ("weighted_k3", [0, 3 - 3 * LN2, 3 * LN2 - 1.5], [0, -3 * LN2, 3 * LN2]),
    ],
)
def test_kl_estimates_by_hand(estimator, values, gradients):
    logp = torch.tensor([-2.0, -2.0, -2.0], requires_grad=True)
    behavior = torch.full((3,), -2 - math.log(3))
    found = objective.kl_estimate(logp, torch.tensor([-2.0, -2 + LN2, -2 - LN2]), estimator, behavior)
    found.sum().backward()
    assert found.tolist() == pytest.approx(values, abs=1e-6)
    assert logp.grad.tolist() == pytest.approx(gradients, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "sampler", "value_is_right", "gradient_is_right"),
    [
        ("k1", "policy", True, False),
        ("k2", "policy", False, True),
        ("k3", "policy", True, False),
        ("k3+", "policy", True, True),
        ("weighted_k3", "policy", True, True),
        ("k3+", "other", False, False),
        ("weighted_k3", "other", True, True),
    ],
)
def test_which_estimates_are_unbiased(estimator, sampler, value_is_right, gradient_is_right):
    """The mean over all ids, weighed by who sampled them, against KL(policy || reference) itself."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    other, reference = (torch.tensor(x).double().log_softmax(0) for x in ([1.0, 0, 0, -1], [0.0, 1, 2, -2]))
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    behavior = logp.detach() if sampler == "policy" else other
    estimate = (behavior.exp() * objective.kl_estimate(logp, reference, estimator, behavior)).sum()
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert torch.allclose(estimate, exact) == value_is_right
    assert torch.allclose(gradient, expected) == gradient_is_right


@pytest.mark.parametrize(("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("k3+", "k3+")])
def test_kl_estimates_equal_verls_published_formulas(ours, theirs):
    logp = torch.tensor([-2.0, -0.5, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -1.7, -0.4, -1.1], dtype=torch.float64)
    found, expected = objective.kl_estimate(logp, reference, ours), verl_kl(logp, reference, theirs)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x.sum(), logp)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients)


def verl_kl(logp, reference, name):
    """As verl publishes them (verl/trainer/ppo/core_algos.py, kl_penalty, January 2026), where nothing reaches the
    bounds of its low_var_kl: exponents of 20 and estimates of 10."""
    d = reference - logp
    forward = {"kl": -d, "mse": 0.5 * d**2}.get(name, d.exp() - d - 1)
    assert d.abs().max() < 20
    assert forward.abs().max() < 10
    if not name.endswith("+"):
        return forward
    backward = 0.5 * d**2
    return backward - backward.detach() + forward.detach()


# Ratios 2, 2, 1/2, 1/2 and 1, with bounds 0.75 and 1.5.
BEHAVIOR = torch.full((5,), -1.0)
LOGP = BEHAVIOR + torch.tensor([LN2, LN2, -LN2, -LN2, 0])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])


def test_clipped_ratio_by_hand():
    logp = LOGP.clone().requires_grad_()
    found = objective.ratio_loss(objective.token_ratio(logp, BEHAVIOR), ADVANTAGES, 0.25, 0.5)
    found.sum().backward()
    assert found.tolist() == pytest.approx([-1.5, 2, -0.5, 0.75, -3])
    assert logp.grad.tolist() == pytest.approx([0, 2, -0.5, 0, -3])
    low, high = objective.clipped_tokens(objective.token_ratio(LOGP, BEHAVIOR), ADVANTAGES, 0.25, 0.5)
    assert low.tolist() == [False, False, False, True, False]
    assert high.tolist() == [True, False, False, False, False]


def test_a_ratio_without_bounds_is_not_clipped():
    found = objective.ratio_loss(objective.token_ratio(LOGP, BEHAVIOR), ADVANTAGES, None, None)
    assert found.tolist() == pytest.approx([-2, 2, -0.5, 0.5, -3])
    clipped = objective.clipped_tokens(objective.token_ratio(LOGP, BEHAVIOR), ADVANTAGES, None, None)
    assert not torch.stack(clipped).any()


def test_sequence_ratio_by_hand():
    """Sequence 0 has ratios 2 and 8, so 4; sequence 1 has 1/2 and 2, so 1; sequence 2 has 1/4 alone."""
    behavior = torch.full((5,), -1.0)
    logp = (behavior + LN2 * torch.tensor([1.0, 3, -1, 1, -2])).requires_grad_()
    sequences = torch.tensor([0, 0, 1, 1, 2])
    ratio = objective.sequence_ratio(logp, behavior, sequences)
    assert ratio.tolist() == pytest.approx([4, 4, 1, 1, 0.25])
    advantages = torch.tensor([1.0, 1, -3, -3, -2])
    options = objective.Options(ratio=True, of_sequences=True, clip_low=0.5, clip_high=9.0)
    lengths = torch.tensor([2.0, 2, 2, 2, 1])
    more = {"behavior_logprobs": behavior, "sequences": sequences, "lengths": lengths, "options": options}
    loss = objective.grpo_loss(logp, advantages, 1, **more)
    # -(4 * 1) - (1 * -3) - (clipped 1/2 * -2)
    assert loss.item() == pytest.approx(-4 + 3 + 1)
    loss.backward()
    # Of a sequence -A * ratio / length for each token; none where it is clipped.
    assert logp.grad.tolist() == pytest.approx([-2, -2, 1.5, 1.5, 0])
    low, high = objective.clipped_tokens(ratio.detach(), advantages, 0.5, 9.0)
    assert (low.tolist(), high.any().item()) == ([False] * 4 + [True], False)


def test_truncated_weights_by_hand():
    logp = LOGP.clone().requires_grad_()
    options = objective.Options(correction="truncate", correction_high=1.5)
    loss = objective.grpo_loss(logp, ADVANTAGES, 1, behavior_logprobs=BEHAVIOR, options=options)
    loss.backward()
    # The gradient is -A * weight: none flows through the weight.
    assert logp.grad.tolist() == pytest.approx([-1.5, 1.5, -0.5, 0.5, -3])
    corrected = objective.corrected_tokens(LOGP, BEHAVIOR, torch.zeros(5), options)
    assert corrected.tolist() == [True, True, False, False, False]


def test_geometric_mean_filter_by_hand():
    """Sequence 0 has ratios 2, 2 (mean 2), sequence 1 has 2, 1/2 (mean 1), sequence 2 has 1/2 alone."""
    behavior = torch.full((5,), -1.0)
    logp = (behavior + torch.tensor([LN2, LN2, LN2, -LN2, -LN2])).requires_grad_()
    sequences = torch.tensor([0, 0, 1, 1, 2])
    options = objective.Options(correction="filter", correction_low=0.9, correction_high=1.1)
    objective.grpo_loss(
        logp, torch.ones(5), 4, behavior_logprobs=behavior, sequences=sequences, options=options
    ).backward()
    assert logp.grad.tolist() == pytest.approx([0, 0, -0.25, -0.25, 0])
    corrected = objective.corrected_tokens(logp, behavior, sequences, options)
    assert corrected.tolist() == [True, True, False, False, True]


def test_geometric_mean_does_not_grow_with_the_length():
    """A thousand tokens at 0.05 nats each: the product is e^50, the geometric mean e^0.05."""
    behavior = torch.full((1000,), -3.0)
    kept = objective.geometric_mean_filter(behavior + 0.05, behavior, torch.zeros(1000, dtype=torch.long), 0.9, 1.1)
    assert kept.all()


def test_the_same_correction_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        objective.Options(ratio=True, correction="truncate", correction_high=2.0)


@pytest.mark.parametrize("correction", ["truncate", "filter"])
def test_ratios_that_a_correction_does_not_trust_do_not_weigh_the_kl(correction):
    with pytest.raises(ValueError, match="weighted_k3"):
        objective.Options("weighted_k3", correction=correction, correction_low=0.5, correction_high=2.0)


@pytest.mark.parametrize(
    ("normalization", "expected"), [("tokens", 2 / 4), ("sequences", (1 / 1 + 1 / 3) / 2), ("constant", 2 / 20)]
)
def test_normalizations_by_hand(normalization, expected):
    """Two episodes of 1 and 3 completion tokens, at most 10 allowed; one counted token with loss 1 in each."""
    lengths = torch.tensor([1.0, 3.0]) if normalization == "sequences" else None
    denominator = objective.loss_denominator(normalization, [1, 3], max_tokens=10)
    loss = objective.grpo_loss(torch.tensor([-1.0, -1.0]), torch.ones(2), denominator, lengths=lengths)
    assert loss.item() == pytest.approx(expected)


# Oracles

B, T, HIDDEN, VOCABULARY, LONGEST = 4, 7, 8, 23, 10
LOW, HIGH, CAP = 0.1, 0.15, 1.2
LOSS_TYPES = {"tokens": "dapo", "sequences": "grpo", "constant": "dr_grpo"}


@pytest.fixture
def batch():
    """Hidden states, head and rollouts; behaviour log-probs off the policy's, so that both clip bounds are met."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(B, T, HIDDEN), normal(VOCABULARY, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (B, T), generator=generator)
    logp = _logprobs(hidden, weight, targets)
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        targets=targets,
        mask=(torch.arange(T) < torch.tensor([7, 3, 5, 1]).unsqueeze(1)).float(),
        advantages=torch.tensor([1.0, -0.5, 2.0, -1.0]),
        behavior=logp + 0.3 * normal(B, T),
        reference=logp + 0.3 * normal(B, T),
    )


def _logprobs(hidden, weight, targets, temperature=1.0):
    logits = (hidden @ weight.T).reshape(-1, VOCABULARY)
    logp, _ = logprobs.token_logprobs(logits, targets.reshape(-1), temperature, logprobs.FULL)
    return logp.reshape(targets.shape)


def our_loss(logp, batch, normalization, kl_coeff, options, entropy=None, entropy_coeff=0.0):
    """The flat tensors of the loop: only tokens under the mask exist."""
    kept = batch.mask.bool()
    lengths = batch.mask.sum(1, keepdim=True).expand(B, T)
    denominator = objective.loss_denominator(normalization, batch.mask.sum(1).int().tolist(), LONGEST)
    return objective.grpo_loss(
        logp[kept],
        batch.advantages.unsqueeze(1).expand(B, T)[kept],
        denominator,
        batch.reference[kept] if kl_coeff else None,
        kl_coeff,
        behavior_logprobs=batch.behavior[kept],
        sequences=torch.arange(B).unsqueeze(1).expand(B, T)[kept],
        lengths=lengths[kept] if normalization == "sequences" else None,
        entropy=None if entropy is None else entropy[kept],
        entropy_coeff=entropy_coeff,
        options=options,
    )


def trl_loss(
    logp, batch, loss_type, kl_coeff, epsilon_high, weighted_kl=False, level="token", entropy=None, entropy_coef=0.0
):
    """GRPOTrainer's loss on given log-probs: its method, on a stand-in that has what it reads."""
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            *(logp, torch.zeros_like(logp) if entropy is None else entropy),
            None,
        ),
        _entropy_bonus_enabled=entropy_coef != 0.0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        _metrics={"train": _AnyList()},
        accelerator=accelerator,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=weighted_kl, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=kl_coeff,
        current_gradient_accumulation_steps=1,
        epsilon_high=epsilon_high,
        epsilon_low=LOW,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": batch.targets,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.behavior,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": batch.mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


class _AnyList(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


VARIANTS = [
    pytest.param(normalization, kl_coeff, objective.Options(ratio=True, clip_low=LOW, clip_high=HIGH), id=name)
    for normalization in LOSS_TYPES
    for kl_coeff, name in ((0.0, f"ratio-{normalization}"), (0.2, f"ratio-{normalization}-k3"))
]
TRUNCATED = objective.Options(correction="truncate", correction_high=CAP)
VARIANTS += [pytest.param("tokens", kl, TRUNCATED, id=f"truncate-tokens-{kl}") for kl in (0.0, 0.2)]


def _names_elsewhere(normalization, options):
    """Loss type and upper bound; truncated weights are the loss that TRL and Liger call CISPO."""
    return (LOSS_TYPES[normalization], HIGH) if options.ratio else ("cispo", CAP)


@pytest.mark.slow
@pytest.mark.parametrize(("normalization", "kl_coeff", "options"), VARIANTS)
def test_loss_and_gradient_equal_trls(batch, normalization, kl_coeff, options):
    ours, theirs = (_logprobs(batch.hidden, batch.weight, batch.targets).requires_grad_() for _ in range(2))
    loss_type, high = _names_elsewhere(normalization, options)
    expected = trl_loss(theirs, batch, loss_type, kl_coeff, high)
    found = our_loss(ours, batch, normalization, kl_coeff, options)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.slow
def test_the_entropy_term_equals_trls(batch):
    """Divided by tokens; TRL divides it by them whatever the rest is divided by."""
    options = objective.Options(ratio=True, clip_low=LOW, clip_high=HIGH)
    found = []
    for loss, name in ((our_loss, "entropy_coeff"), (trl_loss, "entropy_coef")):
        weight = batch.weight.clone().requires_grad_()
        logits = (batch.hidden @ weight.T).reshape(-1, VOCABULARY)
        logp, entropy = (x.reshape(B, T) for x in logprobs.token_logprobs(logits, batch.targets.flatten(), 0.8, FULL))
        own = ("tokens", 0.2, options) if loss is our_loss else ("dapo", 0.2, HIGH)
        value = loss(logp, batch, *own, entropy=entropy, **{name: 0.5})
        value.backward()
        found.append((value.detach(), weight.grad))
        without = loss(logp, batch, *own).detach()
        assert value.item() == pytest.approx(without.item() - 0.5 * entropy[batch.mask.bool()].mean().item(), rel=1e-5)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("normalization", LOSS_TYPES)
def test_weighted_kl_equals_trls(batch, normalization):
    """Liger's loss by blocks does not have it."""
    ours, theirs = (_logprobs(batch.hidden, batch.weight, batch.targets).requires_grad_() for _ in range(2))
    options = objective.Options("weighted_k3", ratio=True, clip_low=LOW, clip_high=HIGH)
    expected = trl_loss(theirs, batch, LOSS_TYPES[normalization], 0.2, HIGH, weighted_kl=True)
    found = our_loss(ours, batch, normalization, 0.2, options)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("normalization", LOSS_TYPES)
@pytest.mark.parametrize("kl_coeff", [0.0, 0.2])
def test_the_ratio_of_sequences_equals_trls(batch, normalization, kl_coeff):
    """Under "sequences" it is GSPO."""
    ours, theirs = (_logprobs(batch.hidden, batch.weight, batch.targets).requires_grad_() for _ in range(2))
    options = objective.Options(ratio=True, of_sequences=True, clip_low=LOW, clip_high=HIGH)
    expected = trl_loss(theirs, batch, LOSS_TYPES[normalization], kl_coeff, HIGH, level="sequence")
    found = our_loss(ours, batch, normalization, kl_coeff, options)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("normalization", "kl_coeff", "options"), VARIANTS)
def test_loss_and_gradient_equal_ligers(batch, normalization, kl_coeff, options):
    """Through the head: gradients of hidden states and head weight, at temperature 0.8."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_type, high = _names_elsewhere(normalization, options)
    liger = LigerFusedLinearGRPOLoss(
        beta=kl_coeff,
        compiled=False,
        use_ref_model=kl_coeff > 0,
        epsilon_low=LOW,
        epsilon_high=high,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        temperature=0.8,
    )
    ours, theirs = ([x.clone().requires_grad_() for x in (batch.hidden, batch.weight)] for _ in range(2))
    expected, _ = liger(
        theirs[0],
        theirs[1],
        batch.targets,
        batch.mask,
        batch.advantages,
        ref_per_token_logps=batch.reference if kl_coeff else None,
        old_per_token_logps=batch.behavior,
    )
    found = our_loss(_logprobs(*ours, batch.targets, temperature=0.8), batch, normalization, kl_coeff, options)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)
        assert our.grad.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("normalization", LOSS_TYPES)
def test_on_policy_gradient_equals_trls(batch, normalization):
    """The spec's loss has another value than a ratio of 1, but the same gradient."""
    ours, theirs = (_logprobs(batch.hidden, batch.weight, batch.targets).requires_grad_() for _ in range(2))
    batch.behavior = theirs.detach()
    our_loss(ours, batch, normalization, 0.2, objective.SPEC).backward()
    trl_loss(theirs, batch, LOSS_TYPES[normalization], 0.2, HIGH).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
