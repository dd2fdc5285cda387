"""Every table that is written opens elsewhere, a file or its folder, with its pictures.

`datasets` is tried in the version that is installed; for those before 4 the form of the metadata is stated by hand,
since they know no feature `List`.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from earl.data.shards import Reject, ShardWriter
from earl.data.tokenised import open_dataset
from earl.files import evaluations, tables
from earl.judges import known_order
from earl.shapes import dataset as shapes
from tests.support import evaluation_files, judge_files, run_files
from tests.support.tokenised_files import tokenised_columns

ROWS = 10


def write_tokenised_folder(folder: Path) -> Path:
    """A tokenised data set as the stages write it: two shards, each with a row that was rejected."""
    folder.mkdir()
    writer = ShardWriter(folder, {"dataset": "d", "codebook_size": "256"}, 2 * ROWS + 2, 0.5, with_images=True)
    for number in range(2):
        writer.write(number, tokenised_columns(ROWS), [Reject("raw.parquet", 3, None, "original", "no image")])
    writer.finish()
    return folder


def model_scores() -> dict[str, list]:
    passes = [{"raw": "x", "finish_reason": "stop", "scores": [{"name": "overedit", "value": 3.0}]}]
    row = {"episode_id": "a", "group_id": "g", "status": "ok", "judge": "vllm", "judge_model": "m"}
    row |= {"requests": [{"question": "q", "rubric": "r", "attempt": 0, "passes": passes}]}
    return {name: [row.get(name)] for name in tables.MODEL_SCORES.names}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of tables, by what is in them; each holds tables of one schema and nothing else."""
    here = tmp_path_factory.mktemp("tables")
    run, _ = run_files.new_run(here / "run")
    config = evaluation_files.demo_config()
    run_files.train(run, 1)
    tokenised = write_tokenised_folder(here / "tokenised")
    judge_files.write_rollouts(here / "rollouts" / "0000.parquet", 2)
    known_order.write(here / "ranked" / "0000.parquet", known_order.of_shapes(2, seed=1))
    shapes.write_raw(here / "raw" / "0000.parquet", 4, seed=1)
    tables.write_table(here / "model_scores" / "0000.parquet", tables.MODEL_SCORES, model_scores(), {})
    written = evaluation_files.write_evaluation(run.path, "heldout", 0, [evaluation_files.episode(1, 3.0)], config)
    (here / "evaluation").mkdir()
    written.rename(here / "evaluation" / "0000.parquet")
    (here / "episodes").mkdir()
    run.iteration(1).episodes.rename(here / "episodes" / "0000.parquet")
    return {
        "tokenised": tokenised / "data",
        "rejected": tokenised / "_rejected",
        "scores": run.iteration(1).scores(0).parent,
        **{name: here / name for name in ("rollouts", "ranked", "raw", "model_scores", "evaluation", "episodes")},
    }


SCHEMAS = {
    "tokenised": tables.TOKENISED,
    "rejected": tables.REJECTED,
    "rollouts": tables.ROLLOUTS,
    "scores": tables.SCORES,
    "model_scores": tables.MODEL_SCORES,
    "ranked": tables.RANKED,
    "raw": tables.RAW,
    "evaluation": evaluations.EVALUATION,
    "episodes": tables.EPISODES,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_folder_opens_in_pandas_and_pyarrow(folders, name) -> None:
    import pandas as pd

    rows = sum(pq.read_metadata(file).num_rows for file in folders[name].iterdir())
    assert rows > 0
    assert list(pd.read_parquet(folders[name]).columns) == SCHEMAS[name].names
    assert pa.dataset.dataset(folders[name]).to_table().num_rows == rows


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_folder_holds_tables_of_one_schema_alone(folders, name) -> None:
    """So polars takes it, too: it refuses a folder with any other file in it, hidden ones included."""
    files = sorted(folders[name].rglob("*"))
    assert {file.suffix for file in files} == {".parquet"}
    assert len({pq.read_schema(file).remove_metadata() for file in files}) == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_folder_opens_in_datasets_with_its_pictures(folders, name, tmp_path) -> None:
    import datasets
    from PIL import Image

    rows = sum(pq.read_metadata(file).num_rows for file in folders[name].iterdir())
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(folders[name]), split="train", cache_dir=cache)
    assert (found.num_rows, found.column_names) == (rows, SCHEMAS[name].names)
    named = datasets.load_dataset("parquet", data_dir=str(folders[name]), split="train", cache_dir=cache)
    assert named.num_rows == rows
    for field in SCHEMAS[name]:
        if field.type == tables.IMAGE:
            assert isinstance(found.features[field.name], datasets.Image)
    if "original" in SCHEMAS[name].names:
        assert isinstance(found[0]["original"], Image.Image)


def test_the_whole_tokenised_folder_opens_in_datasets(folders, tmp_path) -> None:
    """As it would on the hub: its README.md says that rows are in data/ alone."""
    import datasets

    whole = str(folders["tokenised"].parent)
    found = datasets.load_dataset(whole, cache_dir=str(tmp_path / "cache"))
    assert {split: part.num_rows for split, part in found.items()} == {"train": 2 * ROWS}
    assert found["train"][1]["reasoning"] == [{"key": "scene", "value": "a circle"}]
    streamed = list(datasets.load_dataset(whole, split="train", streaming=True))
    assert len(streamed) == 2 * ROWS


def test_both_folders_are_read_here(folders) -> None:
    for path in (folders["tokenised"], folders["tokenised"].parent):
        dataset = open_dataset(path)
        assert len(dataset) == 2 * ROWS
        assert np.array_equal(dataset[ROWS + 3].original_tokens, [[3, 1, 2], [3, 4, 5]])


def test_features_by_hand_are_known_to_every_version() -> None:
    """Lists are plain lists. Version 3 of `datasets` stops at the name `List`, version 4 and later at no plain list."""
    text, number = {"dtype": "string", "_type": "Value"}, {"dtype": "float32", "_type": "Value"}
    whole = {"dtype": "int32", "_type": "Value"}
    assert tables.features([tables.TOKENISED.field(name) for name in ("reasoning", "original_tokens", "original")]) == {
        "reasoning": [{"key": text, "value": text}],
        "original_tokens": {
            "height": {"dtype": "uint16", "_type": "Value"},
            "width": {"dtype": "uint16", "_type": "Value"},
            "ids": {"dtype": "binary", "_type": "Value"},
        },
        "original": {"_type": "Image"},
    }
    assert tables.features([tables.ROLLOUTS.field("behavior_logprobs"), tables.ROLLOUTS.field("sample_index")]) == {
        "behavior_logprobs": [number],
        "sample_index": whole,
    }
    (passes,) = tables.features([tables.MODEL_SCORES.field("requests")])["requests"]
    assert passes["passes"][0]["scores"] == [{"name": text, "value": number}]


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_file_names_a_feature_that_only_some_versions_know(folders, name) -> None:
    kinds = set()

    def walk(feature: object) -> None:
        if isinstance(feature, list):
            (inner,) = feature
            walk(inner)
        elif isinstance(feature, dict) and isinstance(feature.get("_type"), str):
            kinds.add(feature["_type"])
        else:
            for inner in feature.values():
                walk(inner)

    for file in folders[name].iterdir():
        walk(json.loads(pq.read_schema(file).metadata[b"huggingface"])["info"]["features"])
    assert kinds <= {"Value", "Image"}
