"""Every field of the reference's RL arguments is a field here, and its default there is accepted here as it stands."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earl.config import load
from earl.config.schema import Config

NOT_YET = ("push_to_hub_repo_id", "run_name", "reward_function_api_base")
"""Fields whose default, null, is refused here."""
REQUIRED = {
    "train_paths_file": ["list/tokenized_datalist.json"],
    "val_paths_file": ["list/tokenized_datalist.json"],
    "base_exp_dir": "experiments",
    "model_path": "owner/model",
    "tokenizer_path": "BAAI/Emu3-Gen",
    "assistant_prefill": "<|image start|>",
    "learning_rate": 3e-6,
    "num_iterations": 2000,
    "kl_coeff": 0.0003,
    "temperature": 1.0,
    "per_device_batch_size": 8,
    "episodes_per_iteration": 128,
    "generations_per_sample": 8,
    "max_response_tokens": 2048,
    "top_p": 1.0,
    "top_k": -1,
    "model_context_size": 4096,
    "vllm_gpu_memory_utilization": 0.3,
}
"""Fields without a default there, with a value from its files."""
DEFAULTS = {
    "random_seed": 42,
    "coefficients": [],
    "val_coefficients": [],
    "model_revision": None,
    "max_prompt_len": None,
    "max_completion_len": None,
    "emu3_use_logit_processor": True,
    "separate_language_and_vision_vocabs": True,
    "train_text_tokens_only": False,
    "text_only_cycle_steps": 10,
    "text_only_steps": 10,
    "train_vision_tokens_only": False,
    "vision_only_cycle_steps": 10,
    "vision_only_steps": 10,
    "reward_function_api_base": None,
    "reward_function_api_model_name": "Qwen/Qwen2.5-VL-72B-Instruct",
    "reward_compute_viescore": True,
    "reward_compute_ground_score": True,
    "reward_final_reward": "viescore",
    "log_episodes_every_n_iterations": 20,
    "run_name": None,
    "keep_checkpoints_every_n_iterations": None,
    "save_checkpoints_every_n_iterations": None,
    "push_to_hub_every_n_iterations": None,
    "push_to_hub_repo_id": None,
}
OURS = {"run_name": "mine", "judge": "program"}
"""What our fields need while those of `NOT_YET` are left out."""
ACCEPTED = {name: value for name, value in DEFAULTS.items() if name not in NOT_YET}


def resolved(folder: Path, fields: dict) -> Config:
    path = folder / "experiment.json"
    path.write_text(json.dumps(OURS | fields))
    return load.load(path, {}).config


def test_every_field_is_known_by_its_name() -> None:
    assert (REQUIRED | DEFAULTS).keys() <= Config.model_fields.keys()
    assert len(REQUIRED | DEFAULTS) == 43


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_default_is_accepted_and_stays(name: str, tmp_path: Path) -> None:
    config = resolved(tmp_path, REQUIRED | {name: ACCEPTED[name]})
    assert getattr(config, name) == ACCEPTED[name]


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(sorted(ACCEPTED))))
def test_defaults_are_accepted_together(tmp_path_factory, names: set[str]) -> None:
    chosen = REQUIRED | {name: ACCEPTED[name] for name in names}
    config = resolved(tmp_path_factory.mktemp("together"), chosen)
    assert {name: getattr(config, name) for name in chosen} == chosen
