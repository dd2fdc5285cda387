"""The shipped presets on small files of the published form: columns and types of each data set's card."""

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
from PIL import Image

from earl.config import jsonnet_values, load, paths
from earl.config.schema import Config
from earl.data.tokenised import open_dataset
from earl.emu3.vocabulary import Vocabulary
from earl.files import images, tables
from earl.files.hub_names import data_files
from earl.messages.errors import EarlError
from earl.shapes import dataset
from earl.stages import generate, tokenise
from tests.support.evaluation_files import demo_config

ROOT = Path(__file__).parents[2]
PAIRS = jsonnet_values.evaluate(ROOT / "config" / "data" / "columns.libsonnet", {}).value
BENCHMARKS = jsonnet_values.evaluate(ROOT / "config" / "data" / "benchmarks.libsonnet", {}).value
TEXT, PICTURE, NUMBER = datasets.Value("string"), datasets.Image(), datasets.Value("int64")
PAPERS_SIX = ["aurora", "emuedit", "i2ebench", "magicbrush", "omniedit", "vismin"]


def shade(value: int) -> Image.Image:
    return Image.fromarray(np.full((64, 64, 3), value, np.uint8))


def published(path: Path, rows: int = 4, **columns: Any) -> Path:
    """Write a file as `datasets` does. A column is its type, with values by its name, or a pair of type and values."""
    kinds = {name: given[0] if isinstance(given, tuple) else given for name, given in columns.items()}
    values: dict[str, list] = {}
    for place, (name, given) in enumerate(columns.items()):
        if isinstance(given, tuple):
            values[name] = given[1]
        elif given is PICTURE:
            values[name] = [shade(40 * row + 10 * place) for row in range(rows)]
        elif given is NUMBER:
            values[name] = list(range(100, 100 + rows))
        else:
            values[name] = [f"{name} {row}" for row in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path.parent)
    return path if path.suffix == ".parquet" else path.parent


def tokenised(preset: dict, raw: Path, out: Path, name: str = "d", **changes: Any) -> list[Any]:
    """Tokenise a preset's files; return the examples."""
    config = demo_config(**{f"raw_datasets.{name}": preset | {"path": str(raw)} | changes})
    tokenise.run(config, name, raw, out)
    found = open_dataset(out)
    return [found[row] for row in range(len(found))]


ESCHER = {
    "id": TEXT, "source_image": PICTURE, "edited_image": PICTURE, "edit_instruction": TEXT, "thinking": TEXT,
    "task": TEXT,
}  # fmt: skip
AURORA = {"input": PICTURE, "output": PICTURE, "instruction": TEXT}
CARDS: dict[str, dict[str, Any]] = {
    "omniedit": {
        "omni_edit_id": TEXT, "task": TEXT, "src_img": PICTURE, "edited_img": PICTURE,
        "edited_prompt_list": (datasets.List(TEXT), [[f"edit {row}", "in other words"] for row in range(4)]),
        "width": NUMBER, "height": NUMBER, "sc_score_1": NUMBER,
    },
    "magic_brush": {
        "img_id": TEXT, "turn_index": datasets.Value("int32"), "source_img": PICTURE, "mask_img": PICTURE,
        "instruction": TEXT, "target_img": PICTURE,
    } | {"turn_index": (datasets.Value("int32"), [1, 2, 1, 2])},
    "aurora_ag": AURORA | {"source": (TEXT, ["ag", "kubric", "mb", "ag"])},
    "aurora_kubric": AURORA | {"source": (TEXT, ["ag", "kubric", "mb", "kubric"])},
    "ss2": AURORA,
    "vismin": {
        "image_id": (TEXT, ["o1", "e1", "o2", "e2"]), "image": PICTURE, "caption": TEXT, "bounding_boxes": TEXT,
        "source_image_id": (TEXT, ["", "o1", "", "o2"]), "category": (TEXT, ["", "counting", "", "object"]),
    },
    "human-edit": {
        "IMAGE_ID": TEXT, "EDITING_TYPE": TEXT, "CORE": TEXT, "MASK": NUMBER, "EDITING_INSTRUCTION": TEXT,
        "OUTPUT_DESCRIPTION": TEXT, "INPUT_CAPTION_BY_LLAMA": TEXT, "OUTPUT_CAPTION_BY_LLAMA": TEXT,
        "INPUT_IMG": PICTURE, "MASK_IMG": PICTURE, "OUTPUT_IMG": PICTURE, "NOTE": TEXT,
    },
} | {name: ESCHER for name in PAIRS if name.startswith("escher-")}  # fmt: skip


