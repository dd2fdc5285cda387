"""vLLM's process: what it reads of the environment, and what is said where it does not start. No vLLM is started."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from earl.engines import vllm_process
from earl.engines.vllm_engine import Settings, VllmEngine, llm_options
from earl.judges.vllm_model import VllmModel
from earl.messages.errors import EarlError

TAKEN = (
    "Free memory on device cuda:0 (9.5/79.2 GiB) on startup is less than desired GPU memory utilization (0.9, 71.3 "
    "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
NO_CACHE = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."


@pytest.fixture
def vllm_environment(monkeypatch):
    """Return vLLM's variables after `prepare_process`, on top of those that were set before."""
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_USE_V2_MODEL_RUNNER")
    names += ("VLLM_WORKER_MULTIPROC_METHOD",)

    def prepared(device, **before):
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in before.items():
            monkeypatch.setenv(name, value)
        vllm_process.prepare_process(device)
        return {name.removeprefix("VLLM_"): os.environ[name] for name in names}

    return prepared


def test_vllm_starts_its_workers_anew_and_shows_its_warnings(vllm_environment):
    found = vllm_environment("cuda")
    assert (found["WORKER_MULTIPROC_METHOD"], found["LOGGING_LEVEL"]) == ("spawn", "WARNING")
    assert found["USE_V2_MODEL_RUNNER"] == "1"
    assert vllm_environment("cpu")["LOGGING_LEVEL"] == "ERROR", "a CPU's warnings are about the CPU"
    assert vllm_environment("cpu", VLLM_LOGGING_LEVEL="DEBUG")["LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (TAKEN, "other processes use its GPU .* lower vllm_gpu_memory_utilization .0.9."),
        (NO_CACHE, "too little memory .* raise vllm_gpu_memory_utilization .0.9. or lower model_context_size"),
    ],
)
def test_an_engine_without_memory_says_which_way_its_share_is_to_go(reason, remedy):
    engine = VllmEngine(Settings("cuda", "bfloat16", context=4096, memory_share=0.9))
    with pytest.raises(EarlError, match=f"policy: .*{remedy}"), engine._start_errors(Path("policy")):
        raise ValueError(reason)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (TAKEN, "other processes use its GPU .* lower judge_gpu_memory_utilization .0.9."),
        (NO_CACHE, "does not load in vLLM .* check .* judge_tensor_parallel_size"),
    ],
)
def test_a_judge_without_memory_does_too(monkeypatch, reason, remedy):
    def fails(**options):
        raise ValueError(reason)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fails))
    monkeypatch.setattr(vllm_process, "check_device", lambda *arguments: None)
    with pytest.raises(EarlError, match=f"owner/judge: .*{remedy}"):
        VllmModel("owner/judge", device="cuda").ask([SimpleNamespace(continues=False)], lambda index, reply: None)


def test_how_much_fits_into_the_cache_is_said(caplog):
    cache = SimpleNamespace(kv_cache_size_tokens=47_104, kv_cache_max_concurrency=11.5)
    config = SimpleNamespace(cache_config=cache)
    with caplog.at_level("INFO"):
        vllm_process.log_cache(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))
    assert caplog.messages == ["vLLM: a cache of 47104 tokens, for 11.5 sequences of the longest at once"]


@pytest.mark.parametrize(
    ("device", "local_rank", "inside"),
    [("cuda", "5", "1"), ("cuda", None, None), ("cpu", "5", "5")],
)
def test_vllm_takes_the_gpu_of_its_rank(monkeypatch, device, local_rank, inside):
    """A rank may see fewer GPUs than its number, where Slurm binds them to tasks; vLLM goes by `LOCAL_RANK`."""
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", local_rank or "")
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK")
    with vllm_process.on_own_gpu(device):
        assert os.environ.get("LOCAL_RANK") == inside
    assert os.environ.get("LOCAL_RANK") == local_rank


def test_vllm_computes_logits_in_float32(monkeypatch):
    """In bfloat16 log-probs of sampler and learner are further apart than `parity_tolerance` allows."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    options = llm_options(Settings("cuda", "bfloat16", context=4096), None, None)
    assert (options["dtype"], options["hf_overrides"]) == ("bfloat16", {"head_dtype": "float32"})
    assert options["logprobs_mode"] == "processed_logprobs"
