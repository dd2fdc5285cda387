"""Archives of the reference become tokenised shards: the same examples, every id checked."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from earl.data import convert
from earl.data.tokenised import open_dataset
from earl.files import manifest
from earl.messages.errors import EarlError


def write_archives(folder: Path, count: int, **changes: dict) -> Path:
    """Write archives 0.pth, ... of 2 x 3 tokens; ``changes`` are by name of the file, without its suffix."""
    (folder / "feature").mkdir(parents=True)
    (folder / "list").mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        example = {
            "edit_id": index + 100,
            "original_image": torch.from_numpy(rng.integers(0, 32768, (2, 3))),
            "edited_image": torch.from_numpy(rng.integers(0, 32768, (2, 3))),
            "instruction": f"edit {index}",
            "CoT": {"plan": f"at [1, 2, 3, {index}]", "why": "ü"} if index % 2 else {},
        }
        torch.save(example | changes.get(f"at{index}", {}), folder / "feature" / f"{index}.pth")
    listing = folder / "list" / "tokenized_datalist.json"
    listing.write_text(json.dumps({"prefix": "/elsewhere", "path_list": [f"{i}.pth" for i in range(count)]}))
    return listing


def test_every_example_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "ROWS_PER_FILE", 70)
    listing = write_archives(tmp_path / "omniedit" / "train", 150)
    convert.run(listing, tmp_path / "out", 32768, None, 0.0)
    manifest.check(tmp_path / "out", deep=True)
    before, after = open_dataset(listing), open_dataset(tmp_path / "out", codebook_size=32768)
    assert (len(after), after.name) == (150, "omniedit/train")
    for row in range(150):
        left, right = before[row], after[row]
        for name in ("dataset", "example_id", "task", "instruction", "reasoning", "original", "target"):
            assert getattr(left, name) == getattr(right, name)
        assert np.array_equal(left.original_tokens, right.original_tokens)
        assert np.array_equal(left.target_tokens, right.target_tokens)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in first)
    assert names == ["README.md", *(f"data/000{i}.parquet" for i in range(3)), "manifest.json", "summary.json"]
    convert.run(listing, tmp_path / "out", 32768, None, 0.0)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == first


def test_a_wrong_id_stops_and_is_named(tmp_path: Path) -> None:
    listing = write_archives(tmp_path / "in", 5, at3={"edited_image": torch.tensor([[1, 40000]])})
    with pytest.raises(EarlError) as error:
        convert.run(listing, tmp_path / "out", 32768, "mine", 0.0)
    assert "3.pth" in str(error.value)
    assert "field 'edited_image': token id 40000 must lie in 0..32767" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_some_may_be_left_out(tmp_path: Path) -> None:
    listing = write_archives(tmp_path / "in", 5, at3={"edited_image": torch.tensor([[1, 40000]])})
    (tmp_path / "in" / "feature" / "1.pth").write_bytes(b"PK damaged")
    convert.run(listing, tmp_path / "out", 32768, "mine", 0.4)
    dataset = open_dataset(tmp_path / "out")
    assert [dataset[i].example_id for i in range(len(dataset))] == ["100", "102", "104"]
    rejects = pq.read_table(tmp_path / "out" / "_rejected" / "0000.parquet").to_pylist()
    assert [(row["file"], row["row"]) for row in rejects] == [("1.pth", 1), ("3.pth", 3)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, "5"),
        ("a5", "a5"),
        (torch.tensor(5), "5"),
        (torch.tensor([5]), "5"),
        (np.int64(5), "5"),
        (np.array(5), "5"),
        (np.array([5], np.uint8), "5"),
    ],
)
def test_ids_of_any_library_are_numbers(value: object, expected: str, tmp_path: Path) -> None:
    listing = write_archives(tmp_path / "in", 1, at0={"edit_id": value})
    convert.run(listing, tmp_path / "out", 32768, "mine", 0.0)
    assert open_dataset(tmp_path / "out")[0].example_id == expected


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": ""},
        {"instruction": " \n\t"},
        {"instruction": "\u200b"},
        {"edit_id": True},
        {"edit_id": 5.0},
        {"edit_id": b"a5"},
        {"edit_id": torch.tensor(5.0)},
        {"edit_id": torch.tensor([5, 6])},
        {"edit_id": ["a5"]},
    ],
)
def test_what_says_nothing_is_rejected_as_in_raw_pairs(change: dict, tmp_path: Path) -> None:
    listing = write_archives(tmp_path / "in", 2, at1=change)
    with pytest.raises(EarlError, match=rf"1\.pth: row 1: cannot be used: field '{next(iter(change))}'"):
        convert.run(listing, tmp_path / "none", 32768, "mine", 0.0)
    convert.run(listing, tmp_path / "out", 32768, "mine", 0.5)
    assert [row["row"] for row in pq.read_table(tmp_path / "out" / "_rejected").to_pylist()] == [1]


def test_the_command(earl: Callable, tmp_path: Path) -> None:
    listing = write_archives(tmp_path / "in", 3)
    done = earl("convert", "data", listing, "--out", tmp_path / "out", "--dataset", "mine")
    assert done.returncode == 0, done.stderr
    assert "convert mine: 3 of 3 rows kept" in done.stderr
    assert open_dataset(tmp_path / "out")[0].dataset == "mine"
