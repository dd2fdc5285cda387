"""The program judge knows the shapes world only: a plan whose prompts are anything else is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from earl.config import load
from earl.config.schema import Config
from earl.data.grids import stored
from earl.files import images, tables
from earl.messages.errors import EarlError
from earl.run import preflight
from earl.shapes import dataset, world

NOISE = np.random.default_rng(0)
PHOTO = NOISE.integers(0, 256, (48, 80, 3), dtype=np.uint8)
SMALL_PHOTO = NOISE.integers(0, 256, (64, 64, 3), dtype=np.uint8)
SCENE = world.render(world.edit(1, 0).original)
MADE = {"mine": {"source": "shapes", "count": 4, "seed": 1}}
NAMED = {"raw_datasets.mine": {"source": "parquet", "path": "mine.parquet"}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(**fields: Any) -> Config:
    base = {
        "run_name": "a", "base_exp_dir": "runs", "raw_datasets": MADE, "train_paths_file": ["stage:tokenise/mine"],
        "val_paths_file": [], "model_path": "package:shapes/base_policy", "image_area": 64 * 64, "judge": "program",
        "vision_tokenizer_path": "package:shapes/vision_tokenizer", "tokenizer_path": "package:shapes/base_policy",
        "engine": "torch", "episodes_per_iteration": 2, "generations_per_sample": 2, "engine_batch_size": 2,
    }  # fmt: skip
    return load.changed(Config.model_validate(base), fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(EarlError) as caught:
        preflight.check(config(**fields))
    return str(caught.value)


def write_raw(picture: np.ndarray, edited: np.ndarray | None = None) -> None:
    pair = {"original": picture, "edited": picture if edited is None else edited}
    columns: dict[str, list] = {name: ["one"] for name in tables.RAW.names}
    columns |= {name: [images.struct(images.encode(pixels))] for name, pixels in pair.items()}
    tables.write_table(Path("mine.parquet"), tables.RAW, columns | {"reasoning": [None]}, {})


def write_tokenised(side: int, target: bool = True, picture: np.ndarray | None = None) -> str:
    columns: dict[str, list] = {name: [None] for name in tables.TOKENISED.names}
    columns |= {"dataset": ["any"], "example_id": ["0"], "instruction": ["edit"]}
    columns["original_tokens"] = [stored(np.zeros((side, side), int), 256)]
    if target:
        columns["target_tokens"] = columns["original_tokens"]
    if picture is not None:
        columns["original"] = [images.struct(images.encode(picture))]
    tables.write_table(Path("tokenised.parquet"), tables.TOKENISED, columns, {})
    return "tokenised.parquet"


class TestAccepted:
    def test_shapes_that_the_pipeline_makes(self) -> None:
        preflight.check(config())

    def test_shapes_in_a_file_of_any_name(self) -> None:
        dataset.write_raw("mine.parquet", 4, seed=1)
        preflight.check(config(**NAMED))

    @pytest.mark.parametrize("picture", [None, SCENE])
    def test_tokenised_shapes_with_and_without_images(self, picture: np.ndarray | None) -> None:
        preflight.check(config(train_paths_file=[write_tokenised(8, picture=picture)]))

    def test_what_is_on_the_hub_is_not_known(self) -> None:
        preflight.check(config(**{"raw_datasets.mine": {"source": "parquet", "path": "hf://datasets/a/b/c.parquet"}}))

    def test_other_data_with_a_judge_model_and_for_a_fine_tuning(self) -> None:
        write_raw(PHOTO)
        asked = {"judge": "openai", "reward_function_api_base": "http://judge:1"}
        preflight.check(config(**NAMED, **asked))
        tuning = {"base_model": "package:shapes/base_policy", "train_paths_file": [write_tokenised(3)], "steps": 1}
        preflight.check(config(sft={"s": tuning}, model_path="stage:sft/s"))


@pytest.mark.parametrize("picture", [PHOTO, SMALL_PHOTO])
def test_raw_pairs_of_something_else(picture: np.ndarray) -> None:
    write_raw(picture)
    message = refusal(**NAMED)
    assert "field train_paths_file names 'stage:tokenise/mine', which holds an image " in message
    assert "the judge `program` knows the shapes world only: set judge to `openai` or `vllm`" in message


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"side": 32}, "holds an image of 256x256 pixels, not 64x64"),
        ({"side": 8, "picture": SMALL_PHOTO}, "shows nothing of the shapes world"),
        ({"side": 8, "target": False}, "has no target images"),
    ],
)
def test_tokenised_pairs_of_something_else(made: dict[str, Any], told: str) -> None:
    message = refusal(train_paths_file=[write_tokenised(**made)])
    assert "field train_paths_file names 'tokenised.parquet', which " in message
    assert told in message


def test_raw_prompts_without_targets() -> None:
    dataset.write_raw("mine.parquet", 4, seed=1)
    assert "has no target images" in refusal(**NAMED | {"raw_datasets.mine.columns": {"edited": None}})


def test_another_size_is_refused_whatever_the_data() -> None:
    assert "is resized to image_area = 65536 pixels, while" in refusal(image_area=65536, model_context_size=4096)


def test_published_data() -> None:
    assert "names 'stage:fetch/omniedit', which is a published" in refusal(train_paths_file=["stage:fetch/omniedit"])


def test_evaluations_too() -> None:
    data = [write_tokenised(32)]
    both = {"own": {"prompts": 1, "paths_file": data}, "usual": {"prompts": 1}}
    message = refusal(val_paths_file=data, evaluations=both)
    assert "field evaluations.own.paths_file names 'tokenised.parquet'" in message
    assert "field val_paths_file names 'tokenised.parquet'" in message
