"""The learning loop on episodes in memory: what changes the step, and what must not."""

import itertools
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from earl.emu3 import checkpoint
from earl.learner import batches, grpo, head, logprobs, objective, sharding, signal
from earl.learner.settings import Settings
from earl.messages.errors import EarlError
from earl.shapes import policy
from tests.support import adapters

GROUPS, SAMPLES = 4, 2


@pytest.fixture(scope="module")
def episodes(vocabulary):
    """Groups of two completions of unequal length, with one prompt and opposite advantages."""
    return [_episode(group, sample, vocabulary) for group in range(GROUPS) for sample in range(SAMPLES)]


def _episode(group: int, sample: int, vocabulary) -> batches.Episode:
    prompt = np.random.default_rng(group).integers(0, vocabulary.size, 9 + group)
    completion = np.random.default_rng([group, sample]).integers(0, vocabulary.size, 5 + 2 * sample + group)
    forced = np.arange(len(completion)) == 2
    behavior = np.full(len(completion), -2.0, dtype=np.float32)
    names = f"{group:04d}-{sample:02d}", f"{group:04d}"
    return batches.Episode(*names, prompt, completion, forced, behavior, (-1.0) ** sample * (1 + group))


@pytest.fixture(scope="module")
def settings(vocabulary):
    visual = (vocabulary.first_visual, vocabulary.size)
    return Settings(0.0, 1.0, 3, visual, logprobs.split_vocab(visual), "all", False)


@pytest.fixture
def learn(policy_folder, monkeypatch):
    """Return a function that does an iteration with SGD of rate 0, and returns its metrics and last gradient, whole."""
    monkeypatch.setattr(grpo, "MAX_GRADIENT_NORM", float("inf"))

    def run(episodes, settings, reference=None):
        model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        metrics = grpo.train_iteration(model, reference, optimizer, episodes, settings)
        return metrics, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    return run


def with_learners_logprobs(episodes, policy_folder, settings, shift=0.0):
    """Episodes as if a sampler of the learner's own arithmetic had made them, its log-probs off by `shift`."""
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    found = []
    for episode in episodes:
        batch = batches.collate([replace(episode, forced=np.zeros_like(episode.forced))], settings, model.device)
        with torch.no_grad():
            logp, _, _ = grpo.completion_logprobs(model, batch, settings)
        found.append(replace(episode, behavior_logprobs=(logp - shift).numpy()))
    return found


def assert_same_gradient(found, expected, tolerance=1e-4):
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("normalization", ["tokens", "sequences", "constant"])
def test_micro_batches_change_the_step_by_rounding_alone(episodes, settings, learn, normalization):
    settings = replace(settings, normalization=normalization, max_completion_tokens=20)
    expected, gradient = learn(episodes, replace(settings, micro_batch=1))
    for size in (3, 8):
        metrics, found = learn(episodes, replace(settings, micro_batch=size))
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert_same_gradient(found, gradient)


T, V = math.log(457), math.log(256)


@pytest.fixture
def uniform(policy_folder, vocabulary):
    """A policy to which all text ids are equally likely (a log-prob of -`T`), and all visual ones (-`V`)."""
    assert (math.log(vocabulary.first_visual), math.log(vocabulary.num_visual)) == (T, V)
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.fixture
def kinds(vocabulary):
    """Three episodes of t(ext), v(isual) and f(orced text) tokens: the last was cut off before its image began."""
    ids = {"t": 1, "v": vocabulary.first_visual + 1, "f": vocabulary.eol}
    prompt = np.arange(4)

    def episode(index: int, tokens: str) -> batches.Episode:
        completion = np.array([ids[token] for token in tokens])
        forced = np.array([token == "f" for token in tokens])
        behavior = np.zeros(len(tokens), dtype=np.float32)
        return batches.Episode(f"0-{index}", "0", prompt, completion, forced, behavior, float(index + 1))

    return [episode(index, tokens) for index, tokens in enumerate(("ttvvf", "tvvvvf", "tt"))]


