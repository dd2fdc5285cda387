"""Log-probabilities over their support, whole and by blocks: by hand, and equal to what real engines record."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from earl.config.schema import Config
from earl.emu3 import checkpoint, grid, sequence, truncation
from earl.engines import Request, SamplingParams
from earl.learner import batches, episodes, grpo, head, logprobs
from earl.learner.logprobs import FULL, Support
from earl.learner.settings import Settings
from earl.messages.errors import EarlError
from tests.support import policies
from tests.support.engines import ENGINES

VISUAL = (4, 6)  # ids 0..3 are text, 4 and 5 visual
SPLIT = logprobs.split_vocab(VISUAL)


def test_logprobs_over_each_support_by_hand():
    # exp(logits) = 1 2 3 4 | 1 3, so text sums to 10, visual to 4, all to 14.
    logits = torch.tensor([[1.0, 2, 3, 4, 1, 3]]).log().expand(2, -1)
    targets = torch.tensor([5, 1])
    split, split_entropy = logprobs.token_logprobs(logits, targets, 1.0, SPLIT)
    full, full_entropy = logprobs.token_logprobs(logits, targets, 1.0, FULL)
    assert split.tolist() == pytest.approx([math.log(3 / 4), math.log(2 / 10)], abs=1e-6)
    assert full.tolist() == pytest.approx([math.log(3 / 14), math.log(2 / 14)], abs=1e-6)

    def entropy(*weights: float) -> float:
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)

    assert split_entropy.tolist() == pytest.approx([entropy(1, 3), entropy(1, 2, 3, 4)], abs=1e-6)
    assert full_entropy.tolist() == pytest.approx([entropy(1, 2, 3, 4, 1, 3)] * 2, abs=1e-6)


def test_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, math.log(9.0), 0, 0, 0, 0]])
    # At temperature 2 the weights are 1 3 1 1.
    found, _ = logprobs.token_logprobs(logits, torch.tensor([1]), 2.0, SPLIT)
    assert found.item() == pytest.approx(math.log(3 / 6), abs=1e-6)


def test_entropy_of_a_masked_id_is_not_nan():
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf, 0, 0]])
    _, entropy = logprobs.token_logprobs(logits, torch.tensor([0]), 1.0, SPLIT)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_an_id_in_no_support_is_refused():
    with pytest.raises(ValueError, match="7"):
        logprobs.token_logprobs(torch.zeros(1, 9), torch.tensor([7]), 1.0, SPLIT)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        # 8 4 2 1 1 of 16: before each id lie 0, 1/2, 3/4, 14/16, 15/16.
        (-1, 0.49, [0]),
        (-1, 0.51, [0, 2]),
        (-1, 0.74, [0, 2]),
        (-1, 0.76, [0, 2, 3]),
        (-1, 1e-9, [0]),
        (2, 1.0, [0, 2]),
        # Equal ones by their ids.
        (4, 1.0, [0, 1, 2, 3]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        # Of the three that top_k leaves, 8 4 2 of 14, the first two have 12/14.
        (3, 0.85, [0, 2]),
        (3, 0.86, [0, 2, 3]),
    ],
)
def test_kept_ids_by_hand(top_k, top_p, expected):
    weights = torch.tensor([[8.0, 1, 4, 2, 1]], dtype=torch.float64)
    kept = truncation.kept_ids(weights.log().log_softmax(-1), top_k, top_p)
    assert kept[0].nonzero().squeeze(1).tolist() == expected


def test_logprobs_of_a_truncated_softmax_by_hand():
    """Text 8 4 2 1 and visual 1 3; top_k 2 keeps 8 4, and 1 3. The last target was cut off and is kept all the same."""
    logits = torch.tensor([[8.0, 4, 2, 1, 1, 3]]).log().repeat(3, 1).requires_grad_()
    logp, entropy = logprobs.token_logprobs(logits, torch.tensor([1, 5, 3]), 1.0, Support(SPLIT.parts, top_k=2))
    assert logp.tolist() == pytest.approx([math.log(4 / 12), math.log(3 / 4), math.log(1 / 13)], abs=1e-6)
    assert entropy[0].item() == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)), abs=1e-6)
    logp.sum().backward()
    # One-hot minus softmax over what is kept; nothing reaches the others.
    expected = [[-8 / 12, 8 / 12, 0, 0, 0, 0], [0, 0, 0, 0, -1 / 4, 1 / 4], [-8 / 13, -4 / 13, 0, 12 / 13, 0, 0]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


def test_truncation_follows_the_temperature():
    """At temperature 2 the weights 16 4 1 are 4 2 1, and 0.7 takes two of them instead of one."""
    logits, target = torch.tensor([[16.0, 4, 1]]).log(), torch.tensor([0])
    found = [logprobs.token_logprobs(logits, target, t, Support(((0, 3),), top_p=0.7))[0].item() for t in (1.0, 2.0)]
    assert found == pytest.approx([0, math.log(4 / 6)], abs=1e-6)


def test_a_temperature_for_each_token_by_hand():
    logits = torch.tensor([[0.0, math.log(16.0), 0, 0, 0, 0]]).repeat(3, 1).requires_grad_()
    found, _ = logprobs.token_logprobs(logits, torch.tensor([1, 1, 1]), torch.tensor([1.0, 2.0, 4.0]), SPLIT)
    assert found.exp().tolist() == pytest.approx([16 / 19, 4 / 7, 2 / 5], abs=1e-6)
    found.sum().backward()
    # (1 - p) / temperature
    assert logits.grad[:, 1].tolist() == pytest.approx([3 / 19, 3 / 7 / 2, 3 / 5 / 4], abs=1e-6)


def test_ids_beyond_the_tokenizer_belong_to_the_full_support_alone(vocabulary):
    def support(**fields):
        needed = {"run_name": "a", "base_exp_dir": "b", "train_paths_file": ["x"], "val_paths_file": []}
        return episodes.support(Config(**needed, judge="program", **fields), vocabulary)

    size, first = vocabulary.size, vocabulary.first_visual
    split, sampled = "separate_language_and_vision_vocabs", {"logprob_support": "sampled", "top_k": 7, "top_p": 0.9}
    assert support() == Support(((first, size), (0, first)))
    assert support(**{split: False}) == Support(((0, None),))
    assert support(top_k=7) == support()
    assert support(**sampled) == Support(((0, first), (first, size)), 7, 0.9)
    free = {split: False, "emu3_use_logit_processor": False}
    assert support(**free, **sampled) == Support(((0, size),), 7, 0.9)


def test_a_completion_off_the_grid_is_no_completion_of_the_sampler(vocabulary):
    """The support goes by the target; that its position asks for the same one is checked, not assumed."""
    shape, first = (2, 2), vocabulary.first_visual
    image = sequence.image_ids(np.arange(4).reshape(shape), vocabulary)
    completion = [*image[1:], vocabulary.eos]
    place = completion.index(first)

    def learn(completion, constrained=True):
        prompt = sequence.prompt_ids(np.zeros(shape, dtype=int), "swap them", "<|image start|>", vocabulary)
        row = {"episode_id": "e", "group_id": "g", "prompt_token_ids": prompt, "completion_token_ids": completion}
        outcome = episodes.Outcome(row | {"behavior_logprobs": [-1.0] * len(completion)}, 1.0, None, advantage=0.0)
        return episodes.learner_episodes([outcome], vocabulary, constrained, "iteration")

    assert len(learn(completion)) == 1
    completion[place] = vocabulary.pad
    with pytest.raises(EarlError, match=f"episode e: token {place} of column 'completion_token_ids' is not allowed"):
        learn(completion)
    assert len(learn(completion, constrained=False)) == 1


# By blocks

WIDTH, TOKENS, VOCABULARY = 8, 23, 200
LARGE = (130, 190)


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in {"TOKENS": 5, "IDS": 17, "SORTED": 190}.items():
        monkeypatch.setattr(head, name, value)


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, LARGE[1], (TOKENS,), generator=generator)
    temperatures = torch.rand(TOKENS, generator=generator) + 0.5
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, temperatures


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (12, 1.0), (-1, 0.7), (12, 0.7)])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_blocks_equal_the_whole_at_each_tokens_own_temperature(small_blocks, top_k, top_p, split, dtype, tolerance):
    support = Support(logprobs.split_vocab(LARGE).parts if split else FULL.parts, top_k, top_p)
    found = []
    for plain in (False, True):
        hidden, weight, targets, temperatures = make(dtype)
        if plain:
            logp, entropy = logprobs.token_logprobs(hidden @ weight.T, targets, temperatures, support)
        else:
            logp, entropy = head.token_logprobs(hidden, weight, targets, temperatures, support)
        (logp * torch.linspace(-1, 1, TOKENS, dtype=dtype)).sum().backward()
        found.append([logp.detach(), entropy, hidden.grad, weight.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        assert theirs.abs().max() > 1e-2


def test_gradcheck_with_what_is_kept_held_fixed(small_blocks):
    hidden, weight, targets, temperatures = make(torch.float64)
    hidden, targets, temperatures, support = hidden[:6], targets[:6], temperatures[:6], Support(((0, 200),), 9, 0.8)
    kept = head.kept_ids(hidden, weight, targets, temperatures, support)
    torch.autograd.gradcheck(
        lambda h, w: head.token_logprobs(h, w, targets, temperatures, support, kept=kept)[0],
        (hidden, weight),
        fast_mode=True,
    )


def test_another_model_is_seen_on_the_ids_that_the_policy_keeps(small_blocks):
    """The reference's own top ids might not hold the sampled one; the KL of two models needs one set of ids."""
    hidden, weight, targets, _ = make(torch.float32)
    support = Support(FULL.parts, top_k=3)
    kept = head.kept_ids(hidden, weight, targets, 1.0, support)
    other = weight.detach().flip(0)
    found, _ = head.token_logprobs(hidden, other, targets, 1.0, support, kept=kept)
    mask = logprobs.kept_ids((hidden @ weight.T).detach(), targets, support)
    assert set(mask.sum(1).tolist()) == {3, 4}
    expected = (hidden @ other.T).masked_fill(~mask, -torch.inf).log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(found, expected)


