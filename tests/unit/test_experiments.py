"""The ten experiments resolve to what the paper's table says, and each has its like in the shapes world."""

from pathlib import Path

import pytest

from earl.config import load, paths
from earl.messages.errors import EarlError
from earl.run import plan

ROOT = Path(__file__).parents[2]
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
    # Without reasoning on pairs of its own, with mistakes.
    recipe = {
        tuning: ([dataset + ("" if reasoning else "_mixed") for dataset in data], reasoning)
        for tuning, (_, data, reasoning, _) in RECIPES[kind].items()
    }
    assert recipe == {
        tuning: ([path.removeprefix("stage:tokenise/") for path in found.train_paths_file], found.reasoning)
        for tuning, found in config.sft.items()
    }
    assert not set(config.raw_datasets["omniedit"].tasks) & set(config.raw_datasets["vismin"].tasks)
    for dataset in data:
        right, mixed = (config.raw_datasets[each] for each in (dataset, f"{dataset}_mixed"))
        assert (right.count, right.tasks) == (mixed.count, mixed.tasks)
        assert right.seed != mixed.seed, "no pair in common"
        assert (right.damaged_fraction, right.unchanged_fraction) == (0, 0), "RL is judged against its targets"
        assert min(mixed.damaged_fraction, mixed.unchanged_fraction) > 0


def test_the_ten_in_the_shapes_world_share_what_comes_before_rl() -> None:
    configs = [load.load(path).config for path in (ROOT / "config" / "shapes").glob("sft_*.jsonnet")]
    stages = {output: stage.stage for config in configs for output, stage in paths.shared_stages(config).items()}
    # Seven data sets, each with and without mistakes, and two held-out ones; s, sc, sc2stage (which starts from s) and
    # think_s.
    made = {kind: list(stages.values()).count(kind) for kind in stages.values()}
    assert made == {"raw": 16, "tokenise": 16, "sft": 4}


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
