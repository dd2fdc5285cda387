"""What cannot work is refused in the plan: all of it at once, each with field, origin and remedy."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import load
from earl.config.schema import Config
from earl.messages.errors import EarlError
from earl.run import preflight
from tests.support.workplace import EXPERIMENT, ROOT, Workplace, write_tokenised

SHAPES = {"raw_datasets": {"pairs": {"source": "shapes", "count": 20, "seed": 1}}}
SHAPES |= {"train_paths_file": ["stage:tokenise/pairs"], "image_area": 64 * 64}
TUNING = {"base_model": "model", "train_paths_file": ["train.parquet"], "steps": 1}
VALIDATED = {"model_path": "stage:sft/s", "sft": {"s": TUNING | {"validation": {}}}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


def config(**fields: object) -> Config:
    return Config(**(EXPERIMENT | fields))


def refusal(**fields: object) -> str:
    with pytest.raises(EarlError) as caught:
        preflight.check(config(**fields))
    return str(caught.value)


class TestData:
    def test_what_is_there_is_accepted(self, place: Workplace) -> None:
        preflight.check(config(evaluations={"held_out": {"prompts": 16}}))
        preflight.check(config(**SHAPES))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"train_paths_file": ["no/train"]}, "field train_paths_file names what is not there: /"),
            (
                {"val_paths_file": ["no.json"], "evaluations": {"e": {"prompts": 1}}},
                "field val_paths_file names what is not there: /",
            ),
            (
                {"evaluations": {"e": {"prompts": 1, "paths_file": ["no.parquet"]}}},
                "field evaluations.e.paths_file names what is not there: /",
            ),
            (
                {
                    "model_path": "stage:sft/s",
                    "sft": {"s": TUNING | {"train_paths_file": ["no"]}},
                },
                "field sft.s.train_paths_file names what is not there: /",
            ),
            (VALIDATED | {"val_paths_file": ["no"]}, "field val_paths_file names what is not there: /"),
            (
                {**VALIDATED, "sft": {"s": TUNING | {"validation": {"paths_file": ["no"]}}}},
                "field sft.s.validation.paths_file names what is not there: /",
            ),
        ],
    )
    def test_missing_tokenised_data_are_named_by_their_field(self, place, fields: dict, message: str) -> None:
        assert message in refusal(**fields)

    @pytest.mark.parametrize("path", ["no.parquet", "no/*.parquet"])
    def test_missing_raw_data_are_named_by_their_field(self, place: Workplace, path: str) -> None:
        raw = {"raw_datasets": {"pairs": {"source": "parquet", "path": path}}}
        message = refusal(**SHAPES | raw)
        assert f"field raw_datasets.pairs.path is '{path}', but there is no Parquet file {place.path}" in message

    def test_a_folder_of_images_is_no_raw_data_set(self, place: Workplace) -> None:
        (place.path / "photos").mkdir()
        (place.path / "photos" / "a.jpg").touch()
        message = refusal(**SHAPES | {"raw_datasets": {"pairs": {"source": "parquet", "path": "photos"}}})
        assert "pairs.path is 'photos', which cannot be read: photos: holds no Parquet file" in message
        assert "but a.jpg; check the path, or write the data as Parquet (docs/data.md shows how)" in message

    def test_raw_data_that_nobody_reads_may_be_missing(self, place: Workplace) -> None:
        preflight.check(config(raw_datasets={"unused": {"source": "parquet", "path": "no.parquet"}}))

    def test_a_file_that_is_no_parquet_is_named_by_its_field(self, place: Workplace) -> None:
        (place.path / "raw.parquet").write_text("version https://git-lfs")
        raw = {"raw_datasets": {"pairs": {"source": "parquet", "path": "raw.parquet"}}}
        assert "field raw_datasets.pairs.path is 'raw.parquet', which cannot be read" in refusal(**SHAPES | raw)
        message = refusal(train_paths_file=["raw.parquet"])
        assert "field train_paths_file cannot be drawn from: raw.parquet: is plain text, such as CSV" in message

    def test_more_prompts_than_rows(self, place: Workplace) -> None:
        # 128 / 8 = 16 prompts an iteration; half of 20 rows is 10.
        message = refusal(**SHAPES, coefficients=[0.5])
        assert "episodes_per_iteration asks for episodes_per_iteration / generations_per_sample = 16 prompts" in message
        assert "train_paths_file gives 10 different rows" in message
        preflight.check(config(**SHAPES, coefficients=[0.8]))
        write_tokenised(place.path / "few.parquet", "few", 5)
        held_out = {"few": {"prompts": 6, "paths_file": ["few.parquet"]}, "usual": {"prompts": 17}}
        message = refusal(evaluations=held_out)
        assert "evaluations.few.prompts asks for 6 prompts, but evaluations.few.paths_file gives 5" in message
        assert "evaluations.usual.prompts asks for 17 prompts, but val_paths_file gives 16" in message
        preflight.check(config(evaluations={"few": {"prompts": None, "paths_file": ["few.parquet"]}}))

    def test_rows_of_raw_files_are_known_before_they_are_tokenised(self, place: Workplace) -> None:
        write_tokenised(place.path / "raw.parquet", "raw", 15)
        raw = {"raw_datasets": {"pairs": {"source": "parquet", "path": "raw.parquet"}}}
        assert "train_paths_file gives 15 different rows" in refusal(**SHAPES | raw)
        arrow = pq.read_table(place.path / "raw.parquet")
        with pa.OSFile(str(place.path / "raw.arrow"), "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as writer:
            writer.write_table(arrow)
        raw["raw_datasets"]["pairs"]["path"] = "raw.arrow"
        assert "train_paths_file gives 15 different rows" in refusal(**SHAPES | raw)
        raw["raw_datasets"]["pairs"]["subset"] = {"rows": 7, "seed": 1}
        assert "train_paths_file gives 7 different rows" in refusal(**SHAPES | raw)
        raw["raw_datasets"]["pairs"]["path"] = "hf://datasets/o/n/a.parquet"
        assert "train_paths_file gives 7 different rows" in refusal(**SHAPES | raw)


class TestModels:
    @pytest.mark.parametrize("field", ["model_path", "sft.s.base_model"])
    def test_a_policy_that_is_no_emu3(self, place: Workplace, field: str) -> None:
        change(place.path / "model" / "config.json", model_type="llama")
        fields = {"model_path": "stage:sft/s", "sft": {"s": TUNING}} if field.startswith("sft") else {}
        message = refusal(**fields)
        assert f"field {field} is 'model', which cannot be used: model/config.json: model_type is 'llama'" in message

    def test_a_policy_of_another_vocabulary(self, place: Workplace) -> None:
        path = place.path / "model" / "config.json"
        change(path, text_config=json.loads(path.read_text())["text_config"] | {"vocab_size": 7})
        assert "field model_path is 'model', which cannot be used: model: the model has 7 ids" in refusal()

    def test_a_policy_without_a_tokenizer(self, place: Workplace) -> None:
        (place.path / "model" / "tokenizer.json").unlink()
        assert "model/tokenizer.json: does not exist" in refusal()

    def test_models_of_other_codebooks(self, place: Workplace) -> None:
        shutil.copytree(ROOT / "earl" / "shapes" / "vision_tokenizer", place.path / "vision")
        change(place.path / "vision" / "config.json", codebook_size=512)
        (place.path / "vision" / "manifest.json").unlink()
        message = refusal(vision_tokenizer_path="vision")
        assert "field model_path is a model of 256 visual tokens, but vision_tokenizer_path one of 512" in message

    def test_policy_and_vision_tokenizer_confused(self, place: Workplace) -> None:
        message = refusal(model_path="package:shapes/vision_tokenizer", vision_tokenizer_path="model")
        assert "field model_path is 'package:shapes/vision_tokenizer', which cannot be used" in message
        assert "is a vision tokenizer" in message
        assert "field vision_tokenizer_path is 'model', which cannot be used" in message

    def test_a_run_that_has_started_does_not_ask_for_its_model(self, place: Workplace) -> None:
        preflight.check(config(model_path="no/model"), started=True)


class TestLengths:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"max_response_tokens": 64}, "max_response_tokens is 64, but an image of image_area = 4096"),
            ({"max_completion_len": 64}, "max_completion_len is 64, but an image"),
            ({"max_prompt_len": 60}, "max_prompt_len is 60, but an image"),
            (
                {"model_context_size": 128, "max_response_tokens": 80},
                "model_context_size is 128, but an image of image_area = 4096 pixels is about 64 visual tokens, and",
            ),
        ],
    )
    def test_too_short_for_an_image(self, place: Workplace, fields: dict, message: str) -> None:
        assert message in refusal(**SHAPES | fields)
        # Of data that are not resized here, nobody knows the size before they are read.
        preflight.check(config(**fields))

    def test_room_for_an_image_is_enough(self, place: Workplace) -> None:
        preflight.check(config(**SHAPES, max_response_tokens=79, model_context_size=200))
        # Without the grid an image may have any size.
        free = {"max_response_tokens": 64, "emu3_use_logit_processor": False}
        preflight.check(config(**SHAPES, **free, model_context_size=65))
        with pytest.raises(EarlError, match=r"model_context_size is 64, but an image .*, alone"):
            preflight.check(config(**SHAPES | free | {"max_response_tokens": 60}, model_context_size=64))

    def test_the_context_need_not_hold_the_longest_completion(self, place: Workplace) -> None:
        """A completion ends where the context does: 32 x 32 tokens twice leave room for text."""
        large = SHAPES | {"image_area": 256 * 256, "max_response_tokens": 2048}
        judge = {"judge": "openai", "reward_function_api_base": "http://judge:1"}
        preflight.check(config(**large, **judge, model_context_size=3000))


class TestWhatElse:
    @pytest.mark.parametrize("field", ["engine", "judge"])
    def test_vllm_where_it_is_not_installed(self, place, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        message = refusal(**{field: "vllm"})
        assert f"field {field} is `vllm`, which is not installed here; in EARL" in message
        preflight.check(config(**{field: "vllm"}), here=False)

    def test_flash_attn_where_it_is_not_installed(self, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = {"attention": "flash", "dtype": "bfloat16", "device": "cuda"}
        monkeypatch.setattr("earl.execution.runtime.refusal", lambda device: None)  # as on a machine with a GPU
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "field attention is `flash`, but flash-attn is not installed here; in EARL" in refusal(**asked)
        preflight.check(config(**asked | {"attention": "auto"}))
        preflight.check(config(**asked), here=False)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("def flash_attn_func(): ...", None),
            ("", "ImportError: cannot import name 'flash_attn_func' from 'flash_attn'"),
            ("raise RuntimeError('built for CUDA 12')", "RuntimeError: built for CUDA 12"),
        ],
        ids=["2", "4", "another CUDA"],
    )
    def test_flash_attn_that_cannot_be_imported(self, place, monkeypatch, text: str, reason: str | None) -> None:
        monkeypatch.setattr("earl.execution.runtime.refusal", lambda device: None)
        (place.path / "packages" / "flash_attn").mkdir(parents=True)
        (place.path / "packages" / "flash_attn" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(place.path / "packages")
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        asked = {"attention": "flash", "dtype": "bfloat16", "device": "cuda"}
        if reason is None:
            preflight.check(config(**asked))
        else:
            assert f"flash-attn cannot be imported here ({reason}" in refusal(**asked)
        sys.modules.pop("flash_attn", None)

    def test_a_rubric_that_is_missing(self, place: Workplace) -> None:
        rubrics = {"judge_rubric_perceptual_quality": "no.jsonnet", "judge_rubric_ground_score": "unused.jsonnet"}
        fields = {"judge": "openai", "reward_function_api_base": "http://judge:4877"}
        message = refusal(**fields, **rubrics)
        assert "field judge_rubric_perceptual_quality is 'no.jsonnet', which is no rubric" in message
        assert "ground_score" not in message

    def test_a_judges_model_and_pairs_that_are_missing(self, place: Workplace) -> None:
        fields = {"judge": "vllm", "reward_function_api_model_name": "/no/judge", "judge_gate": {"pairs": "no.parquet"}}
        message = refusal(**fields)
        assert "field reward_function_api_model_name is '/no/judge', but there is no folder /no/judge" in message
        assert f"field judge_gate.pairs is 'no.parquet', but there is no file {place.path}/no.parquet" in message
        preflight.check(config(judge="vllm"), here=False)

    def test_everything_at_once_with_where_it_was_written(self, place: Workplace) -> None:
        (place.path / "data.libsonnet").write_text("{train_paths_file: ['no/train']}")
        rest = {name: value for name, value in EXPERIMENT.items() if name != "train_paths_file"}
        (place.path / "x.jsonnet").write_text(f"{json.dumps(rest)} + (import 'data.libsonnet')")
        loaded = load.load("x.jsonnet", {"model_path": "/no/model"}, load.WORKFLOW)
        with pytest.raises(EarlError) as caught:
            preflight.check(loaded.config, loaded.origin)
        assert f"field train_paths_file (in data.libsonnet) names what is not there: {place.path}/no/train;" in str(
            caught.value
        )
        assert "field model_path (in set=) is '/no/model'" in str(caught.value)


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