def test_bits_come_back_from_anywhere():
    kept = torch.rand(3, 29, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = head._pack(kept)
    assert packed.shape == (3, 4)
    for start, end in ((0, 29), (3, 20), (8, 16), (15, 29), (28, 29)):
        assert torch.equal(head._unpack(packed, start, end), kept[:, start:end])


# What engines record


@pytest.fixture(scope="module")
def picky(tmp_path_factory):
    return policies.write(tmp_path_factory.mktemp("policies") / "picky", policies.be_picky)


def rollouts(engine, policy, vocabulary, params):
    """Completions of four prompts, two samples each, as the learner takes them."""
    found, shapes = [], [(3, 3), (2, 5), (4, 2), (3, 3)]
    prompts = [
        sequence.prompt_ids(np.full(shape, index), "remove it", sequence.START_THINKING, vocabulary)
        for index, shape in enumerate(shapes)
    ]
    engine.load(policy)
    requests = [Request(prompts[index], shapes[index], [2 * index, 2 * index + 1]) for index in range(4)]
    for index, group in enumerate(engine.generate(requests, params)):
        for sample, completion in enumerate(group):
            ids = np.array(completion.token_ids)
            forced = grid.kinds_of_completion(ids, shapes[index], vocabulary) >= grid.FIRST_FORCED
            behavior = np.array(completion.logprobs, dtype=np.float32)
            names = f"{index}-{sample}", str(index)
            found.append(batches.Episode(*names, np.array(prompts[index]), ids, forced, behavior, (-1.0) ** sample))
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, -1), (1.0, 5), (0.8, 12)])
def test_a_truncated_rollout_passes_the_parity_gate(request, picky, vocabulary, engine, top_p, top_k):
    """The learner finds again what the sampler kept, and learns; over the split vocabulary it is stopped."""
    params = SamplingParams(0.8, top_p=top_p, top_k=top_k, max_tokens=60)
    sampled = rollouts(request.getfixturevalue(f"{engine}_engine"), picky, vocabulary, params)
    support = Support(tuple(grid.free_ranges(vocabulary).values()), top_k, top_p)
    visual = (vocabulary.first_visual, vocabulary.size)
    settings = Settings(0.1, 0.8, 3, visual, support, "all", False, parity_tolerance=1e-5)
    reference = checkpoint.load_policy(picky, torch.float32, "cpu").requires_grad_(False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.8)

    def learn(settings):
        model = checkpoint.load_policy(picky, torch.float32, "cpu")
        return grpo.train_iteration(model, reference, torch.optim.SGD(model.parameters(), lr=0.0), sampled, settings)

    metrics = learn(settings)
    assert metrics["logprob_mismatch_max"] < 1e-3
    assert 1e-5 < metrics["kl"] < 10
    assert metrics["gradient_norm"] > 1e-3
    assert 0 < metrics["entropy"] < math.log(top_k if top_k > 0 else vocabulary.size)
    with pytest.raises(EarlError, match="Set logprob_support to `sampled`"):
        learn(replace(settings, support=logprobs.split_vocab(visual), parity_tolerance=0.05))
