"""Sampling is right: what engines draw is distributed as the model, the constraint and the truncation say."""

import numpy as np
import pytest
import torch

from earl.emu3 import checkpoint, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine
from tests.support import policies
from tests.support.distributions import truncated_softmax
from tests.support.engines import ENGINES

SAMPLES = 8_000
BATCH = 500
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy that puts ``img`` first for sure, and then prefers some visual tokens to others."""

    def change(model, vocabulary):
        policies.teach(model, [vocabulary.boi, vocabulary.img], strength=100)
        model.lm_head.weight[vocabulary.first_visual :] *= 4

    return policies.write(tmp_path_factory.mktemp("policies") / "img-first", change)


@pytest.fixture(scope="module")
def prompt(policy):
    instruction = "remove the red circle"
    tokens = np.arange(4).reshape(2, 2)
    return sequence.prompt_ids(tokens, instruction, "<|image start|>", Vocabulary.from_folder(policy))


@pytest.fixture(params=ENGINES)
def engine(request, policy):
    if request.param == "torch":
        engine = TorchEngine(torch.device("cpu"), torch.float32, batch_size=BATCH, context=512, constrained=True)
    else:
        engine = request.getfixturevalue("vllm_engine")
    engine.load(policy)
    return engine


def expected(policy, prompt, top_p, top_k):
    """Probability of each visual token, in plain NumPy from the model's logits."""
    vocabulary = Vocabulary.from_folder(policy)
    model = checkpoint.load_policy(policy, torch.float32, "cpu")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, vocabulary.img]])).logits[0, -1].double().numpy()
    logits = logits[vocabulary.first_visual : vocabulary.size] / TEMPERATURE
    return truncated_softmax(logits, top_p, top_k)


@pytest.mark.slow
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, -1), (0.8, 40)])
def test_first_visual_tokens_follow_the_masked_and_truncated_softmax(engine, policy, prompt, top_p, top_k):
    # Not at the top, where every process that collects tests would import it.
    from scipy import stats

    vocabulary = Vocabulary.from_folder(policy)
    seeds = np.arange(SAMPLES).reshape(-1, BATCH).tolist()
    requests = [Request(prompt, (2, 2), part) for part in seeds]
    params = SamplingParams(TEMPERATURE, top_p=top_p, top_k=top_k, max_tokens=2)
    completions = [c for group in engine.generate(requests, params) for c in group]
    assert {c.token_ids[0] for c in completions} == {vocabulary.img}
    drawn = np.array([c.token_ids[1] for c in completions]) - vocabulary.first_visual
    counts = np.bincount(drawn, minlength=vocabulary.num_visual)
    p = expected(policy, prompt, top_p, top_k)
    assert counts.sum() == SAMPLES
    assert counts[p == 0].sum() == 0
    # Tokens too rare for the test's approximation are counted together.
    frequent = SAMPLES * p >= 10
    observed, wanted = (
        np.append(values[frequent], values[~frequent & (p > 0)].sum()) for values in (counts, SAMPLES * p)
    )
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted).pvalue > 0.001