BY_HAND = {
    # Advantages 1, 2, 3; a forced token adds nothing and is divided by.
    ("all", "tokens"): (10 * T + 10 * V) / 13,
    ("all", "sequences"): ((2 * T + 2 * V) / 5 + (2 * T + 8 * V) / 6 + 6 * T / 2) / 3,
    ("all", "constant"): (10 * T + 10 * V) / 30,
    ("text", "tokens"): 10 * T / 7,
    ("text", "sequences"): (2 * T / 3 + 2 * T / 2 + 6 * T / 2) / 3,
    ("text", "constant"): 10 * T / 30,
    ("visual", "tokens"): 10 * V / 6,
    ("visual", "sequences"): (2 * V / 2 + 8 * V / 4) / 2,  # the third episode has no visual token to average over
    ("visual", "constant"): 10 * V / 30,
}


@pytest.mark.parametrize(("counted", "normalization"), BY_HAND)
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_divided_by_tokens_of_the_kind_that_trains(
    kinds, uniform, settings, counted, normalization, packed
):
    settings = replace(settings, counted=counted, normalization=normalization, max_completion_tokens=10, packed=packed)
    optimizer = torch.optim.SGD(uniform.parameters(), lr=0.0)
    for size in (1, 2, 8):
        metrics = grpo.train_iteration(uniform, None, optimizer, kinds, replace(settings, micro_batch=size))
        assert metrics["loss"] == pytest.approx(BY_HAND[counted, normalization], rel=1e-5)


@pytest.mark.parametrize(("counted", "active"), [("all", 13), ("text", 7), ("visual", 6)])
def test_metrics_tell_what_counts_and_what_it_is_divided_by(kinds, uniform, settings, counted, active):
    optimizer = torch.optim.SGD(uniform.parameters(), lr=0.0)
    metrics = grpo.train_iteration(uniform, None, optimizer, kinds, replace(settings, counted=counted))
    forced = {"all": 2, "text": 2, "visual": 0}[counted]
    assert (metrics["active_tokens"], metrics["counted_tokens"]) == (active, active - forced)


def test_kl_estimates_and_mean_log_probs_by_hand(kinds, uniform, settings, monkeypatch):
    """The reference finds every token ln 2 likelier: k1 = -ln 2, k3 = 2 - 1 - ln 2. The policy finds it 1.5 times
    as likely as the one that sampled it."""
    likelier = math.log(2)
    kinds = [
        replace(one, behavior_logprobs=np.float32(np.where(one.completion == 1, -T, -V) - math.log(1.5)))
        for one in kinds
    ]
    plain = grpo.completion_logprobs
    calls = itertools.count()

    def shifted(*args):
        logp, entropy, kept = plain(*args)
        return logp + likelier * (next(calls) % 2), entropy, kept  # policy and reference take turns

    monkeypatch.setattr(grpo, "completion_logprobs", shifted)
    optimizer = torch.optim.SGD(uniform.parameters(), lr=0.0)
    metrics = grpo.train_iteration(uniform, uniform, optimizer, kinds, replace(settings, kl_coeff=0.5))
    k3 = 1 - likelier
    assert metrics["kl_k1"] == pytest.approx(-likelier, rel=1e-5)
    assert metrics["kl"] == pytest.approx(1.5 * k3, rel=1e-5), "weighed by how much likelier the policy finds a token"
    assert metrics["policy_loss"] == pytest.approx((10 * T + 10 * V) / 13, rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(0.5 * k3 * 11 / 13, rel=1e-5), "11 of 13 tokens are free"
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + metrics["kl_loss"], rel=1e-6)
    assert metrics["logprob_mean"] == pytest.approx(-(5 * T + 6 * V) / 11, rel=1e-5)
    assert metrics["reference_logprob_mean"] == pytest.approx(metrics["logprob_mean"] + likelier, rel=1e-5)


ENTROPY_BY_HAND = {
    # The entropy of a uniform choice is the log of how many there are: T of the free text tokens, V of visual ones.
    ("all", "tokens"): (5 * T + 6 * V) / 13,
    ("all", "sequences"): ((2 * T + 2 * V) / 5 + (T + 4 * V) / 6 + 2 * T / 2) / 3,
    ("visual", "constant"): 6 * V / 30,
}


