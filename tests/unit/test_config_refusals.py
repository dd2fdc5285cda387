"""What cannot work together in a configuration is refused, with the fields; what can is accepted."""

import re
from pathlib import Path

import pytest

from earl.config import load
from tests.support.experiments import ASKED, error_of, experiment


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"engine": "torch", "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size is 2, but the engine `torch`"),
        (
            {"engine": "vllm", "temperature": 0.005},
            "temperature is 0.005, but the engine `vllm` samples at 0.01 to 2.0",
        ),
        ({"engine": "vllm", "temperature": 3.0}, "temperature is 3.0, but the engine `vllm` samples at 0.01 to 2.0"),
        (
            {
                "engine": "vllm",
                "val_paths_file": ["x"],
                "evaluations": {"hot": {"prompts": 1, "temperature": 2.5}},
            },
            "evaluations.hot.temperature is 2.5, but the engine `vllm`",
        ),
        (
            {"engine": "torch", "engine_batch_size": 4},
            "engine_batch_size is 4, but generations_per_sample is 8, and a prompt's samples are in one batch",
        ),
        (
            {"engine": "torch", "val_paths_file": ["x"], "evaluations": {"h": {"prompts": 4, "samples_per_prompt": 3}}},
            "but evaluations.h.samples_per_prompt is 3, and",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_an_error(tmp_path: Path, fields: dict, complaint: str) -> None:
    assert complaint in error_of(experiment(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"importance_ratio": "behavior", "sampler_correction": "truncate", "sampler_correction_high": 2.0},
            "sampler_correction.*square of their ratio",
        ),
        ({"optimizer_steps_per_iteration": 2}, "optimizer_steps_per_iteration.*importance_ratio to `behavior`"),
        (
            {"optimizer_steps_per_iteration": 17, "importance_ratio": "behavior"},
            "optimizer_steps_per_iteration.*only 16 groups",
        ),
        ({"clip_ratio_low": 0.2}, "clip_ratio_low.*importance_ratio is `none`"),
        ({"sampler_correction": "truncate"}, "sampler_correction_high.*needs it"),
        ({"sampler_correction_high": 2.0}, "sampler_correction_high.*no use"),
        ({"sampler_correction": "filter", "sampler_correction_high": 2.0}, "sampler_correction_low.*needs it"),
        (
            {"kl_estimator": "weighted_k3", "sampler_correction": "truncate", "sampler_correction_high": 2.0},
            "kl_estimator.*set one of the two to `k3\\+` or `none`",
        ),
        (
            {"logprob_support": "full"},
            "logprob_support.*_language_and_vision_vocabs is true; set that to false",
        ),
        (
            {"logprob_support": "split_vocab", "separate_language_and_vision_vocabs": False},
            "logprob_support is `split_vocab`, which keeps text and visual ids apart.*set that to true",
        ),
        (
            {"logprob_support": "sampled", "emu3_use_logit_processor": False},
            "logprob_support is `sampled`, which without emu3_use_logit_processor does not keep.*set that to false",
        ),
        (
            {
                "logprob_support": "sampled",
                "top_p": 0.9,
                "optimizer_steps_per_iteration": 2,
                "importance_ratio": "behavior",
            },
            "logprob_support.*the first step only; set optimizer_steps_per_iteration to 1",
        ),
        (ASKED | {"advantage_components": {"ground_score": 1}}, "reward_compute_ground_score.*advantage_components"),
        ({"advantage_components": {"viescore": 1.0}}, "advantage_components"),
        ({"advantage_components": {"overedit": 0.0}}, "advantage_components"),
        (
            {"reference_refresh_iterations": 2, "kl_coeff": 0},
            "reference_refresh_iterations is set, but kl_coeff is 0.*raise kl_coeff",
        ),
        (
            {"reference_refresh_iterations": 2, "lora": {"rank": 4}},
            "reference_refresh_iterations is set, but with lora.*never changes; leave one out",
        ),
        ({"attention": "flash", "dtype": "float32"}, "attention is `flash`.*dtype is `float32`; set it to `auto`"),
        ({"attention": "flash", "device": "cpu"}, "attention is `flash`.*device is `cpu`; set it to `auto`"),
        ({"segment_processes": 2, "train_processes": 4}, r"segment_processes is 2.*train_processes \(4\)"),
    ],
)
def test_objectives_that_contradict_themselves_are_refused(tmp_path, fields, message):
    assert re.search(message, error_of(experiment(tmp_path, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"importance_ratio": "behavior", "optimizer_steps_per_iteration": 4, "clip_ratio_low": 0.2},
        {
            "importance_ratio": "behavior",
            "sampler_correction": "filter",
            "sampler_correction_low": 0.9,
            "sampler_correction_high": 1.1,
        },
        {"sampler_correction": "truncate", "sampler_correction_high": 2.0, "optimizer_steps_per_iteration": 2},
        {"logprob_support": "sampled", "top_p": 0.9, "top_k": 50, "kl_estimator": "weighted_k3"},
        {"logprob_support": "sampled", "optimizer_steps_per_iteration": 2, "importance_ratio": "behavior"},
        {"attention": "flash"},
        {"logprob_support": "full", "separate_language_and_vision_vocabs": False},
        {"advantage_components": {"semantic_consistency": 1.0, "perceptual_quality": 0.5}},
        # The demo's judge, a program, gives every score.
        {"reward_final_reward": "sqrt(viescore_pqxground_score)", "advantage_components": {"ground_score": 1}},
    ],
)
def test_objectives_that_go_together_are_accepted(tmp_path, fields):
    load.load(experiment(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generations_per_sample": 1}, "generations_per_sample is 1.*advantage.*set it to 2 or more"),
        (
            {"generations_per_sample": 1, "advantage_components": {"overedit": 1.0}},
            "generations_per_sample is 1.*advantage",
        ),
        ({"top_k": 1}, "top_k is 1.*advantage.*set it to -1"),
        ({"learning_rate": 0}, "learning_rate is 0.*greater than 0"),
        ({"learning_rate": 1e-400}, "learning_rate is 0.*greater than 0"),
        (
            {"train_text_tokens_only": True, "assistant_prefill": "<|image start|>"},
            "train_text_tokens_only is true.*assistant_prefill",
        ),
        ({"train_text_tokens_only": True, "assistant_prefill": "<|image start|>{H}*{W}"}, "train_text_tokens_only is"),
    ],
)
def test_runs_that_cannot_learn_are_refused(tmp_path, fields, message):
    assert re.search(message, error_of(experiment(tmp_path, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 0, "generations_per_sample": 1},
        {"num_iterations": 0, "top_k": 1},
        {"num_iterations": 0, "engine": "torch", "engine_batch_size": 3},
        {"engine": "vllm", "engine_batch_size": 3},
        {"train_text_tokens_only": True},
        {"train_text_tokens_only": True, "text_only_steps": 0, "assistant_prefill": "<|image start|>"},
    ],
)
def test_what_can_learn_is_accepted(tmp_path, fields):
    load.load(experiment(tmp_path, **fields))
