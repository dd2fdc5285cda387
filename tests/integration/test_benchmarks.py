"""The six benchmarks, from files of their published columns to the table: a policy's run without iterations."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl import judges
from earl.config import jsonnet_values, load, paths
from earl.data.tokenised import open_dataset
from earl.files import images, tables
from earl.judges import Verdict
from earl.messages.errors import EarlError
from earl.report import results
from earl.shapes import dataset, world
from earl.stages import sft
from tests.support import bare_loop

ROOT = Path(__file__).parents[2]
BENCHMARKS = ("omniedit", "emuedit", "aurora", "magicbrush", "vismin", "i2ebench")
PRESETS = jsonnet_values.evaluate(ROOT / "config" / "data" / "benchmarks.libsonnet", {}).value
PARTS = {part: preset for name in BENCHMARKS for part, preset in PRESETS[name].items()}
FILES = {"vismin_counting": "vismin/counting-1.parquet", "vismin_relation": "vismin/relation-1.parquet"}
WITHOUT_TARGET = {"aurora", "emuedit", "i2ebench"}
SAMPLES = 3
SHIPPED = ROOT / "config" / "benchmarks.jsonnet"
VARIABLES = {
    "APP__POLICY": "/policy",
    "APP__BASE_EXP_DIR": "/runs",
    "APP__RUN_NAME": "base",
    "APP__REWARD_FUNCTION_API_BASE": "http://judge:4877",
}


class ByHand:
    """Knows no targets: 9 for every picture but the second of a file, on which it fails; 0 for its semantics."""

    name, model, revision, rubrics_digest = "by hand", None, None, None

    def score(self, judgements):
        assert all(judgement.edited.dtype == np.uint8 for judgement in judgements)
        good = Verdict("ok", "", edit_success=4.0, overedit=9.0, naturalness=9.0, artifacts=10.0)
        return [Verdict("failed", "") if place == 1 else good for place, _ in enumerate(judgements)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The shipped configuration with the demo's models, and files of four pairs in the columns of each benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for seed, (name, preset) in enumerate(PARTS.items()):
        write_benchmark(folder / "raw" / FILES.get(name, f"{name}/a.parquet"), preset["columns"], seed)
    path = folder / "benchmarks.jsonnet"
    demo, shipped = (json.dumps(str(ROOT / "config" / name)) for name in ("demo.jsonnet", "benchmarks.jsonnet"))
    kept = ("tokenizer_path", "vision_tokenizer_path", "image_area", "max_response_tokens", "model_context_size")
    kept += ("engine", "engine_batch_size", "device", "dtype", "cpu_threads")
    own = ", ".join(f"{name}: demo.{name}" for name in kept)
    path.write_text(f"local demo = import {demo}; (import {shipped}) + {{ {own} }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APP__POLICY", "package:shapes/base_policy")
        patch.setenv("APP__BASE_EXP_DIR", str(folder / "runs"))
        patch.setenv("APP__RUN_NAME", "base")
        patch.setenv("APP__REWARD_FUNCTION_API_BASE", VARIABLES["APP__REWARD_FUNCTION_API_BASE"])
        changes = {"sampling.samples_per_prompt": SAMPLES, "engine_batch_size": 12}
        changes |= {"benchmarks_dir": str(folder / "raw")}
        # The files are smaller than what the paper draws of them.
        changes |= {f"raw_datasets.benchmark_{name}.subset.rows": 4 for name in ("emuedit", "i2ebench")}
        return load.load(path, changes).config


def write_benchmark(path, columns, seed):
    raw = path.parent.parent / f"{path.stem}.raw.parquet"
    dataset.write_raw(raw, count=4, seed=seed, tasks=world.TASKS)
    rows = pq.read_table(raw).to_pydict()
    raw.unlink()
    found = {}
    for ours, place in columns.items():
        if place and place.endswith("[0]"):
            found[place.removesuffix("[0]")] = [[value, "in other words"] for value in rows[ours]]
        elif place:
            found[place] = rows[ours]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(found), path)


@pytest.fixture(scope="module")
def run(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "get", lambda config: ByHand())
        return bare_loop.run_all(config)


def test_every_benchmark_is_taken_whole_n_times(run, config):
    for name in BENCHMARKS:
        rows = tables.read_table(run.evaluation(name, 0).rollouts, tables.ROLLOUTS).to_pylist()
        assert len(rows) == 4 * SAMPLES * len(PRESETS[name])
        assert {row["example_id"] for row in rows} == {"0", "1", "2", "3"}
        assert {row["dataset"] for row in rows} == {f"benchmark_{part}" for part in PRESETS[name]}
        assert all((row["target"] is None) == (name in WITHOUT_TARGET) for row in rows)
        assert all(images.decode(row["original"]["bytes"], "").shape == (64, 64, 3) for row in rows)
        assert (rows[0]["task"] is None) == (name == "magicbrush")


def test_the_table_has_all_six_beside_the_published_rows(run):
    found = results.compare([results.read(str(run.path))], published=True)
    assert found["published"]["columns"] == found["columns"], "in the order of the paper"
    part = found["entries"][0]["evaluations"]["emuedit"]
    judged = part["n"] - part["no_image"]
    assert (part["n"], part["prompts"], part["failed"]) == (12, 4, 1)
    assert part["semantic_consistency"] == {"mean": 4.0, "std": 0.0, "n": judged - 1, "low": 4.0, "high": 4.0}
    assert part["viescore"]["mean"] == pytest.approx(6 * (judged - 1) / 11)
    assert list(part["best_of"]) == ["1", "2", "3"]
    assert part["best_of"]["3"]["n"] == 3, "the prompt whose judgement failed has but two"
    assert len(part["tasks"]) > 1
    assert len(found["entries"][0]["evaluations"]["magicbrush"]["tasks"]) == 1


def test_a_pair_without_its_target_is_no_example_to_learn_from(run, config, tmp_path):
    folder = paths.tokenised_folder(config, "benchmark_emuedit")
    example = open_dataset(folder)[0]
    assert (example.target_tokens, example.target) == (None, None)
    assert example.original_tokens.shape == (8, 8)
    tuning = {"base_model": "package:shapes/base_policy", "train_paths_file": [str(folder)], "steps": 1}
    changed = load.changed(config, {"sft": {"x": tuning | {"coefficients": [1.0]}}})
    with pytest.raises(EarlError, match=r"emuedit: example \d: column 'target_tokens' is empty"):
        sft.run(changed, "x", tmp_path / "out")


def test_without_training_there_need_be_no_training_data(config):
    assert config.train_paths_file == []
    with pytest.raises(EarlError, match=r"train_paths_file is empty; .* or set num_iterations to 0"):
        load.changed(config, {"num_iterations": 1})
    with pytest.raises(EarlError, match=r"val_paths_file is empty, but evaluations draw .*: more"):
        load.changed(config, {"evaluations.more": {"prompts": 3}})
    with pytest.raises(EarlError, match=r"columns says that there is no original, which every row needs"):
        load.changed(config, {"raw_datasets.benchmark_emuedit.columns.original": None})


@pytest.fixture
def variables(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def test_benchmarks_that_are_not_named_are_not_read(variables):
    chosen = load.load(SHIPPED, {"benchmarks": ["vismin", "omniedit"]}).config
    assert chosen.evaluations.keys() == {"omniedit", "vismin"}
    stages = paths.shared_stages(chosen).values()
    read = {stage.name for stage in stages if stage.stage == "download"}
    assert read == {chosen.raw_datasets[f"benchmark_{part}"].path for part in ("omniedit", *FILES)}
    with pytest.raises(EarlError, match=r"benchmarks has omni, which is none of: aurora, emuedit, .*, vismin"):
        load.load(SHIPPED, {"benchmarks": ["omni"]})


@pytest.mark.parametrize("model", ["s", "think_s"])
def test_a_policy_is_evaluated_as_it_was_trained(variables, monkeypatch, model):
    monkeypatch.setenv("APP__DATA_DIR", "/data")
    trained = load.load(ROOT / "config" / f"sft_{model}__rl_s.jsonnet").config
    evaluated = load.load(SHIPPED, {"reasoning": model == "think_s"}).config
    assert evaluated.assistant_prefill == trained.assistant_prefill
