"""DPO: the loss by hand and against TRL's, and what must not change a step on it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from earl.emu3 import checkpoint
from earl.learner import objective, sft
from tests.support import adapters
from tests.support.sft_files import SETTINGS

BETA = 0.5
DPO = replace(SETTINGS, dpo_beta=BETA)


# The formula


def test_loss_and_gradient_by_hand():
    """Two pairs, beta 0.5. Log-ratios of the first: 1 + 1 and -2, margin 0.5 * 4 = 2. Of the second: 0 and 0.

    The gradient of a token is -beta * sigmoid(-margin) / 2, with the other sign for a worse completion's.
    """
    logp = torch.tensor([-1.0, -1.0, -3.0, -2.0, -2.0], requires_grad=True)
    reference = torch.tensor([-2.0, -2.0, -1.0, -2.0, -2.0])
    margins = objective.dpo_margins(logp, reference, torch.tensor([0, 0, 1, 2, 3]), BETA)
    assert margins.tolist() == [2.0, 0.0]
    loss = objective.dpo_loss(margins, 2)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log(2)) / 2)
    loss.backward()
    first, second = 0.5 / (1 + math.exp(2)) / 2, 0.5 * 0.5 / 2
    assert logp.grad.tolist() == pytest.approx([-first, -first, first, -second, second])


@pytest.mark.slow  # TRL takes seconds to import
def test_loss_and_gradient_equal_trls():
    from trl import DPOTrainer

    lengths, generator = [3, 5, 4, 2], torch.Generator().manual_seed(0)  # two better completions, then two worse ones
    ours, reference = (torch.randn(4, 6, generator=generator) - 2 for _ in range(2))
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    mask = torch.tensor([[0] + [1] * length + [0] * (6 - length) for length in lengths])

    def model(logps):
        found = dict.fromkeys(("entropy", "mean_logits"), torch.zeros(4, 6)) | {"is_top1": torch.zeros(4, 6).bool()}
        return lambda **_: SimpleNamespace(log_probs=logps * mask[:, 1:], **found)

    class Metrics(dict):
        def __missing__(self, key):
            return self.setdefault(key, [])

    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=accelerator,
        aux_loss_enabled=False,
        beta=BETA,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = {"input_ids": torch.ones(4, 7, dtype=torch.long), "attention_mask": torch.ones(4, 7)}
    better, worse = (reference * mask[:, 1:]).sum(1).chunk(2)
    inputs |= {"completion_mask": mask, "ref_chosen_logps": better, "ref_rejected_logps": worse}
    expected = DPOTrainer._compute_loss(trainer, model(theirs), inputs, False)
    expected.backward()

    counted = mask[:, 1:].bool()
    index = torch.tensor([0, 2, 1, 3])[:, None].expand(4, 6)  # pair by pair: better, worse
    margins = objective.dpo_margins(ours[counted], reference[counted], index[counted], BETA)
    loss = objective.dpo_loss(margins, 2)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert margins.mean().item() == pytest.approx(trainer._metrics["train"]["rewards/margins"][0], rel=1e-5)


# The step


@pytest.fixture
def pairs(vocabulary):
    """Five pairs, of completions of unequal lengths."""
    rng = np.random.default_rng(0)
    ids = [[rng.integers(0, vocabulary.size, n) for n in (4 + 3 * i, 3 + 2 * i, 12 - 2 * i)] for i in range(5)]
    return [sft.Example(prompt, better, rejected=worse) for prompt, better, worse in ids]


@pytest.fixture
def policies(policy_folder):
    """A policy, and a reference that differs from it."""
    policy, reference = (checkpoint.load_policy(policy_folder, torch.float32, "cpu") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference.requires_grad_(False)


def step(policies, pairs, settings=DPO):
    policy, reference = policies
    policy.zero_grad()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    settings = replace(settings, learning_rate=0.0, max_gradient_norm=None)
    done = sft.train_step(policy, optimizer, pairs, settings, 0, None, reference)
    return done, torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def plain(policies, pairs):
    """One sequence at a time, logits of every token over the whole vocabulary."""
    policy, reference = policies
    policy.zero_grad()

    def logp(model, prompt, completion):
        ids = torch.from_numpy(np.concatenate([prompt, completion]))
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).sum()

    margins = []
    for pair in pairs:
        better, worse = (
            logp(policy, pair.prompt, one) - logp(reference, pair.prompt, one)
            for one in (pair.completion, pair.rejected)
        )
        margins.append(BETA * (better - worse))
    loss = -F.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    return loss.item(), margins, torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 4, 16])
def test_step_is_that_of_plain_log_probs(policies, pairs, packed, micro_batch):
    loss, margins, gradient = plain(policies, pairs)
    done, found = step(policies, pairs, replace(DPO, packed=packed, micro_batch=micro_batch))
    assert done.loss == pytest.approx(loss, rel=1e-4)
    assert done.margin == pytest.approx(torch.stack(margins).mean().item(), rel=1e-3)
    assert done.accuracy == sum(margin > 0 for margin in margins) / len(pairs)
    assert (found - gradient).norm() < 1e-3 * gradient.norm()


def test_from_the_reference_itself_it_starts_at_ln_2(policies, pairs):
    _, reference = policies
    done, gradient = step((reference.requires_grad_(True), reference), pairs)
    assert done.loss == pytest.approx(math.log(2), rel=1e-6)
    assert done.margin == 0
    assert gradient.norm() > 1e-3


def test_held_out_loss_is_that_of_a_step(policies, pairs):
    done, _ = step(policies, pairs)
    assert sft.validation_loss(policies[0], pairs, DPO, None, policies[1]) == pytest.approx(done.loss, rel=1e-5)


def test_an_adapter_is_compared_with_its_base(policy_folder, pairs):
    """The policy, without its adapter, is the reference."""
    policy, base = adapters.strong(policy_folder), checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    losses = [sft.validation_loss(policy, pairs, DPO, None, reference) for reference in (policy, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - math.log(2)) > 1e-3