@pytest.mark.parametrize(("counted", "normalization"), ENTROPY_BY_HAND)
@pytest.mark.parametrize("packed", [False, True])
def test_the_entropy_term_by_hand(kinds, uniform, settings, counted, normalization, packed):
    settings = replace(settings, counted=counted, normalization=normalization, max_completion_tokens=10, packed=packed)
    optimizer = torch.optim.SGD(uniform.parameters(), lr=0.0)
    for size in (1, 8):
        settings = replace(settings, micro_batch=size, entropy_coeff=0.25)
        metrics = grpo.train_iteration(uniform, None, optimizer, kinds, settings)
        assert metrics["entropy_loss"] == pytest.approx(-0.25 * ENTROPY_BY_HAND[counted, normalization], rel=1e-5)
        assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + metrics["entropy_loss"], rel=1e-6)
    without = grpo.train_iteration(uniform, None, optimizer, kinds, replace(settings, entropy_coeff=0.0))
    assert without["entropy_loss"] is None
    assert without["entropy"] == pytest.approx(metrics["entropy"])


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_and_blocks_change_the_entropy_term_by_rounding_alone(
    episodes, settings, learn, packed, monkeypatch
):
    plain = learn(episodes, replace(settings, packed=packed))[1]
    settings = replace(settings, packed=packed, entropy_coeff=0.5)
    _, expected = learn(episodes, replace(settings, micro_batch=1))
    assert (expected - plain).norm() > 1e-2 * plain.norm()
    monkeypatch.setattr(head, "TOKENS", 7)
    monkeypatch.setattr(head, "IDS", 50)
    for size in (2, 8):
        assert_same_gradient(learn(episodes, replace(settings, micro_batch=size))[1], expected)


