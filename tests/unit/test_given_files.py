"""Files that people give: what is not what it should be is told in words for them, wherever it is given."""

import json
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.data.raw import RawSource
from earl.data.reference import ReferenceDataset
from earl.data.tokenised import open_dataset
from earl.emu3 import checkpoint, published
from earl.files import listing, manifest, tables
from earl.judges import known_order, rubric
from earl.messages.errors import EarlError
from tests.support.emu3_files import write_vision_vq
from tests.support.tokenised_files import tokenised_columns, write_tokenised

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 123456789\n"
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"instruction": ["a"] * 100}), PARQUET)
PARQUET = PARQUET.getvalue().to_pybytes()
CONTENTS = {
    "pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
    "nothing": (b"", "not a complete Parquet file.*download or copy it again"),
    "csv": (b"instruction,original\nadd a cat,a.png\n", "plain text, such as CSV; write it as Parquet.*read_csv"),
    "json lines": (b'{"instruction": "add"}\n{"instruction": "b"}\n', "is JSON; write it as Parquet.*lines=True"),
    "json": (b'\xef\xbb\xbf[{"instruction": "\xc3\xa4"}]', "is JSON; write it as Parquet"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "is a web page.*download the file again"),
    "gzip": (b"\x1f\x8b\x08\x00abcdef", "gzip; unpack it"),
    "zip": (b"PK\x03\x04abcdef", "zip archive; unpack it"),
    "arrow": (b"ARROW1\x00\x00abc", "Arrow file; write it as Parquet"),
    "companion": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "macOS"),
    "cut": (PARQUET[:-20], "not a complete Parquet file.*download or copy it again"),
    "noise": (bytes(range(200, 256)) * 30, "not a complete Parquet file.*download or copy it again"),
}
PLACES = {
    "raw_datasets": RawSource,
    "train_paths_file": open_dataset,
    "judge check --pairs": known_order.read,
}
FOR_OURS = re.compile(r"run the stage|delete it|delete the file|stage again", re.IGNORECASE)
"""What is said of files that the pipeline makes."""


def error_of(call, *arguments) -> str:
    with pytest.raises(EarlError) as raised:
        call(*arguments)
    return str(raised.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_another_kind_of_file_is_told(place: str, kind: str, tmp_path: Path) -> None:
    content, words = CONTENTS[kind]
    path = tmp_path / "mine.parquet"
    path.write_bytes(content)
    message = error_of(PLACES[place], path)
    assert message.startswith(f"{path}: ")
    assert re.search(words, message)
    assert not FOR_OURS.search(message)


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_file_and_a_folder_are_told(place: str, tmp_path: Path) -> None:
    for path in (tmp_path / "no-such.parquet", tmp_path):
        message = error_of(PLACES[place], path)
        assert str(path) in message
        assert not FOR_OURS.search(message)


@pytest.mark.parametrize("place", PLACES)
def test_other_columns_values_and_damage_are_told(place: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 3}), path)
    message = error_of(PLACES[place], path)
    assert "is missing; the file has prompt" in message
    assert not FOR_OURS.search(message)


def test_values_and_pages_of_a_file_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    known_order.write(path, known_order.of_shapes(2, seed=1))
    table = pq.read_table(path)
    for name, values in (
        ("rank", pa.array([float("nan")] * len(table), pa.float32())),
        ("rank", pa.array(["high"] * len(table))),
        ("instruction", pa.nulls(len(table), pa.string())),
    ):
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), path)
        message = error_of(known_order.read, path)
        assert name in message
        assert not FOR_OURS.search(message)
    pq.write_table(table, path, write_page_checksum=True)
    column = pq.read_metadata(path).row_group(0).column(3)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    message = error_of(known_order.read, path)
    assert "is damaged" in message
    assert "download or copy it again" in message
    assert not FOR_OURS.search(message)


def test_our_own_files_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "0000.parquet"
    assert "run the stage that writes it" in error_of(tables.read_table, path, tables.SCORES)
    path.write_bytes(PARQUET[:-20])
    assert "delete it and run the stage that writes it again" in error_of(tables.read_table, path, tables.SCORES)


