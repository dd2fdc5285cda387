"""Configurations of the reference, imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from earl.config import from_reference, load
from earl.config.schema import Config
from earl.messages.errors import EarlError

VARIABLES = {"APP__DATA_DIR": "/data", "APP__BASE_EXP_DIR": "/runs"}
GIVEN = {
    "train_paths_file": ["train/list/tokenized_datalist.json"],
    "val_paths_file": ["val/list/tokenized_datalist.json"],
    "base_exp_dir": "runs",
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
    "model_context_size": 3000,
    "vllm_gpu_memory_utilization": 0.3,
}
"""An experiment with the fields that the reference has no defaults for."""


def written(folder: Path, **fields: object) -> Path:
    path = folder / "mine.jsonnet"
    path.write_text(json.dumps(GIVEN | fields))
    return path


def imported(path: Path, **environment: str) -> Config:
    """Import by the command line, in a process without variables, and load what it wrote."""
    out = path.with_name("ours.jsonnet")
    subprocess.run([sys.executable, "-m", "earl", "import-config", path, "--out", out], check=True, env={})
    return load.load(out).config


def test_variables_and_imports_of_a_file_stay_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = GIVEN | {"model_path": None, "train_paths_file": []}
    (tmp_path / "base.jsonnet").write_text(json.dumps(base))
    path = tmp_path / "experiment.jsonnet"
    path.write_text(
        "(import 'base.jsonnet') + { base_exp_dir: std.extVar('APP__BASE_EXP_DIR'), model_path: 'owner/model',\n"
        "train_paths_file: [std.extVar('APP__DATA_DIR') + '/a/list/tokenized_datalist.json'],\n"
        "run_name: std.extVar('APP__RUN_NAME'), push_to_hub_repo_id: 'imged_rl__' + $.run_name }"
    )
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("APP__REWARD_FUNCTION_API_BASE", "http://judge:4877")
    monkeypatch.delenv("APP__RUN_NAME", raising=False)
    config = imported(path)
    assert config.train_paths_file == ["/data/a/list/tokenized_datalist.json"]
    assert (config.base_exp_dir, config.run_name) == ("/runs", "ours"), "named after the file it is in now"
    assert config.push_to_hub_repo_id == "imged_rl__ours"


def test_defaults_of_the_reference_hold_where_a_field_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP__REWARD_FUNCTION_API_BASE", "http://judge:4877")
    config = imported(written(tmp_path))
    # Of its class of arguments: True, 20 and None, where ours are False, 5 and 100.
    assert config.reward_compute_ground_score is True
    assert config.log_episodes_every_n_iterations == 20
    assert config.keep_checkpoints_every_n_iterations is None
    assert config.save_checkpoints_every_n_iterations is None
    assert config.push_to_hub_repo_id is None
    assert config.val_coefficients == []
    # Of its code.
    assert (config.engine, config.judge, config.dtype) == ("vllm", "openai", "bfloat16")
    assert (config.judge_temperature, config.judge_image_size) == (0.0, None)
    assert (config.judge_timeout_seconds, config.judge_startup_seconds) == (1000.0, 7200.0)
    assert config.push_to_hub is False


def test_every_field_of_the_reference_is_one_of_ours() -> None:
    names = {*from_reference.REQUIRED, *from_reference.DEFAULTS}
    assert names <= Config.model_fields.keys()
    assert len(names) == 43
    assert set(from_reference.REQUIRED) == GIVEN.keys()


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(sorted(from_reference.DEFAULTS))))
@example(set(from_reference.DEFAULTS))
def test_every_default_of_the_reference_is_accepted_as_it_stands(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    path = tmp_path_factory.mktemp("defaults") / "experiment.json"
    fields = GIVEN | {name: from_reference.DEFAULTS[name] for name in names}
    # A program judges, as the address of a server is one of these fields.
    path.write_text(json.dumps({"judge": "program", "run_name": "mine"} | fields))
    config = load.load(path).config
    named_after_the_file = {"run_name": "experiment"} if "run_name" in names else {}
    assert {name: getattr(config, name) for name in fields} == fields | named_after_the_file


@pytest.mark.parametrize("none", [None, "NONE", "none"])
def test_no_address_and_no_name_become_variables(tmp_path: Path, none: str | None) -> None:
    path = written(tmp_path, reward_function_api_base=none, run_name=none)
    lines = {line.field: line for line in from_reference.read(path)}
    text = from_reference.jsonnet(list(lines.values()), "x")
    assert lines["reward_function_api_base"].fate == lines["run_name"].fate == "changed"
    assert "reward_function_api_base: std.extVar('APP__REWARD_FUNCTION_API_BASE')," in text
    assert "run_name: std.extVar('APP__RUN_NAME')," in text


def test_slips_of_a_name_are_renamed_and_what_no_field_resembles_is_left_out(tmp_path: Path) -> None:
    fields = {"emu3_use_logits_processor": False, "vlm_spm_memory_utilization": 0.4, "val_base_dir": "/x"}
    given = {k: v for k, v in GIVEN.items() if k != "vllm_gpu_memory_utilization"}
    path = tmp_path / "november.jsonnet"
    path.write_text(json.dumps(given | fields))
    found = {line.field: line for line in from_reference.read(path)}
    assert found["emu3_use_logits_processor"].name == "emu3_use_logit_processor"
    assert found["vlm_spm_memory_utilization"].name == "vllm_gpu_memory_utilization"
    assert (found["val_base_dir"].fate, found["val_base_dir"].name) == ("left out", None)
    values = from_reference.values(list(found.values()))
    assert (values["emu3_use_logit_processor"], values["vllm_gpu_memory_utilization"]) == (False, 0.4)
    assert sum(line.name == "emu3_use_logit_processor" for line in found.values()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ a: 1 b: 2 }", r"broken\.jsonnet: does not evaluate: STATIC ERROR: .*expected a comma"),
        ("[1]", r"broken\.jsonnet: is a list, not an object"),
        (json.dumps(GIVEN | {"model_path": None}), r"lacks model_path, which the reference needs; import one of its"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.jsonnet"
    path.write_text(text)
    with pytest.raises(EarlError, match=message):
        from_reference.read(path)


def test_a_file_that_was_edited_since_is_not_replaced(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "ours.jsonnet"
    command = [sys.executable, "-m", "earl", "import-config", path, "--out", out]
    for _ in range(2):  # the same again changes nothing
        assert f"written: {out}" in subprocess.run(command, check=True, env={}, capture_output=True, text=True).stdout
    out.write_text("{}")
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert (done.returncode, out.read_text()) == (2, "{}")
    assert "is there already and says something else" in done.stderr


def test_a_value_that_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, out = written(tmp_path, temperature=-1.0), tmp_path / "ours.jsonnet"
    done = subprocess.run(
        [sys.executable, "-m", "earl", "import-config", path, "--out", out], env={}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "field temperature" in done.stderr
    assert not out.exists()
