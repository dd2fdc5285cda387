"""What every rollout engine promises, shown on the torch engine."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from earl.emu3 import checkpoint, grid, sequence
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine, sample, truncate
from earl.errors import EarlError
from earl.learner import objective

FREE = SamplingParams(temperature=1.0, max_tokens=64)


@pytest.fixture(scope="module")
def engine(policy_folder):
    torch.set_num_threads(1)
    engine = TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, constrained=True)
    engine.load(policy_folder)
    return engine


@pytest.fixture(scope="module")
def requests(vocabulary):
    """Six prompts of different lengths and grids, two samples each."""
    shapes = [(3, 3), (2, 5), (4, 2), (1, 1), (3, 3), (5, 4)]
    rng = np.random.default_rng(0)
    prompts = [
        sequence.prompt_ids(
            rng.integers(0, 256, shape), "remove the red circle" * (i % 3), "<|image start|>", vocabulary
        )
        for i, shape in enumerate(shapes)
    ]
    return [
        Request(prompt, shape, seeds=[10 * i, 10 * i + 1])
        for i, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True))
    ]


def flat(completions):
    return [completion for group in completions for completion in group]


def test_completions_are_valid_images_of_the_originals_size(engine, requests, vocabulary):
    for request, group in zip(requests, engine.generate(requests, FREE), strict=True):
        for completion in group:
            assert completion.finish_reason == "stop"
            assert completion.token_ids[-1] == vocabulary.eos
            assert sequence.parse_completion(completion.token_ids, vocabulary).shape == request.grid


def test_forced_reasoning_ends_in_an_image_or_at_the_limit(engine, vocabulary):
    tokens = np.zeros((2, 2), int)
    prompt = sequence.prompt_ids(tokens, "x", sequence.START_THINKING + " <|image start|>", vocabulary)
    short = dataclasses.replace(FREE, max_tokens=6)
    for completion in flat(engine.generate([Request(prompt, (2, 2), [1, 2])], short)):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == 6


def test_a_completion_depends_on_its_seed_alone(engine, requests):
    together = engine.generate(requests, FREE)
    aligned = engine.generate(requests[:4], FREE) + engine.generate(requests[4:], FREE)
    assert together == aligned
    other = engine.generate([dataclasses.replace(r, seeds=[s + 1000 for s in r.seeds]) for r in requests], FREE)
    assert flat(other) != flat(together)


def test_log_probs_are_those_that_the_learner_computes(engine, requests, policy_folder, vocabulary):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    params = dataclasses.replace(FREE, temperature=0.7)
    visual = (vocabulary.first_visual, vocabulary.size)
    for request, group in zip(requests, engine.generate(requests, params), strict=True):
        for completion in group:
            ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = policy(ids).logits[0, len(request.prompt_token_ids) - 1 : -1]
            expected, _ = objective.token_logprobs(logits, ids[0, -len(completion.token_ids) :], 0.7, visual, True)
            forced = grid.kinds_of_completion(completion.token_ids, request.grid, vocabulary) >= grid.FIRST_FORCED
            found = np.array(completion.logprobs)
            assert (found[forced] == 0).all()
            assert np.abs(found - expected.numpy())[~forced].mean() < 1e-5


def test_greedy_equals_transformers_generate_under_the_same_constraint(engine, requests, policy_folder, vocabulary):
    from transformers import LogitsProcessorList

    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    masks = torch.from_numpy(grid.allowed_masks(vocabulary))
    for request in requests[:3]:
        length = len(request.prompt_token_ids)

        def constrain(ids, scores, request=request, length=length):
            generated = ids[0, length:].tolist()
            k = len(generated) - generated.index(vocabulary.img) - 1 if vocabulary.img in generated else -1
            return scores.masked_fill(~masks[int(grid.kind_at(np.array(k), *request.grid))], -torch.inf)

        expected = policy.generate(
            torch.tensor([request.prompt_token_ids]),
            attention_mask=torch.ones(1, length),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=vocabulary.eos,
            logits_processor=LogitsProcessorList([constrain]),
        )[0, length:].tolist()
        greedy = engine.generate([request], SamplingParams(temperature=0, max_tokens=64))
        assert flat(greedy)[0].token_ids == expected


def test_without_the_constraint_any_id_may_come(policy_folder, requests, vocabulary):
    free = TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, constrained=False)
    free.load(policy_folder)
    flat_policy = dataclasses.replace(FREE, temperature=5.0)
    kinds = [
        (grid.allowed_masks(vocabulary)[grid.kinds_of_completion(c.token_ids, r.grid, vocabulary), c.token_ids]).all()
        for r, group in zip(requests, free.generate(requests, flat_policy), strict=True)
        for c in group
    ]
    assert not all(kinds)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (5, 1.0), (-1, 0.6), (6, 0.8)])
def test_samples_follow_the_truncated_softmax(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 40)
    logits[0, 7:12] = -torch.inf
    params = SamplingParams(temperature=0.9, top_p=top_p, top_k=top_k)
    count = 20_000
    noise = torch.from_numpy(np.random.default_rng(1).random(count))
    tokens, logprobs = sample(logits.expand(count, -1), noise, params)
    # The expected distribution, by plain NumPy: softmax, keep the top k, renormalise, keep the top p, renormalise.
    p = np.exp(logits[0].double().numpy() / 0.9)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k > 0:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[before >= top_p]] = 0
    p /= p.sum()
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


def test_samples_that_do_not_fill_batches_are_an_error(engine, requests):
    with pytest.raises(EarlError, match="engine_batch_size is 8, which is no multiple of the 3 samples"):
        engine.generate([dataclasses.replace(requests[0], seeds=[1, 2, 3])], FREE)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: is missing"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_a_broken_policy_folder_is_named(engine, policy_folder, tmp_path, spoil, complaint):
    import shutil

    broken = tmp_path / "policy"
    shutil.copytree(policy_folder, broken)
    spoil(broken)
    with pytest.raises(EarlError, match=complaint):
        engine.load(broken)


def test_weights_that_are_not_finite_are_refused(policy_folder, tmp_path):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    with torch.no_grad():
        policy.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    checkpoint.save_policy(policy, tmp_path, tokenizer_from=policy_folder)
    with pytest.raises(EarlError, match=r"weight 'model.layers.2.mlp.up_proj.weight' is not finite"):
        checkpoint.load_policy(tmp_path, torch.float32, "cpu")