class TestFoldersAndPatterns:
    """Which files a path means."""

    @staticmethod
    def make(folder: Path, *names: str) -> list[Path]:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PARQUET)
        return [folder / name for name in names]

    def test_hidden_companions_are_no_data(self, tmp_path: Path) -> None:
        """macOS writes ._x.parquet beside x.parquet, Spark and Hive write _metadata; readers skip both."""
        (real,) = self.make(tmp_path, "x.parquet")
        (tmp_path / "._x.parquet").write_bytes(CONTENTS["companion"][0])
        (tmp_path / "_metadata.parquet").write_bytes(b"")
        assert listing.parquet_files(tmp_path) == [real]
        assert listing.parquet_files(tmp_path / "*.parquet") == [real]

    def test_brackets_in_names_are_brackets_where_there_is_such_a_file(self, tmp_path: Path) -> None:
        files = self.make(tmp_path / "run[1]", "a[1].parquet", "a1.parquet", "b*.parquet")
        folder = tmp_path / "run[1]"
        assert listing.parquet_files(folder / "a[1].parquet") == [files[0]]
        assert listing.parquet_files(folder / "b*.parquet") == [files[2]]
        assert listing.parquet_files(folder / "a*.parquet") == files[:2][::-1]
        assert listing.parquet_files(folder) == sorted(files)
        files[0].unlink()
        assert listing.parquet_files(folder / "a[1].parquet") == [files[1]], "a pattern like any other"

    def test_patterns_reach_over_folders(self, tmp_path: Path) -> None:
        files = self.make(tmp_path, "split=train/a.parquet", "split=train/b.parquet", "split=test/a.parquet")
        assert listing.parquet_files(tmp_path / "split=train") == files[:2]
        assert listing.parquet_files(tmp_path / "split=*" / "a.parquet") == [files[2], files[0]]
        assert listing.parquet_files(tmp_path / "**" / "*.parquet") == sorted(files)

    def test_a_folder_of_folders_is_not_guessed_at(self, tmp_path: Path) -> None:
        self.make(tmp_path, "split=train/a.parquet", "split=test/a.parquet")
        message = error_of(listing.parquet_files, tmp_path)
        assert "split=test" in message
        assert str(tmp_path / "**" / "*.parquet") in message

    def test_a_folder_of_other_files_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text("{}")
        (tmp_path / "a.csv").write_text("a,b")
        message = error_of(listing.parquet_files, tmp_path)
        assert "no Parquet file (*.parquet), but a.csv, train.jsonl" in message
        assert not FOR_OURS.search(message)
        assert "there is no such Parquet file" in error_of(listing.parquet_files, tmp_path / "x-*.parquet")

    def test_raw_pairs_are_not_yet_tokenised(self, tmp_path: Path) -> None:
        self.make(tmp_path, "a.parquet")
        message = error_of(open_dataset, tmp_path)
        assert "manifest.json" in message
        assert "raw_datasets" in message
        assert "stage:tokenise/<name>" in message
        assert not FOR_OURS.search(message)
        assert "stage:tokenise/<name>" in error_of(open_dataset, tmp_path / "a.parquet")

    def test_files_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            path = tmp_path / f"split={split}" / "a.parquet"
            path.parent.mkdir()
            pd.DataFrame({"instruction": ["a"], "original": [b"1"], "edited": [b"2"]}).to_parquet(path)
        source = RawSource(tmp_path / "*" / "a.parquet")
        labels = [source.label(window.file) for window in source.windows(10)]
        assert labels == ["split=test/a.parquet", "split=train/a.parquet"]
        assert RawSource(source.files[0]).label(source.files[0]) == "a.parquet"

    def test_a_tokenised_folder_of_pointers_is_told(self, tmp_path: Path) -> None:
        write_tokenised(tmp_path / "0000.parquet", tokenised_columns(4))
        manifest.seal(tmp_path)
        (tmp_path / "0000.parquet").write_bytes(POINTER)
        assert "git lfs pull" in error_of(open_dataset, tmp_path)


class TestColumnNames:
    """Names that hold the signs which places are written with."""

    @pytest.mark.parametrize("name", ["image.before", "images[0]", "a.b[0].c", "."])
    def test_a_column_is_found_by_its_whole_name(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.parquet"
        picture = {"bytes": b"picture", "path": ""}
        columns = {"instruction": ["add"], name: [picture], "pair": [{"after.all": picture, "list": [picture]}]}
        pd.DataFrame(columns).to_parquet(path)
        source = RawSource(path, {"original": name, "edited": "pair.after.all"})
        ((row,),) = source.read(*source.windows(10), 10)
        assert (row.original, row.edited, row.instruction) == (b"picture", b"picture", "add")
        source = RawSource(path, {"original": f"{name}.bytes", "edited": "pair.list[0].bytes"})
        ((row,),) = source.read(*source.windows(10), 10)
        assert (row.original, row.edited) == (b"picture", b"picture")

    def test_files_in_which_one_name_means_two_things_are_kept_apart(self, tmp_path: Path) -> None:
        pd.DataFrame({"instruction": ["a"], "pair.a": [b"1"], "edited": [b"2"]}).to_parquet(tmp_path / "0.parquet")
        pd.DataFrame({"instruction": ["a"], "pair": [{"a": b"1"}], "edited": [b"2"]}).to_parquet(tmp_path / "1.parquet")
        message = error_of(RawSource, tmp_path, {"original": "pair.a"})
        assert "1.parquet: has other columns than" in message

    def test_a_name_that_two_columns_have_is_told(self, tmp_path: Path) -> None:
        table = pa.table([["a"], ["b"], [b"1"], [b"2"]], names=["instruction", "instruction", "original", "edited"])
        pq.write_table(table, tmp_path / "mine.parquet")
        assert "column 'instruction' stands twice" in error_of(RawSource, tmp_path / "mine.parquet")


class TestOtherPlaces:
    """Archives of the reference, and models."""

    def test_pointers_among_archives(self, tmp_path: Path) -> None:
        path = tmp_path / "list" / "tokenized_datalist.json"
        path.parent.mkdir()
        path.write_bytes(POINTER)
        assert "git lfs pull" in error_of(open_dataset, path)
        path.write_text(json.dumps({"prefix": "", "path_list": ["17.pth"]}))
        (tmp_path / "feature").mkdir()
        (tmp_path / "feature" / "17.pth").write_bytes(POINTER)
        message = error_of(ReferenceDataset(path).__getitem__, 0)
        assert "17.pth: is a Git LFS pointer" in message
        assert "trust" not in message

    def test_a_pointer_for_a_rubric(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.jsonnet"
        path.write_bytes(POINTER)
        assert "git lfs pull" in error_of(rubric.load, path)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_pointers_in_a_model(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_vision_vq(folder)
        (folder / name).write_bytes(POINTER)
        for call in (checkpoint.check_policy, lambda path: checkpoint.load_vision_tokenizer(path, "cpu")):
            assert error_of(call, folder).startswith(f"{folder / name}: is a Git LFS pointer")
        message = error_of(published.convert, folder, tmp_path / "out")
        assert message.startswith(f"{folder / name}: is a Git LFS pointer")
        assert not (tmp_path / "out").exists()