class TestPairs:
    EXPECTED: ClassVar = {
        "omniedit": [("omni_edit_id 0", "task 0", "edit 0"), ("omni_edit_id 3", "task 3", "edit 3")],
        "magic_brush": [("0", None, "instruction 0"), ("3", None, "instruction 3")],
        "aurora_ag": [("0", "ag", "instruction 0"), ("3", "ag", "instruction 3")],
        "aurora_kubric": [("1", "kubric", "instruction 1"), ("3", "kubric", "instruction 3")],
        "ss2": [("0", None, "instruction 0"), ("3", None, "instruction 3")],
        "vismin": [("e1", "counting", "caption 1"), ("e2", "object", "caption 3")],
        "human-edit": [
            ("IMAGE_ID 0", "EDITING_TYPE 0", "EDITING_INSTRUCTION 0"),
            ("IMAGE_ID 3", "EDITING_TYPE 3", "EDITING_INSTRUCTION 3"),
        ],
    } | {
        name: [("id 0", "task 0", "edit_instruction 0"), ("id 3", "task 3", "edit_instruction 3")]
        for name in PAIRS
        if name.startswith("escher-")
    }

    def test_there_is_one_for_each_data_set_of_the_paper(self) -> None:
        assert set(PAIRS) == set(CARDS)
        assert len(PAIRS) == 14
        assert [name for name in PAIRS if "path" not in PAIRS[name]] == ["ss2"]
        for preset in PAIRS.values():
            assert "path" not in preset or data_files(preset["path"])

    @pytest.mark.parametrize("name", sorted(PAIRS))
    def test_it_reads_what_is_published(self, name: str, tmp_path: Path) -> None:
        suffix = Path(PAIRS[name].get("path", ".parquet")).suffix
        raw = published(tmp_path / "raw" / f"data-0{suffix}", **CARDS[name])
        examples = tokenised(PAIRS[name], raw, tmp_path / "out", name, keep_images=True)
        assert len(examples) == (2 if name in ("aurora_ag", "aurora_kubric", "vismin") else 4)
        found = [(one.example_id, one.task, one.instruction) for one in (examples[0], examples[-1])]
        assert found == self.EXPECTED[name]
        columns = list(CARDS[name])
        for one, row in zip((examples[0], examples[-1]), self._rows(name), strict=True):
            original, edited = self._shades(name, columns, row)
            assert images.decode(one.original, "").mean() == original
            assert images.decode(one.target, "").mean() == edited
        if name.startswith("escher-"):
            assert examples[2].reasoning == [("thinking", "thinking 2")]

    @staticmethod
    def _rows(name: str) -> tuple[int, int]:
        return (1, 3) if name in ("aurora_kubric", "vismin") else (0, 3)

    @staticmethod
    def _shades(name: str, columns: list[str], row: int) -> tuple[int, int]:
        """The grey of both images of a row: 40 a row and 10 a column, as `published` writes them."""
        places = PAIRS[name]["columns"]
        original, edited = (columns.index(places[ours]) for ours in ("original", "edited"))
        # VisMin's originals stand in the row before.
        return 40 * (row - (name == "vismin")) + 10 * original, 40 * row + 10 * edited

    def test_escher_with_all_that_the_papers_script_takes(self, tmp_path: Path) -> None:
        keys = ["source_image_grounding_information", "conditioning_information", "thinking"]
        path = tmp_path / "x.jsonnet"
        presets = f"(import '{ROOT}/config/data/columns.libsonnet')"
        path.write_text(f"local p = {presets}; p['escher-ss2'] + {{ columns+: {{ reasoning: p.escher_reasoning }} }}")
        preset = jsonnet_values.evaluate(path, {}).value
        raw = published(tmp_path / "a.parquet", **(dict.fromkeys(keys, TEXT) | ESCHER))
        assert tokenised(preset, raw, tmp_path / "out")[1].reasoning == [(key, f"{key} 1") for key in keys]
        bare = published(tmp_path / "b.parquet", **ESCHER)
        with pytest.raises(EarlError, match="'source_image_grounding_information' \\(reasoning\\) is missing"):
            tokenised(preset, bare, tmp_path / "other")