def test_a_step_on_entropy_alone_raises_it(episodes, settings, policy_folder):
    indifferent = [replace(episode, advantage=0.0) for episode in episodes]
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that there is something to raise
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = replace(settings, entropy_coeff=1.0)
    found = [grpo.train_iteration(model, None, optimizer, indifferent, step)["entropy"] for _ in range(4)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 1e-3


def test_without_a_reference_there_is_no_kl_to_tell(kinds, uniform, settings):
    optimizer = torch.optim.SGD(uniform.parameters(), lr=0.0)
    metrics = grpo.train_iteration(uniform, None, optimizer, kinds, settings)
    assert metrics["policy_loss"] == pytest.approx(metrics["loss"])
    assert [metrics[name] for name in ("kl", "kl_k1", "kl_loss", "reference_logprob_mean")] == [None] * 4


def test_micro_batches_do_not_cut_what_the_filter_looks_at(episodes, settings, learn, policy_folder):
    same = with_learners_logprobs(episodes, policy_folder, settings)
    off = with_learners_logprobs(episodes, policy_folder, settings, shift=0.3)
    episodes = same[:5] + off[5:]
    options = objective.Options(correction="filter", correction_low=0.9, correction_high=1.1)
    expected, gradient = learn(episodes, replace(settings, options=options, micro_batch=1))
    metrics, found = learn(episodes, replace(settings, options=options, micro_batch=8))
    assert 0 < expected["corrected_fraction"] < 1
    assert metrics["corrected_fraction"] == expected["corrected_fraction"]
    assert_same_gradient(found, gradient)


@pytest.mark.parametrize(
    "options",
    [
        objective.Options(ratio=True, clip_low=0.2, clip_high=0.2),
        objective.Options(correction="truncate", correction_high=2.0),
        objective.Options(correction="filter", correction_low=0.9, correction_high=1.1),
    ],
)
def test_on_the_samplers_own_policy_every_variant_takes_the_same_step(
    episodes, settings, learn, policy_folder, options
):
    episodes = with_learners_logprobs(episodes, policy_folder, settings)
    _, expected = learn(episodes, settings)
    metrics, found = learn(episodes, replace(settings, options=options))
    assert_same_gradient(found, expected)
    assert metrics["logprob_mismatch_max"] < 1e-4
    fractions = {metrics[name] for name in ("clip_fraction_low", "clip_fraction_high", "corrected_fraction")}
    assert fractions <= {0.0, None}
    assert 0.0 in fractions


def test_truncated_weights_scale_the_step(episodes, settings, learn, policy_folder):
    """Behaviour log-probs ln 3 too low give every token the ratio 3, truncated to 2."""
    episodes = with_learners_logprobs(episodes, policy_folder, settings, shift=float(np.log(3)))
    _, plain = learn(episodes, settings)
    options = objective.Options(correction="truncate", correction_high=2.0)
    metrics, found = learn(episodes, replace(settings, options=options))
    assert metrics["corrected_fraction"] == 1.0
    assert_same_gradient(found, 2 * plain)


def test_mini_batches_hold_whole_groups_and_every_episode_once(episodes):
    parts = grpo.mini_batches(episodes, 3)
    assert sorted(episode.episode_id for part in parts for episode in part) == [e.episode_id for e in episodes]
    groups = [{episode.group_id for episode in part} for part in parts]
    assert [len(group) for group in groups] == [1, 1, 2]
    assert len(set().union(*groups)) == GROUPS
    assert len(grpo.mini_batches(episodes[:3], 4)) == 2, "no more steps than groups"


def test_each_step_sees_its_mini_batch_alone(episodes, settings, learn, policy_folder):
    """With rate 0 the policy stays, so the second of two steps has the gradient of its half alone."""
    episodes = with_learners_logprobs(episodes, policy_folder, settings, shift=0.1)
    options = objective.Options(ratio=True)
    settings = replace(settings, options=options)
    both, gradient = learn(episodes, replace(settings, optimizer_steps=2))
    first, _ = learn(episodes[:4], settings)
    second, expected = learn(episodes[4:], settings)
    assert_same_gradient(gradient, expected)
    assert both["steps"] == 2
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert both["gradient_norm"] == pytest.approx((first["gradient_norm"] + second["gradient_norm"]) / 2)
    assert both["counted_tokens"] == first["counted_tokens"] + second["counted_tokens"]
    assert both["logprob_mismatch_mean"] == first["logprob_mismatch_mean"], "of the policy that sampled alone"


@pytest.mark.parametrize("steps", [1, 2])
def test_parity_looks_at_the_mean_before_the_first_step(episodes, settings, learn, policy_folder, steps):
    episodes = with_learners_logprobs(episodes, policy_folder, settings, shift=0.1)
    settings = replace(settings, optimizer_steps=steps, options=objective.Options(ratio=True))
    metrics, _ = learn(episodes, replace(settings, parity_tolerance=0.101))
    assert metrics["logprob_mismatch_mean"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(EarlError, match=r"parity_tolerance = 0\.099"):
        learn(episodes, replace(settings, parity_tolerance=0.099))


def test_the_head_by_blocks_changes_the_step_by_rounding_alone(episodes, settings, learn, policy_folder, monkeypatch):
    reference = checkpoint.load_policy(policy_folder, torch.float32, "cpu").requires_grad_(False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    settings = replace(settings, kl_coeff=0.1)
    episodes = with_learners_logprobs(episodes, policy_folder, settings)
    expected, gradient = learn(episodes, settings, reference)
    monkeypatch.setattr(head, "TOKENS", 7)
    monkeypatch.setattr(head, "IDS", 50)
    metrics, found = learn(episodes, settings, reference)
    for name in ("loss", "entropy", "kl", "gradient_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert metrics["kl"] > 1e-3
    assert_same_gradient(found, gradient)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_packed_groups_change_the_step_by_rounding_alone(episodes, settings, learn, policy_folder, micro_batch):
    """Whole groups, cut ones and single episodes in a row, with behaviour log-probs that show exchanged tokens."""
    episodes = with_learners_logprobs(episodes, policy_folder, settings, shift=0.1)
    settings = replace(settings, micro_batch=micro_batch, options=objective.Options(ratio=True, clip_high=0.2))
    expected, gradient = learn(episodes, settings)
    metrics, found = learn(episodes, replace(settings, packed=True))
    for name in ("loss", "entropy", "logprob_mismatch_mean", "logprob_mismatch_max", "gradient_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
    assert_same_gradient(found, gradient)


def test_a_packed_row_holds_each_prompt_once_and_no_padding(episodes, settings):
    batch = batches.collate(episodes, replace(settings, packed=True), torch.device("cpu"))
    prompts = {episode.group_id: len(episode.prompt) for episode in episodes}
    assert batch.input_ids.shape == (1, sum(prompts.values()) + sum(len(e.completion) for e in episodes))
    own = batch.groups[1].completions[1]
    assert batch.input_ids[0, own].tolist() == episodes[3].completion.tolist()
    assert batch.position_ids[0, own].tolist() == list(range(10, 10 + len(episodes[3].completion)))


def test_packing_leaves_the_model_as_it_was(episodes, settings, policy_folder):
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    usual = model.config._attn_implementation
    for packed in (True, False):
        batch = batches.collate(episodes[:2], replace(settings, packed=packed), model.device)
        grpo.completion_logprobs(model, batch, settings)
        assert model.config._attn_implementation == usual


@pytest.mark.parametrize("packed", [True, False])
def test_recomputed_layers_give_the_same_bits(episodes, settings, learn, packed):
    settings = replace(settings, packed=packed)
    metrics, gradient = learn(episodes, settings)
    again, found = learn(episodes, replace(settings, gradient_checkpointing=True))
    assert again == metrics
    assert torch.equal(found, gradient)


def test_recomputing_runs_each_layer_twice_and_turns_no_dropout_on(episodes, settings, policy_folder):
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    runs = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda *_: runs.append([m for m in model.modules() if m.training]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grpo.train_iteration(model, None, optimizer, episodes, replace(settings, gradient_checkpointing=True))
    assert len(runs) == 2 * len(batches.cut_episodes(episodes, settings, 1))
    assert all(training == list(model.model.layers) for training in runs)


def exact_attention(query, key, value, softmax_scale, causal, deterministic):
    """flash-attn's function as documented: [B, L, H, D], perhaps fewer key heads, causal from the last place on."""
    assert causal
    assert deterministic
    heads = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(heads, dim=2) for x in (key, value))
    weights = torch.einsum("blhd,bmhd->bhlm", query, key).float() * softmax_scale
    hidden = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(weights.shape[-1] - weights.shape[-2] + 1)
    return torch.einsum("bhlm,bmhd->blhd", weights.masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype), value)


@pytest.mark.parametrize("packed", [True, False])
def test_flash_attention_is_asked_for_the_same(episodes, settings, tmp_path, monkeypatch, packed):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=exact_attention))
    policy.write_policy(tmp_path / "policy", seed=0)
    model = checkpoint.load_policy(tmp_path / "policy", torch.float32, "cpu")
    settings = replace(settings, packed=packed, bfloat16=True)
    batch = batches.collate(episodes, settings, model.device)
    expected, _, _ = grpo.completion_logprobs(model, batch, settings)
    found, _, _ = grpo.completion_logprobs(model, batch, replace(settings, attention="flash"))
    assert not torch.equal(found, expected), "another kernel"
    assert (found - expected).abs().mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_compiled_layers_change_the_step_by_rounding_alone(episodes, settings, policy_folder, lora):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    gradients = []
    for compiled in (False, True):
        model = adapters.strong(policy_folder) if lora else checkpoint.load_policy(policy_folder, torch.float32, "cpu")
        if compiled:
            sharding.compile_layers(model)
        weights = sharding.trained(model).values()
        optimizer = torch.optim.SGD(weights, lr=0.0)
        reference = model if lora else None
        grpo.train_iteration(model, reference, optimizer, episodes, replace(settings, packed=True, kl_coeff=0.1))
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert_same_gradient(gradients[1], gradients[0])


# Signal and noise


@pytest.fixture
def packed(settings):
    """One group a micro-batch; a loss that is divided by a constant, so that gradients of parts add up."""
    return replace(settings, packed=True, micro_batch=SAMPLES, normalization="constant", max_completion_tokens=20)


def renamed(group, name, sign=1):
    return [
        replace(e, group_id=name, episode_id=f"{name}-{i}", advantage=sign * e.advantage) for i, e in enumerate(group)
    ]


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, -1.0)])
def test_halves_that_teach_the_same_have_cosine_1(episodes, packed, learn, sign, expected):
    first = episodes[:SAMPLES]
    metrics, _ = learn([*first, *renamed(first, "9999", sign)], packed)
    assert metrics["gradient_cosine"] == pytest.approx(expected, abs=1e-4)


def test_the_cosine_is_that_of_the_gradients_of_the_halves(episodes, packed, learn, monkeypatch):
    cut = len(episodes) // 2
    halves = [learn(part, packed)[1].double() for part in (episodes[:cut], episodes[cut:])]
    for sampled in (2**24, 1000):
        monkeypatch.setattr(signal, "SAMPLED", sampled)
        stride = -(-len(halves[0]) // sampled)
        expected = torch.nn.functional.cosine_similarity(halves[0][::stride], halves[1][::stride], dim=0)
        assert learn(episodes, packed)[0]["gradient_cosine"] == pytest.approx(float(expected), abs=1e-4)
    assert stride > 100


def test_without_halves_there_is_no_cosine(episodes, packed, learn):
    assert learn(episodes[:SAMPLES], packed)[0]["gradient_cosine"] is None
    assert learn(episodes, replace(packed, packed=False))[0]["gradient_cosine"] is None
    flat = [replace(episode, advantage=0.0) for episode in episodes]
    assert learn(flat, packed)[0]["gradient_cosine"] is None
