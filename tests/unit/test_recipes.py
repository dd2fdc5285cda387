"""The recipes fit on the GPUs that they are written for, by `earl plan` with the real simulation."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "config" / "recipes").glob("*.jsonnet"))
SMALL = {
    "model_type": "emu3_text_model", "architectures": ["Emu3ForCausalLM"], "hidden_size": 2048, "vocab_size": 184_622,
    "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
"""A policy of 1.8B weights."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    values = {
        "DATA_DIR": "data",
        "BASE_EXP_DIR": "runs",
        "REWARD_FUNCTION_API_BASE": "http://j",
        "POLICY": str(tmp_path),
    }
    for name, value in values.items():
        monkeypatch.setenv(f"APP__{name}", value)
    monkeypatch.delenv("APP__RUN_NAME", raising=False)


@pytest.mark.slow
def test_every_recipe_fits_on_80_gb(place: None, earl) -> None:
    done = earl("plan", "--gpu", "h100", "--json", *(word for path in RECIPES for word in ("--config", path)))
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    gpus = {one["run_name"]: [stage["gpus"] for stage in one["stages"]] for one in found}
    assert gpus == {
        "eight_gpus": [8],
        "four_and_four": [8],
        "one_gpu_lora": [1],
        "one_gpu_small": [1],
        "shared_judge": [4],
        "two_nodes": [16],
    }
    # All that a shard samples is in the cache at once.
    assert [note for one in found for note in one["notes"] if "cache" in note] == []


def test_every_recipe_has_a_page_and_the_pages_say_how_to_call_them() -> None:
    pages = ROOT / "docs" / "recipes"
    for path in RECIPES:
        assert f"docs/recipes/{path.stem}.md" in path.read_text(encoding="utf-8")
        page = (pages / f"{path.stem}.md").read_text(encoding="utf-8")
        assert f"earl plan --config config/recipes/{path.name}" in page
        assert f"({path.stem}.md)" in (pages / "README.md").read_text(encoding="utf-8")
        assert f"`{path.stem}`" in (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_profile_of_two_nodes_has_the_gpus_that_its_recipe_needs(place: None) -> None:
    from earl.config import load
    from earl.estimate import fit, gpus

    config = load.load(ROOT / "config" / "recipes" / "two_nodes.jsonnet").config
    asked = gpus.asked(gpus.of_profiles(str(ROOT / "profiles" / "two_nodes"))("iterate"))
    assert asked.gpu.name == "h100"
    assert asked.count * asked.nodes == 16
    assert fit.counts(config, "iterate", asked) == []
