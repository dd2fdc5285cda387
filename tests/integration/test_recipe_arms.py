"""benchmarks/recipes.py: its stand-in for a sampled readout, and what its arms differ in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import recipes
from earl.files.layout import Run
from earl.judges import Judgement, Verdict

ROOT = Path(__file__).parents[2]
BLACK = np.zeros((8, 8, 3), np.uint8)
EXACT = {"edit_success": 7.3, "overedit": 10.0, "naturalness": 0.0, "artifacts": 5.0, "ground_score": 2.5}


@pytest.fixture
def exact_judge(monkeypatch):
    """The program judge gives `EXACT` for everything but the last question, on which it fails."""

    def score(_, judgements):
        return [Verdict("ok", "words", **EXACT)] * (len(judgements) - 1) + [Verdict("failed", "no target")]

    monkeypatch.setattr(recipes.ProgramJudge, "score", score)


def drawn(*key, count=4000):
    return recipes.SampledReadout(*key).score([Judgement("i", BLACK, BLACK)] * (count + 1))


def test_the_readout_is_drawn_around_the_exact_score(exact_judge):
    *verdicts, failed = drawn(42, 1, 0)
    assert failed == Verdict("failed", "no target")
    found = {name: np.array([getattr(verdict, name) for verdict in verdicts]) for name in EXACT}
    for name, exact in EXACT.items():
        variance = exact * (10 - exact) / 10
        assert set(found[name]) <= set(range(11))
        # Five standard errors; at both ends there is nothing to draw.
        assert found[name].mean() == pytest.approx(exact, abs=5 * (variance / len(verdicts)) ** 0.5)
        assert found[name].var() == pytest.approx(variance, rel=0.15)
    assert all(json.loads(verdict.raw) == EXACT for verdict in verdicts)
    # Sub-scores of one image are drawn apart.
    assert abs(np.corrcoef(found["edit_success"], found["artifacts"])[0, 1]) < 0.1


def test_a_draw_depends_on_its_key_and_place_alone(exact_judge):
    some, more, other = drawn(42, 1, 0, count=5), drawn(42, 1, 0, count=9), drawn(42, 1, 1, count=9)
    assert some[:5] == more[:5]
    assert more[:9] != other[:9]
    assert len({verdict.edit_success for verdict in more[:9]}) > 1


def test_arms_differ_in_what_they_say_alone():
    configs = {name: recipes.configure(ROOT / "config" / "demo.jsonnet", {}, name, 7) for name in recipes.ARMS}
    reference = configs[recipes.REFERENCE]
    assert (reference.advantage, reference.zero_variance_groups, reference.random_seed) == ("mean_std", "keep", 7)
    for name, config in configs.items():
        differing = {field for field, value in config if value != getattr(reference, field)}
        arm = recipes.ARMS[name]
        instead = set() if arm.does_rl else {"num_iterations", "model_path"}
        instead |= {"selections", "sft"} if arm.fine_tuning else set()
        assert differing - {"run_name", "push_to_hub_repo_id"} == set(arm.fields) | instead
    assert not recipes.ARMS["exact"].sampled_readout


def test_an_average_weighs_the_newest_policy_most(tmp_path):
    source = Run(tmp_path / "source")
    for index, value in enumerate((1.0, 2.0, 4.0)):
        policy = source.iteration(index).policy
        policy.mkdir(parents=True)
        save_file({"weight": torch.full((2,), value)}, policy / "model.safetensors")
        (policy / "config.json").write_text("{}")
        (policy / "manifest.json").write_text("{}")
    recipes.write_average(source, 2, 0.75, tmp_path / "out")
    # 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].tolist() == [1.9375] * 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_fine_tuning_arms_learn_from_the_episodes_of_the_reference():
    config = recipes.configure(ROOT / "config" / "demo.jsonnet", {"base_exp_dir": "elsewhere"}, "dpo", 7)
    assert config.selections["episodes"].run == "elsewhere/recipes-reference-7"
    assert config.sft["tuned"].base_model == "stage:sft/shapes"
    assert config.sft["tuned"].objective == "dpo"