BENCHMARK_CARDS: dict[str, dict[str, Any]] = {
    "omniedit": CARDS["omniedit"],
    "emuedit": {
        "idx": NUMBER, "image": PICTURE, "instruction": TEXT, "input_caption": TEXT, "output_caption": TEXT,
        "task": TEXT,
    },
    "aurora": {"input": PICTURE, "instruction": TEXT, "source": TEXT},
    "magicbrush": {"input": PICTURE, "mask": PICTURE, "output": PICTURE, "instruction": TEXT},
    "vismin_counting": {
        "source_image": PICTURE, "edited_image": PICTURE,
        "edit_instruction": (TEXT, [f"edit_instruction: count {row}" for row in range(4)]),
    },
    "vismin_relation": {
        "source_image": PICTURE, "edited_image": PICTURE,
        "edit_instruction": (TEXT, [f"edit_instruction: move {row}" for row in range(4)]),
    },
    "i2ebench": {"image": PICTURE, "instruction": TEXT, "task": TEXT, "sample_id": TEXT},
    "gedit_en": {
        "task_type": TEXT, "key": TEXT, "instruction": TEXT,
        "instruction_language": (TEXT, ["en", "cn", "en", "cn"]), "input_image": PICTURE, "input_image_raw": PICTURE,
        "Intersection_exist": (datasets.Value("bool"), [True] * 4),
    },
    "imgedit": {"key": TEXT, "image": PICTURE, "prompt": TEXT, "edit_type": TEXT},
}  # fmt: skip
BENCHMARK_CARDS["gedit_cn"] = BENCHMARK_CARDS["gedit_en"]
PARTS = {name: preset for parts in BENCHMARKS.values() for name, preset in parts.items()}


