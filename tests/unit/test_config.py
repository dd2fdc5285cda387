"""Experiments resolve to what the paper's table says, mistakes are named, and a run's configuration is frozen."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from earl.config import freeze, load, paths
from earl.config.schema import Config, Evaluation, JudgeGate, RawDataset, Sft, SftValidation
from earl.messages.errors import EarlError
from earl.run import plan

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "APP__DATA_DIR": "/data",
    "APP__BASE_EXP_DIR": "/experiments",
    "APP__RUN_NAME": "trial",
    "APP__REWARD_FUNCTION_API_BASE": "http://judge:4877",
}
SIMPLE = {"omniedit": 1.0}
COMPLEX = {"magic_brush": 6, "aurora_ag": 6, "aurora_kubric": 0.7, "ss2": 1.55, "vismin": 3.7, "human-edit": 11}
BOTH = {"omniedit": 0.13} | COMPLEX
AT_ONCE = "<|image start|>"
THINKING = " Let's think step by step. <|start thinking|>"
MIXED = "Image-editing/Emu3-Base-SFT-without_cot-May06_mixed_gc_lr1e-4-checkpoint-4800"
SECOND_STAGE = "Image-editing/Emu3-Base-SFT-without_cot-May07_mixed_gc_post_lr1e-4-checkpoint-1200"
TABLE = {
    "sft_s__rl_s": ("mair-lab/sft-simple", AT_ONCE, SIMPLE),
    "sft_s__rl_c": ("mair-lab/sft-simple", AT_ONCE, COMPLEX),
    "sft_s__rl_sc": ("mair-lab/sft-simple", AT_ONCE, BOTH),
    "sft_sc__rl_c": (MIXED, AT_ONCE, COMPLEX),
    "sft_sc__rl_sc": (MIXED, AT_ONCE, BOTH),
    "sft_sc2stage__rl_c": (SECOND_STAGE, AT_ONCE, COMPLEX),
    "sft_sc2stage__rl_sc": (SECOND_STAGE, AT_ONCE, BOTH),
    "sft_think_s__rl_s": ("mair-lab/thinking-sft-simple", THINKING, SIMPLE),
    "sft_think_s__rl_c": ("mair-lab/thinking-sft-simple", THINKING, COMPLEX),
    "sft_think_s__rl_sc": ("mair-lab/thinking-sft-simple", THINKING, BOTH),
}
BENCHMARKS = ["aurora", "emuedit", "i2ebench", "magicbrush", "omniedit", "vismin"]
BASE = "BAAI/Emu3-Stage1"
RECIPES = {
    "sft_s": {"s": (BASE, SIMPLE, False, 11600)},
    "sft_sc": {"sc": (BASE, BOTH, False, 4800)},
    "sft_sc2stage": {"s": (BASE, SIMPLE, False, 11600), "sc2stage": ("stage:sft/s", BOTH, False, 1200)},
    "sft_think_s": {"think_s": (BASE, SIMPLE, True, 11600)},
}
"""Base, data, whether with reasoning, and steps of each fine-tuning that an experiment describes."""
PUBLISHED = {
    "batch_size": 64,
    "learning_rate": 1e-4,
    "final_learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup_steps": 30,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_gradient_norm": 5.0,
}
"""What the fine-tunings have in common."""
SHARED = {
    "run_name": "trial",
    "base_exp_dir": "/experiments",
    "val_paths_file": ["/data/validation_22march_256/tokenised"],
    "val_coefficients": [1.0],
    "tokenizer_path": "BAAI/Emu3-Gen",
    "vision_tokenizer_path": "BAAI/Emu3-VisionTokenizer",
    "learning_rate": 3e-6,
    "num_iterations": 2000,
    "advantage": "mean_std",
    "kl_coeff": 0.0003,
    "temperature": 1.0,
    "per_device_batch_size": 8,
    "packing": "groups",
    "episodes_per_iteration": 128,
    "generations_per_sample": 8,
    "max_response_tokens": 2048,
    "max_prompt_len": None,
    "max_completion_len": None,
    "top_p": 1.0,
    "top_k": -1,
    "model_context_size": 4096,
    "vllm_gpu_memory_utilization": 0.3,
    "emu3_use_logit_processor": True,
    "separate_language_and_vision_vocabs": True,
    "train_text_tokens_only": False,
    "text_only_cycle_steps": 10,
    "text_only_steps": 10,
    "train_vision_tokens_only": False,
    "vision_only_cycle_steps": 10,
    "vision_only_steps": 10,
    "reward_function_api_base": "http://judge:4877",
    "reward_function_api_model_name": "Qwen/Qwen2.5-VL-72B-Instruct",
    "reward_compute_viescore": True,
    "reward_compute_ground_score": False,
    "reward_final_reward": "viescore",
    "log_episodes_every_n_iterations": 5,
    "keep_checkpoints_every_n_iterations": 100,
    "save_checkpoints_every_n_iterations": 100,
    "push_to_hub_every_n_iterations": 100,
    "push_to_hub_repo_id": "imged_rl__trial",
    "random_seed": 42,
    "model_revision": None,
    "engine": "vllm",
    "judge": "openai",
    "raw_datasets": {},
}
MINIMAL = {"run_name": "a", "base_exp_dir": "runs", "train_paths_file": ["x"], "val_paths_file": [], "judge": "program"}
TUNING = {"base_model": "model", "train_paths_file": ["x"], "steps": 1}
ASKED = {"judge": "openai", "reward_function_api_base": "http://localhost:1"}
"""A judge that says what it is asked for alone."""


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def experiment(folder: Path, **fields: object) -> Path:
    path = folder / "x.jsonnet"
    path.write_text(json.dumps(MINIMAL | fields))
    return path


def error_of(path: Path, **overrides: object) -> str:
    with pytest.raises(EarlError) as caught:
        load.load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", TABLE)
def test_each_experiment_resolves_to_the_papers_table(name: str, variables: None) -> None:
    model, prefill, data = TABLE[name]
    config = load.load(ROOT / "config" / f"{name}.jsonnet").config.model_dump()
    assert config["model_path"] == model
    assert config["assistant_prefill"] == prefill
    names = [f"/data/earl-datasets/{name}/train/tokenised" for name in data]
    assert config["train_paths_file"] == names
    assert config["coefficients"] == list(data.values())
    assert {field: config[field] for field in SHARED} == SHARED


def test_the_table_covers_every_experiment_file() -> None:
    for folder in ("config", "config/shapes"):
        assert {path.stem for path in (ROOT / folder).glob("sft_*.jsonnet")} == set(TABLE)


@pytest.mark.parametrize("kind", RECIPES)
def test_each_model_describes_its_fine_tunings(kind: str, variables: None) -> None:
    name = next(name for name in TABLE if name.startswith(f"{kind}__"))
    config = load.load(ROOT / "config" / f"{name}.jsonnet").config
    for tuning, (base, data, reasoning, steps) in RECIPES[kind].items():
        found = config.sft[tuning]
        assert (found.base_model, found.reasoning, found.steps) == (base, reasoning, steps)
        assert {name: getattr(found, name) for name in PUBLISHED} == PUBLISHED
        assert (found.validation.examples, found.validation.every_n_steps) == (1000, 100)
        assert paths.validation_data(config, tuning).references == config.val_paths_file
        names = [f"/data/earl-datasets/{name}/train/tokenised" for name in data]
        assert (found.train_paths_file, found.coefficients) == (names, list(data.values()))
    assert config.sft.keys() == RECIPES[kind].keys()
    own = load.load(ROOT / "config" / f"{name}.jsonnet", {"make_sft_models": True}).config
    assert own.model_path == f"stage:{kind.replace('_', '/', 1)}"
    assert own.sft == config.sft


@pytest.mark.parametrize("name", TABLE)
def test_each_experiment_has_its_like_in_the_shapes_world(name: str) -> None:
    _, prefill, data = TABLE[name]
    kind = name.partition("__")[0]
    config = load.load(ROOT / "config" / "shapes" / f"{name}.jsonnet").config
    assert config.run_name == f"shapes_{name}"
    assert config.train_paths_file == [f"stage:tokenise/{dataset}" for dataset in data]
    assert (config.coefficients, config.assistant_prefill) == (list(data.values()), prefill)
    assert config.model_path == f"stage:{kind.replace('_', '/', 1)}"
    recipe = {tuning: (list(data), reasoning) for tuning, (_, data, reasoning, _) in RECIPES[kind].items()}
    assert recipe == {
        tuning: ([path.removeprefix("stage:tokenise/") for path in found.train_paths_file], found.reasoning)
        for tuning, found in config.sft.items()
    }
    assert not set(config.raw_datasets["omniedit"].tasks) & set(config.raw_datasets["vismin"].tasks)


def test_the_ten_in_the_shapes_world_share_what_comes_before_rl() -> None:
    configs = [load.load(path).config for path in (ROOT / "config" / "shapes").glob("sft_*.jsonnet")]
    stages = {output: stage.stage for config in configs for output, stage in paths.shared_stages(config).items()}
    # Seven data sets and two held-out ones; s, sc, sc2stage (which starts from s) and think_s.
    assert {kind: list(stages.values()).count(kind) for kind in stages.values()} == {"raw": 9, "tokenise": 9, "sft": 4}


def test_from_raw_data_to_rl_and_the_table_in_one_plan(tmp_path: Path, variables: None) -> None:
    path = tmp_path / "x.jsonnet"
    parts = [ROOT / "config" / part for part in ("sft_sc2stage__rl_c.jsonnet", "data/raw.libsonnet")]
    path.write_text(" + ".join(f"(import '{part}')" for part in parts))
    files = [tmp_path / "vismin" / f"{task}-00001.parquet" for task in ("counting", "relation")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    config = load.load(path, {"run_name": "raw", "benchmarks_dir": str(tmp_path)}).config
    made = paths.shared_stages(config).values()
    stages = {stage.name: stage for stage in made if stage.stage in ("tokenise", "sft")}
    converted = {stage.name: stage.output for stage in made if stage.stage == "convert"}
    vision = "BAAI/Emu3-VisionTokenizer"
    assert sorted(converted) == sorted([vision, BASE])
    held_out = ["validation", *(f"benchmark_{name}" for name in BENCHMARKS if name != "vismin")]
    held_out += ["benchmark_vismin_counting", "benchmark_vismin_relation"]
    assert sorted(stages) == sorted([*BOTH, *held_out, "s", "sc2stage"])
    assert stages["vismin"].inputs == (Path("/data/raw/vismin.parquet"), converted[vision])
    assert stages["benchmark_vismin_counting"].inputs[0] == files[0]
    outputs = {name: stage.output for name, stage in stages.items()}
    assert stages["sc2stage"].inputs == (*(outputs[name] for name in [*BOTH, "validation"]), outputs["s"])

    planned = plan.plan(config, by_segment=False).evaluations
    assert sorted(planned) == list(range(0, 2001, 100))
    assert sorted(planned[0]) == sorted(planned[2000]) == sorted(["validation", *BENCHMARKS])
    assert planned[100] == planned[1900] == ["validation"]


@pytest.mark.parametrize("field", ["base_exp_dir", "model_path", "train_paths_file"])
def test_a_tilde_which_nobody_expands_is_refused(field: str) -> None:
    value = ["~/x"] if field.endswith("_file") else "~/x"
    with pytest.raises(ValueError, match="begins with ~, which only a shell expands; write the home folder in full"):
        Config.model_validate(MINIMAL | {field: value})


def test_demo_needs_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = load.load(ROOT / "config" / "demo.jsonnet").config
    assert (config.run_name, config.base_exp_dir, config.engine, config.judge) == ("demo", "runs", "torch", "program")
    assert {one.temperature for one in config.evaluations.values()} == {1.0, 0.1}
    seeds = [raw.seed for raw in config.raw_datasets.values()]
    assert len(set(seeds)) == len(seeds) == 3


def test_missing_variable_is_named_with_file_and_remedy(variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APP__DATA_DIR")
    message = error_of(ROOT / "config" / "sft_s__rl_c.jsonnet")
    assert "export APP__DATA_DIR=" in message
    assert "libsonnet:" in message


def test_all_missing_variables_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    message = error_of(ROOT / "config" / "sft_s__rl_c.jsonnet")
    for name in ("DATA_DIR", "BASE_EXP_DIR", "REWARD_FUNCTION_API_BASE"):
        assert f"export APP__{name}=" in message
        assert re.search(rf"\w+\.libsonnet:\d+: .*APP__{name} ", message)
    assert "APP__RUN_NAME" not in message
    # What an override makes unnecessary is not asked for.
    assert "APP__BASE_EXP_DIR" not in error_of(ROOT / "config" / "sft_s__rl_c.jsonnet", base_exp_dir="b")


def test_missing_variables_beside_one_that_is_a_number(tmp_path: Path) -> None:
    fields = "episodes_per_iteration: std.parseInt(std.extVar('APP__NUMBER')), base_exp_dir: std.extVar('APP__FOLDER')"
    (tmp_path / "x.jsonnet").write_text(f"{json.dumps(MINIMAL)} + {{{fields}}}")
    message = error_of(tmp_path / "x.jsonnet")
    assert "export APP__FOLDER=" in message
    assert "export APP__NUMBER=" in message


def test_an_override_makes_its_variable_unnecessary(variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APP__BASE_EXP_DIR")
    config = load.load(ROOT / "config" / "sft_s__rl_s.jsonnet", {"base_exp_dir": "b"}).config
    assert config.base_exp_dir == "b"


def test_a_run_has_the_name_of_the_experiments_file_where_none_is_set(
    variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [ROOT / "config" / f"{name}.jsonnet" for name in TABLE]
    alike = [plan.plan(load.load(file).config) for file in files]
    with pytest.raises(EarlError, match=r"/experiments/trial: two of the experiments .* unset APP__RUN_NAME"):
        plan.by_run(alike)
    monkeypatch.delenv("APP__RUN_NAME")
    configs = [load.load(file).config for file in files]
    assert list(plan.by_run([plan.plan(config) for config in configs])) == [f"/experiments/{name}" for name in TABLE]
    assert configs[0].push_to_hub_repo_id == "imged_rl__sft_s__rl_s"
    # An override names all that refer to it, too.
    config = load.load(files[0], {"run_name": "b"}).config
    assert (config.run_name, config.push_to_hub_repo_id) == ("b", "imged_rl__b")


def test_origins_name_file_variable_override_and_default(variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    origins = load.load("config/sft_s__rl_sc.jsonnet", {"temperature": 0.9}).origins
    assert origins["train_paths_file"] == "config/data/both.libsonnet (APP__DATA_DIR)"
    assert origins["coefficients"] == "config/data/both.libsonnet"
    assert origins["model_path"] == "config/models/s.libsonnet"
    assert origins["kl_coeff"] == "config/base.libsonnet"
    assert origins["push_to_hub_repo_id"] == "config/base.libsonnet (APP__RUN_NAME)"
    assert origins["temperature"] == "--set"
    assert origins["random_seed"] == "default"


def test_the_later_import_is_the_origin(tmp_path: Path) -> None:
    (tmp_path / "a.libsonnet").write_text("{kl_coeff: 0.1, temperature: 0.5} // end without newline")
    (tmp_path / "b.libsonnet").write_text("{kl_coeff: 0.2}")
    path = tmp_path / "x.jsonnet"
    path.write_text(f"{json.dumps(MINIMAL)} + (import 'a.libsonnet') + (import 'b.libsonnet')")
    loaded = load.load(path)
    assert loaded.config.kl_coeff == 0.2
    assert loaded.origins["kl_coeff"].endswith("b.libsonnet")
    assert loaded.origins["temperature"].endswith("a.libsonnet")
    assert loaded.origins["judge"].endswith("x.jsonnet")


def test_show_is_jsonnet_that_resolves_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load.load(ROOT / "config" / "demo.jsonnet")
    (tmp_path / "shown.jsonnet").write_text(load.show(first))
    assert load.load(tmp_path / "shown.jsonnet").config == first.config


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"learning_rat": 1e-6}, ["learning_rat ", "unknown", "learning_rate"]),
        ({"sft": {"a": {"step": 1}}}, ["sft.a.step ", "did you mean steps?"]),
        ({"raw_datasets": {"a": {"source": "shapes", "conut": 1}}}, ["raw_datasets.a.conut", "count"]),
        ({"evaluations": {"prompts": {"prompts": 1, "top_kk": 1}}}, ["evaluations.prompts.top_kk", "top_k"]),
        ({"learning_rate": "3e-6"}, ['learning_rate is "3e-6"', "valid number"]),
        ({"num_iterations": 2.5}, ["num_iterations is 2.5", "integer"]),
        ({"top_k": True}, ["top_k is true", "integer"]),
        ({"judge": "oracle"}, ["judge", "'program'"]),
        ({"temperature": 0}, ["temperature is 0", "greater than 0"]),
        ({"top_p": 1.5}, ["top_p is 1.5", "less than or equal to 1"]),
        ({"top_k": 0}, ["top_k", "-1"]),
        ({"run_name": "../other"}, ["run_name"]),
        ({"train_paths_file": []}, ["train_paths_file is empty"]),
        ({"coefficients": [1, 2]}, ["coefficients has 2 values for 1 data sets"]),
        ({"val_paths_file": ["a", "b"]}, ["val_coefficients has 1 values for 2"]),
        ({"episodes_per_iteration": 12}, ["episodes_per_iteration is 12", "generations_per_sample (8)"]),
        ({"rollout_shards": 5, "engine": "torch"}, ["rollout_shards is 5", "4 batches of engine_batch_size (32)"]),
        ({"rollout_shards": 17, "engine": "vllm"}, ["rollout_shards is 17", "only 16 prompts"]),
        ({"train_text_tokens_only": True, "train_vision_tokens_only": True}, ["train_vision_tokens_only", "both"]),
        ({"text_only_steps": 11}, ["text_only_steps is 11", "text_only_cycle_steps: 10"]),
        (ASKED | {"reward_final_reward": "ground_score"}, ["reward_compute_ground_score", "earl replay"]),
        (ASKED | {"reward_compute_viescore": False}, ["reward_compute_viescore", "reward_final_reward needs"]),
        ({"judge": "openai"}, ["reward_function_api_base"]),
        ({"train_paths_file": ["stage:tokenise/no"]}, ["train_paths_file.0", "raw_datasets"]),
        ({"model_path": "stage:stf"}, ["model_path", "stage:sft/<name>", "stage:shapes-policy"]),
        ({"model_path": "stage:sft"}, ["model_path", "stage:sft/<name>"]),
        ({"model_path": "stage:shapes-policy/a"}, ["model_path", "stage:shapes-policy"]),
        ({"model_path": "stage:sft/a"}, ["model_path", "sft has only: (nothing)"]),
        ({"tokenizer_path": "stage:sft/s", "sft": {"s": TUNING}}, ["tokenizer_path", "one of: stage:shapes-policy"]),
        ({"model_path": "stage:sft/a", "sft": {"s": TUNING}}, ["model_path", "sft has only: s"]),
        ({"sft": {"s": TUNING | {"base_model": "stage:tokenise/x"}}}, ["sft.s.base_model", "stage:sft/s"]),
        ({"sft": {"s": TUNING | {"coefficients": [1, 2]}}}, ["sft.s.coefficients has 2 values for 1 data sets"]),
        ({"sft": {"s": TUNING | {"base_model": "stage:sft/s"}}}, ["sft.s.base_model", "circle: s from s"]),
        (
            {"sft": {"s": TUNING | {"base_model": "stage:sft/t"}, "t": TUNING | {"base_model": "stage:sft/s"}}},
            ["sft.s.base_model", "circle: s from t from s"],
        ),
        ({"raw_datasets": {"a": {"source": "parquet"}}}, ["raw_datasets.a.path"]),
    ],
)
def test_a_mistake_names_field_and_file(fields: dict, parts: list[str], tmp_path: Path) -> None:
    path = experiment(tmp_path, **fields)
    message = error_of(path)
    assert str(path) in message
    for part in parts:
        assert part in message


def test_missing_field_names_the_nearest_given_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonnet"
    path.write_text(json.dumps({k: v for k, v in MINIMAL.items() if k != "run_name"} | {"run_nam": "a"}))
    message = error_of(path)
    assert "field run_name is missing; the nearest name given is run_nam" in message
    assert "field run_nam is unknown; did you mean run_name?" in message


@pytest.mark.parametrize(("text", "part"), [("{a: ", "x.jsonnet:1"), ("[1]", "not an object"), ("import 'no'", "no")])
def test_a_file_that_is_no_experiment_is_named(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonnet").write_text(text)
    message = error_of(tmp_path / "x.jsonnet")
    assert "x.jsonnet" in message or "/no" in message
    assert part in message


def test_overrides_are_json_or_text() -> None:
    text = "run_name=7,engine=torch,num_iterations=2,coefficients=[1,2],sft.s.steps=3,model_revision=null"
    assert load.parse_overrides(text) == {
        "run_name": "7",
        "engine": "torch",
        "num_iterations": 2,
        "coefficients": [1, 2],
        "sft.s.steps": 3,
        "model_revision": None,
    }
    with pytest.raises(EarlError, match="field=value"):
        load.parse_overrides(["engine"])


def test_a_dotted_override_changes_one_field_of_a_section() -> None:
    demo = load.load(ROOT / "config" / "demo.jsonnet").config
    changed = load.load(ROOT / "config" / "demo.jsonnet", {"sft.shapes.steps": 30})
    assert changed.config.sft == {"shapes": demo.sft["shapes"].model_copy(update={"steps": 30})}
    assert changed.origins["sft.shapes.steps"] == "--set"
    assert changed.origins["sft.shapes.batch_size"] != "--set"


class TestFrozen:
    def test_round_trip(self, tmp_path: Path) -> None:
        config = load.load(ROOT / "config" / "demo.jsonnet").config
        assert freeze.write(config, tmp_path / "config.json")
        assert load.read(tmp_path / "config.json") == config
        assert not freeze.write(config, tmp_path / "config.json")

    def test_a_changed_result_stops_with_old_and_new(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        freeze.write(load.load(ROOT / "config" / "demo.jsonnet").config, path)
        before = path.read_bytes()
        other = load.load(ROOT / "config" / "demo.jsonnet", {"kl_coeff": 0.5, "sft.shapes.steps": 3}).config
        with pytest.raises(EarlError) as caught:
            freeze.write(other, path)
        rows = [line.split() for line in str(caught.value).splitlines()]
        assert ["kl_coeff", "0.025", "0.5"] in rows
        assert any(row[0] == "sft.shapes.steps" and row[2] == "3" for row in rows if len(row) == 3)
        assert "run_name" in str(caught.value)
        assert "--accept-changes" in str(caught.value)
        assert path.read_bytes() == before
        freeze.write(other, path, accept_changes=True)
        assert load.read(path) == other

    @pytest.mark.parametrize(
        "change",
        [
            {"num_iterations": 99},
            {"segment_length": 3},
            {"rollout_shards": 2},
            {"evaluations.heldout.every_n_iterations": 1},
            {"evaluations.new": {"prompts": 2}},
            {"evaluations": {}},
            {"device": "auto"},
        ],
    )
    def test_what_determines_no_result_may_change(self, change: dict, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        config = load.load(ROOT / "config" / "demo.jsonnet").config
        freeze.write(config, path)
        other = load.load(ROOT / "config" / "demo.jsonnet", change).config
        freeze.write(other, path)
        assert load.read(path) == other
        assert freeze.config_digest(other) == freeze.config_digest(config)

    CHANGES = (("prompts", 100), ("samples_per_prompt", 2), ("temperature", 0.7), ("top_p", 0.5), ("top_k", 9))

    @pytest.mark.parametrize(("field", "value"), CHANGES)
    def test_how_an_evaluation_samples_may_change_until_it_has_results(self, field, value, tmp_path: Path) -> None:
        path, name = tmp_path / "config.json", f"evaluations.heldout.{field}"
        first = load.load(ROOT / "config" / "demo.jsonnet").config
        freeze.write(first, path)
        other = load.load(ROOT / "config" / "demo.jsonnet", {name: value}).config
        freeze.write(other, path)
        assert load.read(path) == other
        # Rollouts that a killed evaluation left are results as well.
        results = tmp_path / "evaluations" / "heldout"
        results.mkdir(parents=True)
        (results / "000005.rollouts.parquet").touch()
        for accept in (False, True):
            with pytest.raises(EarlError) as caught:
                freeze.write(first, path, accept_changes=accept)
            rows = [line.split() for line in str(caught.value).splitlines()]
            old = getattr(first.evaluations["heldout"], field)
            assert [name, json.dumps(value), json.dumps(old)] in rows
            assert f"remove {results}" in str(caught.value)
            assert load.read(path) == other
        renamed = load.load(ROOT / "config" / "demo.jsonnet", {name: value, "evaluations.new": {"prompts": 3}}).config
        freeze.write(renamed, path)

    def test_an_evaluation_that_was_left_out_for_a_while_keeps_its_curve_clean(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        without = load.load(ROOT / "config" / "demo.jsonnet", {"evaluations": {}}).config
        freeze.write(without, path)
        first = load.load(ROOT / "config" / "demo.jsonnet").config
        results = tmp_path / "evaluations" / "heldout"
        results.mkdir(parents=True)
        summary = {"iteration": 5, "prompts": 3, **freeze.recorded(first, "heldout")}
        (results / "000005.json").write_text(json.dumps(summary))
        other = load.load(ROOT / "config" / "demo.jsonnet", {"evaluations.heldout.prompts": 100}).config
        with pytest.raises(EarlError, match=r"evaluations\.heldout\.prompts +210 +100"):
            freeze.write(other, path)
        freeze.write(first, path)

    def test_where_an_evaluations_prompts_come_from_is_frozen(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        first = load.load(ROOT / "config" / "demo.jsonnet", {"evaluations.heldout.paths_file": ["a"]}).config
        freeze.write(first, path)
        other = load.load(ROOT / "config" / "demo.jsonnet", {"evaluations.heldout.paths_file": ["b"]}).config
        with pytest.raises(EarlError, match=r"evaluations\.heldout\.paths_file"):
            freeze.check(other, path)

    def test_damage_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text('{"run_name": ')
        with pytest.raises(EarlError, match=r"config\.json"):
            load.read(path)

    def test_fields_of_an_earlier_version_are_dropped_with_one_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, config = tmp_path / "config.json", load.load(ROOT / "config" / "demo.jsonnet").config
        earlier = json.loads(freeze.frozen_text(config))
        earlier |= {"window_length": 50, "workers": "local", "worker_idle_seconds": 60.0}
        path.write_text(json.dumps(earlier))
        with caplog.at_level("INFO", logger="earl"):
            assert load.read(path) == config
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: ignored, from an earlier version: window_length, workers, worker_idle_seconds"
        ]
        path.write_text(json.dumps(earlier | {"worker": "local"}))
        with pytest.raises(EarlError, match="worker is unknown"):
            load.read(path)

    def test_every_field_is_documented_and_classified(self) -> None:
        for name, field in Config.model_fields.items():
            assert field.description, name
            assert isinstance(freeze.is_free(name), bool)


class TestSharedStages:
    @staticmethod
    def demo(**overrides: object) -> Config:
        return load.load(ROOT / "config" / "demo.jsonnet", overrides).config

    @pytest.mark.parametrize(("experiment", "policy"), [("demo", []), ("shapes_base", ["policy"])])
    def test_each_stands_after_what_it_reads(self, experiment: str, policy: list[str]) -> None:
        config = load.load(ROOT / "config" / f"{experiment}.jsonnet").config
        stages = paths.shared_stages(config)
        seen: set[Path] = set()
        for output, stage in stages.items():
            assert seen.issuperset(path for path in stage.inputs if path in stages)
            seen.add(output)
        assert sorted(stage.stage for stage in stages.values()) == [*policy, *["raw"] * 3, "sft", *["tokenise"] * 3]
        assert paths.resolve(config, "stage:sft/shapes") in stages

    def test_what_a_stage_does_not_depend_on_shares_it(self) -> None:
        other = self.demo(run_name="b", random_seed=7, kl_coeff=0.5, num_iterations=3, temperature=0.5)
        assert paths.shared_stages(other) == paths.shared_stages(self.demo())

    def test_a_change_moves_what_depends_on_it_and_nothing_else(self) -> None:
        def moved(**overrides: object) -> set[str]:
            other = paths.shared_stages(self.demo(**overrides))
            return {f"{stage.stage} {stage.name}" for path, stage in other.items() if path not in first}

        first = paths.shared_stages(self.demo())
        assert moved(**{"sft.shapes.steps": 3}) == {"sft shapes"}
        assert moved(**{"sft.shapes.random_seed": 3}) == {"sft shapes"}
        assert moved(**{"sft.shapes.base_model": "stage:shapes-policy"}) == {"sft shapes", "policy shapes"}
        assert moved(packing="none") == {"sft shapes"}
        assert moved(**{"raw_datasets.shapes_rl.count": 3}) == {"raw shapes_rl", "tokenise shapes_rl"}
        assert moved(**{"raw_datasets.shapes_sft.count": 3}) == {"raw shapes_sft", "tokenise shapes_sft", "sft shapes"}
        assert len(moved(image_area=1024)) == 4

    def test_other_paths_mean_themselves(self) -> None:
        config = self.demo()
        assert str(paths.resolve(config, "mair-lab/sft-simple")) == "mair-lab/sft-simple"
        assert (paths.resolve(config, "package:shapes/vision_tokenizer") / "config.json").is_file()


def test_command_shows_and_freezes(tmp_path: Path) -> None:
    def earl(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "earl", "config", *arguments], capture_output=True, text=True)

    shown = earl("show", str(ROOT / "config" / "demo.jsonnet"), "--set", "kl_coeff=0.5")
    assert shown.returncode == 0
    assert any(line.split() == ['"kl_coeff":', "0.5,", "//", "--set"] for line in shown.stdout.splitlines())
    wrong = earl("freeze", str(ROOT / "config" / "demo.jsonnet"), str(tmp_path / "c.json"), "--set", "kl_coef=0.5")
    assert wrong.returncode == 2
    assert "kl_coeff" in wrong.stderr
    assert list(tmp_path.iterdir()) == []


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


def integer_fields(model: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields that hold a whole number, in sections too; `*` stands for an entry's name."""
    found = []
    for name, field in model.model_fields.items():
        text = str(field.annotation)
        kinds = (RawDataset, Sft, SftValidation, Evaluation, JudgeGate)
        sections = [inner for inner in kinds if re.search(rf"\b{inner.__name__}\b", text)]
        for section in sections:
            found += integer_fields(section, f"{prefix}{name}." + ("*." if "dict" in text else ""))
        if not sections and re.search(r"\bint\b", text):
            found.append(prefix + name)
    return found


