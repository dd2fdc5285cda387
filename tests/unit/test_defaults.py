"""Defaults that follow from other fields."""

import pytest

from earl.config import defaults, load
from earl.config.schema import Config
from tests.support.demo import ROOT
from tests.support.workplace import EXPERIMENT


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        # In bfloat16, at most 40 GB of weights a GPU: 144 / 4, 64 / 2, 14.
        ({}, 4),
        ({"reward_function_api_model_name": "Qwen/Qwen2.5-VL-32B-Instruct"}, 2),
        ({"reward_function_api_model_name": "Qwen/Qwen2.5-VL-7B-Instruct"}, 1),
        ({"reward_function_api_model_name": "Qwen/Qwen2.5-VL-7B-Instruct", "dtype": "float32"}, 1),
        ({"dtype": "float32"}, 8),
        ({"reward_function_api_model_name": "owner/judge-0.5b"}, 1),
        ({"reward_function_api_model_name": "/models/80b/judge"}, 1),
        ({"reward_function_api_model_name": "owner/giant-405B"}, 8),
        ({"reward_function_api_model_name": "owner/A22B-experts4B2"}, 1),
        ({"device": "cpu"}, 1),
        ({"judge_tensor_parallel_size": 2}, 2),
    ],
)
def test_a_judge_is_split_over_as_many_gpus_as_hold_it(fields, gpus):
    assert Config(**EXPERIMENT | {"judge": "vllm"} | fields).judge_tensor_parallel_size == gpus


def test_fields_that_are_wrong_have_no_say():
    assert defaults.judge_gpus({}) == 1


def test_a_judge_is_asked_all_questions_of_an_iteration_at_once(monkeypatch):
    """128 episodes, two rubrics."""
    for name in ("DATA_DIR", "BASE_EXP_DIR", "RUN_NAME", "REWARD_FUNCTION_API_BASE"):
        monkeypatch.setenv(f"APP__{name}", "http://x" if name.startswith("REWARD") else "x")
    config = load.load(ROOT / "config" / "sft_s__rl_s.jsonnet").config
    assert config.judge_concurrency == 2 * config.episodes_per_iteration


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "config").glob("sft_*.jsonnet")))
def test_the_papers_experiments_compute_on_gpus_and_their_small_twins_do_not(monkeypatch, name):
    for variable in ("DATA_DIR", "BASE_EXP_DIR", "RUN_NAME", "REWARD_FUNCTION_API_BASE"):
        monkeypatch.setenv(f"APP__{variable}", "x")
    assert load.load(ROOT / "config" / name).config.device == "cuda"
    assert load.load(ROOT / "config" / "shapes" / name).config.device == "cpu"
