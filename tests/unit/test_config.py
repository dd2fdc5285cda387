"""Mistakes in an experiment are named with field and file, and a run's configuration is frozen."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from earl.config import freeze, load, paths
from earl.config.schema import Config
from earl.config.sections import Evaluation, JudgeGate, RawDataset, Sft, SftValidation
from earl.messages.errors import EarlError
from tests.support.experiments import ASKED, MINIMAL, VARIABLES, error_of, experiment

ROOT = Path(__file__).parents[2]
TUNING = {"base_model": "model", "train_paths_file": ["x"], "steps": 1}


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


SHAPES = {"source": "shapes", "count": 1, "seed": 1}


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
        ({"learning_rate_schedule": "linear"}, ["schedule_iterations is null", "linear"]),
        ({"schedule_iterations": 9}, ["schedule_iterations is 9", "leave it out"]),
        ({"decay_iterations": 9}, ["decay_iterations is 9", "leave it out"]),
        (
            {"learning_rate_schedule": "cosine", "schedule_iterations": 9}
            | {"decay_iterations": 8, "warmup_iterations": 2},
            ["decay_iterations is 8", "lower it to 7"],
        ),
        (
            {"raw_datasets": {"s": SHAPES | {"unchanged_fraction": 0.7, "damaged_fraction": 0.7}}},
            ["damaged_fraction", "1.4", "lower one"],
        ),
        (
            {"raw_datasets": {"s": {"source": "parquet", "path": "a.parquet", "damaged_fraction": 0.7}}},
            ["damaged_fraction", "parquet", "leave it out"],
        ),
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
        assert ["kl_coeff", "0.0003", "0.5"] in rows
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
        with pytest.raises(EarlError, match=r"evaluations\.heldout\.prompts +504 +100"):
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


def test_a_frozen_configuration_below_a_file_is_not_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(EarlError, match=r"run/config\.json: cannot be read \(Not a directory\); check the path"):
        load.read(tmp_path / "run" / "config.json")


def test_a_dotted_name_sets_a_section_that_is_null_and_fails_where_there_is_none():
    config = load.validate(MINIMAL, "here")
    assert config.lora is None
    assert load.changed(config, {"lora.rank": 4, "lora.alpha": 2}).lora.settings.scale == 0.5
    with pytest.raises(EarlError, match="learning_rate"):
        load.changed(config, {"learning_rate.peak": 1.0})