SECTIONS = {"raw_datasets.*.": {"source": "shapes", "count": 1, "seed": 1}, "sft.*.": TUNING}
SECTIONS |= {"evaluations.*.": {"prompts": 1}, "judge_gate.": {}}


def nested(name: str, value: object) -> dict:
    """Fields of an experiment that set one dotted name, in a section that holds what it must."""
    prefix = next((prefix for prefix in SECTIONS if name.startswith(prefix)), "")
    if not prefix:
        return {name: value}
    *parents, field = name.removeprefix(prefix).split(".")
    changed: dict[str, object] = {field: value}
    for parent in reversed(parents):
        changed = {parent: changed}
    inner = SECTIONS[prefix] | changed
    outer = prefix.split(".")[0]
    return {outer: {"a": inner} if "*" in prefix else inner}


INEXACT = 2**53 + 1
"""The smallest whole number that a double does not hold."""


class TestNumbersThatJsonnetDoesNotKeep:
    """Jsonnet's numbers are doubles: a seed above 2^53 would be another one, which nothing says."""

    def test_there_are_integers_everywhere(self) -> None:
        names = integer_fields()
        assert {
            "random_seed",
            "raw_datasets.*.seed",
            "sft.*.validation.examples",
            "evaluations.*.prompts",
            "judge_gate.seed",
        } <= set(names)

    @pytest.mark.parametrize("name", integer_fields())
    def test_no_integer_field_takes_them(self, name: str) -> None:
        for value in (INEXACT, -INEXACT, 1e300):
            with pytest.raises(ValidationError) as caught:
                Config.model_validate(MINIMAL | nested(name, value))
            (error,) = (error for error in caught.value.errors() if error["type"] == "inexact")
            assert ".".join(map(str, error["loc"])) == name.replace("*", "a")

    def test_a_file_that_holds_one_is_named_with_the_field(self, tmp_path: Path) -> None:
        path = experiment(tmp_path, raw_datasets={"a": {"source": "shapes", "count": 1, "seed": INEXACT}})
        assert f"{path}: field raw_datasets.a.seed is beyond 9007199254740991" in error_of(path)

    def test_the_largest_exact_one_stays(self, tmp_path: Path) -> None:
        path = experiment(tmp_path, random_seed=2**53 - 1)
        config = load.load(path).config
        assert config.random_seed == 9007199254740991
        freeze.write(config, tmp_path / "config.json")
        assert load.read(tmp_path / "config.json").random_seed == 9007199254740991

    def test_nor_an_override_a_variable_or_a_frozen_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = r"field random_seed .*9007199254740991"
        with pytest.raises(EarlError, match=wanted):
            load.load(experiment(tmp_path), load.parse_overrides(f"random_seed={INEXACT}"))
        config = load.load(experiment(tmp_path)).config
        with pytest.raises(EarlError, match=wanted):
            load.changed(config, {"random_seed": INEXACT})
        path = tmp_path / "config.json"
        path.write_text(freeze.frozen_text(config).replace('"random_seed": 42', f'"random_seed": {INEXACT}'))
        with pytest.raises(EarlError, match=wanted):
            load.read(path)
        monkeypatch.setenv("APP__SEED", str(INEXACT))
        (tmp_path / "y.jsonnet").write_text(
            "(import 'x.jsonnet') + {random_seed: std.parseInt(std.extVar('APP__SEED'))}"
        )
        with pytest.raises(EarlError, match=r"random_seed \(in .*APP__SEED.*9007199254740991"):
            load.load(tmp_path / "y.jsonnet")

    @pytest.mark.parametrize("text", ["1e400", "-1e400", "Infinity", "NaN"])
    def test_what_is_no_finite_number_is_named(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(EarlError, match=f"learning_rate.*{text}.*finite"):
            load.load(experiment(tmp_path), load.parse_overrides([f"learning_rate={text}"]))
        with pytest.raises(EarlError, match=f"coefficients.*{re.escape(f'[{text}]')}.*finite"):
            load.load(experiment(tmp_path), load.parse_overrides([f"coefficients=[{text}]"]))
        path = tmp_path / "config.json"
        frozen = freeze.frozen_text(load.load(experiment(tmp_path)).config)
        path.write_text(frozen.replace('"learning_rate": 3e-06', f'"learning_rate": {text}'))
        with pytest.raises(EarlError, match=r"config\.json.*learning_rate.*finite"):
            load.read(path)

    def test_a_literal_that_is_too_large_is_named_with_its_line(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonnet"
        path.write_text(json.dumps(MINIMAL)[:-1] + ",\nlearning_rate: 1e400}")
        message = error_of(path)
        assert "x.jsonnet:2" in message
        assert "1.8e308" in message


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
    ],
)
def test_runs_that_cannot_learn_are_refused(tmp_path, fields, message):
    assert re.search(message, error_of(experiment(tmp_path, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 0, "generations_per_sample": 1},
        {"num_iterations": 0, "top_k": 1},
        {"train_text_tokens_only": True},
        {"train_text_tokens_only": True, "text_only_steps": 0, "assistant_prefill": "<|image start|>"},
    ],
)
def test_what_can_learn_is_accepted(tmp_path, fields):
    load.load(experiment(tmp_path, **fields))


def test_a_frozen_configuration_below_a_file_is_not_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(EarlError, match=r"run/config\.json: cannot be read \(Not a directory\); check the path"):
        load.read(tmp_path / "run" / "config.json")