class TestBenchmarks:
    EXPECTED: ClassVar = {
        "omniedit": ("1", "task 1", "edit 1"),
        "emuedit": ("1", "task 1", "instruction 1"),
        "aurora": ("1", "source 1", "instruction 1"),
        "magicbrush": ("1", None, "instruction 1"),
        "vismin_counting": ("1", "counting", "count 1"),
        "vismin_relation": ("1", "relation", "move 1"),
        "i2ebench": ("1", "task 1", "instruction 1"),
        "gedit_en": ("key 2", "task_type 2", "instruction 2"),
        "gedit_cn": ("key 3", "task_type 3", "instruction 3"),
        "imgedit": ("key 1", "edit_type 1", "prompt 1"),
    }

    @pytest.mark.parametrize("name", sorted(PARTS))
    def test_it_reads_what_is_published(self, name: str, tmp_path: Path) -> None:
        raw = published(tmp_path / "a.parquet", **BENCHMARK_CARDS[name])
        fewer = {"subset": PARTS[name]["subset"] | {"rows": 4}} if "subset" in PARTS[name] else {}
        examples = tokenised(PARTS[name], raw, tmp_path / "out", name, **fewer)
        assert len(examples) == (2 if name.startswith("gedit") else 4)
        assert (examples[1].example_id, examples[1].task, examples[1].instruction) == self.EXPECTED[name]
        places = PARTS[name]["columns"]
        assert (examples[1].target is None) == (places["edited"] is None)
        column = list(BENCHMARK_CARDS[name]).index(places["original"])
        row = {"gedit_en": 2, "gedit_cn": 3}.get(name, 1)
        assert images.decode(examples[1].original, "").mean() == 40 * row + 10 * column

    def test_the_rows_of_the_papers_evaluation(self) -> None:
        drawn = {name: preset["subset"] for name, preset in PARTS.items() if "subset" in preset}
        assert drawn == {name: {"seed": 42, "rows": 1000} for name in ("emuedit", "i2ebench")}
        assert set(PAPERS_SIX) < set(BENCHMARKS)

    def test_they_are_sampled_as_published(self, shipped: Any) -> None:
        config = shipped()
        assert sorted(config.evaluations) == PAPERS_SIX
        for one in config.evaluations.values():
            assert (one.top_k, one.temperature, one.samples_per_prompt, one.prompts) == (2048, 1.0, 1, None)
            assert one.assistant_prefill == "<|image start|>{H}*{W}"
        reasoning = shipped(reasoning=True)
        assert reasoning.evaluations["omniedit"].assistant_prefill is None
        assert "thinking" in reasoning.assistant_prefill

    def test_files_come_from_the_hub_or_a_folder(self, shipped: Any) -> None:
        found = {name: one.path for name, one in shipped().raw_datasets.items()}
        assert len(found) == 7
        assert all(path.startswith("hf://datasets/") for path in found.values())
        assert found["benchmark_vismin_relation"].endswith("escher-vismin-dev/data/train/relation-00001.parquet")
        local = shipped(benchmarks_dir="/b", benchmarks=["vismin", "imgedit"])
        assert {name: one.path for name, one in local.raw_datasets.items()} == {
            "benchmark_vismin_counting": "/b/vismin/*counting*.parquet",
            "benchmark_vismin_relation": "/b/vismin/*relation*.parquet",
            "benchmark_imgedit": "/b/imgedit",
        }
        with pytest.raises(EarlError, match=r"imgedit is no Parquet file on the hub: run `earl data fetch imgedit"):
            shipped(benchmarks=["imgedit"])

    def test_two_languages_are_two_evaluations_of_one_download(self, shipped: Any) -> None:
        config = shipped(benchmarks=["gedit_en", "gedit_cn"])
        assert sorted(config.evaluations) == ["gedit_cn", "gedit_en"]
        assert [stage.stage for stage in paths.shared_stages(config).values()].count("download") == 1


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Any:
    variables = {
        "POLICY": "/policy",
        "BASE_EXP_DIR": "/runs",
        "RUN_NAME": "a",
        "REWARD_FUNCTION_API_BASE": "http://j:1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"APP__{name}", value)
    return lambda **changes: load.load(ROOT / "config" / "benchmarks.jsonnet", changes).config


def test_an_evaluation_starts_completions_from_its_own_prefill(tmp_path: Path) -> None:
    """The shapes base policy, told the size, goes on with the image; told nothing, it says the size first."""
    raw = tmp_path / "a.parquet"
    dataset.write_raw(raw, count=2, seed=0)
    fields = {
        "raw_datasets.d": {"source": "shapes", "count": 2, "seed": 0}, "val_paths_file": [str(tmp_path / "out")],
        "evaluations": {name: {"prompts": None} for name in ("told", "asked")}, "engine_batch_size": 2,
        "num_iterations": 0,
    }  # fmt: skip
    config: Config = demo_config(**fields)
    tokenise.run(config, "d", raw, tmp_path / "out")
    config = load.changed(config, {"evaluations.told.assistant_prefill": "<|image start|>{H}*{W}"})
    policy = paths.resolve(config, "package:shapes/base_policy")
    v = Vocabulary.from_folder(policy)
    sampler = generate.Sampler.load(config, policy)
    starts = {}
    for name in ("told", "asked"):
        generate.run_evaluation(config, name, 0, sampler, tmp_path / f"{name}.parquet")
        row = tables.read_table(tmp_path / f"{name}.parquet", tables.ROLLOUTS).to_pylist()[0]
        assert (row["edited"] is None) == (row["finish_reason"] != "stop")
        prompt = v.decode(row["prompt_token_ids"])
        starts[name] = (prompt.endswith("<|image start|>8*8"), row["completion_token_ids"][0] == v.img)
    assert starts == {"told": (True, True), "asked": (False, False)}
    assert json.loads(json.dumps(config.model_dump(mode="json")))["evaluations"]["asked"]["assistant_prefill"] is None
