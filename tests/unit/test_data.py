"""Tokenised data, read row by row; whatever is wrong is named, and no pickle runs code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.data.grids import stored
from earl.data.reference import ReferenceDataset
from earl.data.tokenised import open_dataset
from earl.files import manifest, tables
from earl.messages.errors import EarlError
from tests.support.tokenised_files import PICTURE, cell, tokenised_columns, write_tokenised


class TestTokenisedDataset:
    def test_rows_of_several_files_in_any_order(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        for index in range(3):
            columns = tokenised_columns(10)
            columns["example_id"] = [f"{index}-{i}" for i in range(10)]
            write_tokenised(folder / f"{index:04d}.parquet", columns, dataset="shapes", codebook_size="256")
        manifest.seal(folder)
        dataset = open_dataset(folder)
        assert (len(dataset), dataset.name) == (30, "shapes")
        for row in (29, 0, 13, 14, 3, 4, 20):
            example = dataset[row]
            assert example.example_id == f"{row // 10}-{row % 10}"
            assert example.original_tokens.tolist() == [[row % 10, 1, 2], [3, 4, 5]]
            assert example.original_tokens.dtype == np.int64
            assert example.reasoning == [("scene", "a circle")]
            assert (example.original, example.target) == (PICTURE["bytes"], None)
        with pytest.raises(IndexError):
            dataset[30]

    def test_images_are_read_only_when_wanted(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(4))
        assert open_dataset(path, images=False)[0].original is None

    def test_a_column_may_hold_nothing_in_some_groups(self, tmp_path: Path) -> None:
        """Of three groups of four rows: the first has all, the second nothing that may be null, the third some."""
        columns = tokenised_columns(12)
        columns["task"] = [*["add"] * 4, *[None] * 4, None, "swap", None, None]
        columns["target"] = [*[PICTURE] * 4, *[None] * 4, None, PICTURE, None, None]
        columns["reasoning"] = [*[[]] * 4, *[None] * 4, None, [{"key": "k", "value": "v"}], [], None]
        columns["target_tokens"][4:8] = [None] * 4
        columns["target_tokens"][10] = None
        path = write_tokenised(tmp_path / "a.parquet", columns)
        with pq.ParquetFile(path) as source:
            filled = tables.filled_columns(source, tables.TOKENISED, tables.TOKENISED.names)
        nothing = [set(tables.TOKENISED.names) - set(names) for names in filled]
        assert nothing == [set(), {"task", "target", "target_tokens"}, set()], "lists are not asked"
        dataset = open_dataset(path)
        for row in (9, 4, 0, 11, 5, 8, 10):
            example = dataset[row]
            assert example.task == columns["task"][row]
            assert example.target == (columns["target"][row] and PICTURE["bytes"])
            assert example.original == PICTURE["bytes"]
            pairs = columns["reasoning"][row]
            assert example.reasoning == (None if pairs is None else [(one["key"], one["value"]) for one in pairs])
            tokens = example.target_tokens
            assert (None if tokens is None else stored(tokens, 256)) == columns["target_tokens"][row]

    def test_a_required_column_of_nulls_is_named(self, tmp_path: Path) -> None:
        columns = tokenised_columns(8)
        columns["instruction"][6] = None
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns))
        assert dataset[3].instruction == "edit 3"
        with pytest.raises(EarlError, match=r"a\.parquet: column 'instruction' is null in row 6"):
            dataset[4]

    def test_images_without_names(self, tmp_path: Path) -> None:
        columns = tokenised_columns(4) | {"original": [PICTURE | {"path": None}] * 4}
        assert open_dataset(write_tokenised(tmp_path / "a.parquet", columns))[0].original == PICTURE["bytes"]

    def test_reasoning_that_is_null_inside(self, tmp_path: Path) -> None:
        columns = tokenised_columns(8)
        columns["reasoning"][6] = [{"key": "scene", "value": "a circle"}, {"key": "plan", "value": None}]
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns))
        with pytest.raises(EarlError, match=r"a\.parquet: row 6, column 'reasoning': has a key or a text that is null"):
            dataset[4]

    def test_lists_of_tokens_as_once_stored(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(1))
        table = pq.read_table(path)
        lists = pa.array([[[0, 1, 2], [3, 4, 5]]], pa.list_(pa.list_(pa.uint16())))
        place = table.schema.get_field_index("target_tokens")
        pq.write_table(table.set_column(place, "target_tokens", lists), path)
        with pytest.raises(EarlError, match=r"a\.parquet: column 'target_tokens' has type list.*tokenise the data"):
            open_dataset(path)

    def test_an_example_is_the_readers_own(self, tmp_path: Path) -> None:
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", tokenised_columns(4)))
        dataset[1].original_tokens[:] = 7
        assert dataset[1].original_tokens.tolist() == [[1, 1, 2], [3, 4, 5]]

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        columns = tokenised_columns(64)
        # 64 pictures of 4 MB each, 4 in a group: four groups fit in what is held.
        columns["original"] = [{"bytes": os.urandom(4 * 2**20), "path": ""} for _ in range(64)]
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns))
        before = pa.total_allocated_bytes()
        for row in range(0, 64, 4):
            assert dataset[row].original == columns["original"][row]["bytes"]
        assert pa.total_allocated_bytes() - before < 128 * 2**20

    def test_token_beyond_the_codebook(self, tmp_path: Path) -> None:
        columns = tokenised_columns(6)
        columns["target_tokens"][5] = cell([[200, 1, 2], [3, 4, 5]])
        path = write_tokenised(tmp_path / "a.parquet", columns, codebook_size="200")
        dataset = open_dataset(path)
        assert dataset[4].example_id == "e4"
        with pytest.raises(EarlError, match=r"a\.parquet: row 5, column 'target_tokens': token id 200 .* 0\.\.199"):
            dataset[5]

    def test_codebook_of_another_policy(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(1), codebook_size="256")
        with pytest.raises(EarlError, match="codebook of 256, but 32768"):
            open_dataset(path, codebook_size=32768)

    def test_grids_of_any_shape_and_width_stand_side_by_side(self, tmp_path: Path) -> None:
        grids = [[[1, 2, 3]], [[4], [5]], [[6, 7], [8, 9]], [[250]]]
        columns = tokenised_columns(4) | {"original_tokens": [cell(grid) for grid in grids]}
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns, codebook_size="256"))
        assert [dataset[row].original_tokens.tolist() for row in (3, 0, 1, 2)] == [grids[row] for row in (3, 0, 1, 2)]

    @pytest.mark.parametrize(
        "change",
        [
            {"height": 3},
            {"height": None},
            {"width": 0},
            {"height": 0, "ids": b""},
            {"ids": b"\0" * 18},
            {"ids": b"12345"},
            {"ids": None},
        ],
    )
    def test_bytes_that_are_no_grid(self, change: dict, tmp_path: Path) -> None:
        """Whatever is wrong with one cell, it is named, and the cells beside it are read."""
        columns = tokenised_columns(4)
        columns["original_tokens"][1] = cell([[1, 2, 3], [3, 4, 5]]) | change
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns))
        assert dataset[0].original_tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(EarlError, match=r"a\.parquet: row 1, column 'original_tokens': \d+ bytes are no grid of"):
            dataset[1]

    def test_a_wrong_shape_is_not_taken_for_narrower_ids(self, tmp_path: Path) -> None:
        columns = tokenised_columns(1)
        columns["original_tokens"] = [cell([[1, 2], [3, 4]], 32768) | {"height": 4}]
        dataset = open_dataset(write_tokenised(tmp_path / "a.parquet", columns, codebook_size="32768"))
        with pytest.raises(EarlError, match="8 bytes are no grid of 4 x 2 ids"):
            dataset[0]

    def test_cells_of_another_writer(self, tmp_path: Path) -> None:
        """Wider numbers, other bytes and another order of the fields are the same cells."""
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(3))
        table = pq.read_table(path)
        kind = pa.struct([("ids", pa.large_binary()), ("width", pa.int64()), ("height", pa.int32())])
        cells = pa.array(table.column("target_tokens").to_pylist(), kind)
        pq.write_table(table.set_column(table.schema.get_field_index("target_tokens"), "target_tokens", cells), path)
        assert open_dataset(path)[2].target_tokens.tolist() == [[2, 1, 2], [3, 4, 5]]

    def test_stored_ids_are_read_without_this_package(self, tmp_path: Path) -> None:
        columns = tokenised_columns(1) | {"original_tokens": [cell([[1, 258], [3, 32767]], 32768)]}
        found = pd.read_parquet(write_tokenised(tmp_path / "a.parquet", columns)).original_tokens[0]
        ids = np.frombuffer(found["ids"], "<u2").reshape(found["height"], found["width"])
        assert ids.tolist() == [[1, 258], [3, 32767]]

    def test_wrong_and_missing_columns(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(2))
        table = pq.read_table(path)
        number = table.set_column(table.schema.get_field_index("instruction"), "instruction", pa.array([1, 2]))
        pq.write_table(number, path)
        with pytest.raises(EarlError, match=r"a\.parquet: column 'instruction' has type int64"):
            open_dataset(path)
        pq.write_table(table.drop_columns(["target_tokens"]), path)
        with pytest.raises(EarlError, match=r"a\.parquet: column 'target_tokens' is missing"):
            open_dataset(path)

    @pytest.mark.parametrize("kept", [0, 3, 500, -5])
    def test_truncated(self, kept: int, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(50))
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(EarlError, match=r"a\.parquet: is not a complete Parquet file"):
            open_dataset(path)

    def test_damaged_inside(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(4))
        column = pq.read_metadata(path).row_group(0).column(3)
        content = bytearray(path.read_bytes())
        place = (column.data_page_offset or 0) + column.total_compressed_size // 2
        content[place] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(EarlError, match=r"a\.parquet: column 'instruction' is damaged"):
            open_dataset(path)[0]

    def test_empty(self, tmp_path: Path) -> None:
        path = write_tokenised(tmp_path / "a.parquet", tokenised_columns(0))
        with pytest.raises(EarlError, match=r"a\.parquet: the data set is empty"):
            open_dataset(path)

    def test_folder_without_its_manifest_is_incomplete(self, tmp_path: Path) -> None:
        write_tokenised(tmp_path / "0000.parquet", tokenised_columns(1))
        with pytest.raises(EarlError, match=r"manifest\.json"):
            open_dataset(tmp_path)

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(EarlError, match="no-such"):
            open_dataset(tmp_path / "no-such")


class Malicious:
    """Pickles to a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


class TestReference:
    EXAMPLE: ClassVar = {
        "edit_id": 17,
        "original_image": np.arange(6, dtype=np.int64).reshape(2, 3),
        "edited_image": np.arange(6, dtype=np.int32).reshape(2, 3),
        "instruction": "remove the cat",
        "CoT": {"scene": "a cat [1, 2, 3, 4]"},
    }

    @staticmethod
    def write(folder: Path, example: object, *, linked: bool = False, **options: Any) -> Path:
        import torch

        listing = folder / "list" / "tokenized_datalist.json"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps({"prefix": "/elsewhere/feature", "path_list": ["17.pth"]}))
        (folder / "feature").mkdir(exist_ok=True)
        torch.save(example, folder / "feature" / "17.pth", **options)
        if linked:
            (folder / "feature" / "list").symlink_to("../list")
            return folder / "feature" / "list" / listing.name
        return listing

    @pytest.mark.parametrize("linked", [False, True])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_reads_an_example(self, linked: bool, zipped: bool, tmp_path: Path) -> None:
        folder = tmp_path / "omniedit" / "train"
        path = self.write(folder, self.EXAMPLE, linked=linked, _use_new_zipfile_serialization=zipped)
        dataset = open_dataset(path, codebook_size=6)
        assert (len(dataset), dataset.name) == (1, "omniedit/train")
        example = dataset[0]
        assert (example.example_id, example.instruction) == ("17", "remove the cat")
        assert example.original_tokens.tolist() == example.target_tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert example.reasoning == [("scene", "a cat [1, 2, 3, 4]")]
        assert example.original is None

    @pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
    def test_reads_a_bare_pickle(self, protocol: int, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.EXAMPLE)
        (tmp_path / "feature" / "17.pth").write_bytes(pickle.dumps(self.EXAMPLE, protocol=protocol))
        assert open_dataset(path)[0].target_tokens.tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_reads_tensors_too(self, tmp_path: Path) -> None:
        import torch

        example = self.EXAMPLE | {"edited_image": torch.tensor([[5, 4]])}
        assert open_dataset(self.write(tmp_path, example))[0].target_tokens.tolist() == [[5, 4]]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"edited_image": "bfloat16"}, r"17\.pth: field 'edited_image': is no array of integers"),
            ({"edited_image": "gradient"}, r"17\.pth: field 'edited_image': is no array of integers"),
            ({"instruction": "\ud800"}, r"17\.pth: field 'instruction' is no text"),
            ({"CoT": {"scene": "\ud800"}}, r"17\.pth: field 'CoT\.scene' is no text"),
            ({"CoT": {"\ud800": "cat"}}, r"17\.pth: field 'CoT' is no text"),
        ],
    )
    def test_values_of_a_kind_that_no_example_has(self, change: dict, message: str, tmp_path: Path) -> None:
        import torch

        tensors = {
            "bfloat16": torch.zeros(2, 3, dtype=torch.bfloat16),
            "gradient": torch.zeros(2, 3, requires_grad=True),
        }
        example = self.EXAMPLE | {name: tensors.get(str(value), value) for name, value in change.items()}
        with pytest.raises(EarlError, match=message):
            open_dataset(self.write(tmp_path, example))[0]

    @pytest.mark.parametrize("where", ["whole", "field", "plain", "old"])
    def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(self, where: str, tmp_path: Path) -> None:
        target = tmp_path / "was-here"
        path = self.write(tmp_path, self.EXAMPLE)
        file = tmp_path / "feature" / "17.pth"
        harm = Malicious(target)
        if where == "plain":
            file.write_bytes(pickle.dumps(self.EXAMPLE | {"CoT": harm}))
        else:
            example = harm if where == "whole" else self.EXAMPLE | {"CoT": harm}
            self.write(tmp_path, example, _use_new_zipfile_serialization=where != "old")
        with pytest.raises(EarlError, match=r"feature/17\.pth: asks for posix\.system, .*nothing was run"):
            open_dataset(path)[0]
        assert not target.exists()
        # The file would have done it.
        if where == "plain":
            pickle.loads(file.read_bytes())
            assert target.exists()

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"original_image": np.array([[0, 6]])}, "'original_image': token id 6"),
            ({"edited_image": np.array([[-1]])}, "'edited_image': token id -1"),
            ({"original_image": np.array([0, 1])}, "'original_image'.*grid"),
            ({"original_image": [["a"]]}, "'original_image'.*grid"),
            ({"original_image": [[1], [1, 2]]}, "'original_image'.*differ in length"),
            ({"instruction": 3}, "'instruction' is a int"),
            ({"CoT": ["a"]}, "'CoT' is a list"),
            ({"CoT": {"scene": ["a"]}}, r"'CoT\.scene' is a list"),
        ],
    )
    def test_wrong_fields_are_named(self, change: dict, part: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.EXAMPLE | change)
        with pytest.raises(EarlError, match=rf"17\.pth: field {part}"):
            open_dataset(path, codebook_size=6)[0]

    def test_missing_field_file_and_damage(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, {k: v for k, v in self.EXAMPLE.items() if k != "instruction"})
        file = tmp_path / "feature" / "17.pth"
        with pytest.raises(EarlError, match=r"17\.pth: field 'instruction' is missing"):
            open_dataset(path)[0]
        self.write(tmp_path, self.EXAMPLE)
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(EarlError, match=r"17\.pth: is damaged"):
            open_dataset(path)[0]
        self.write(tmp_path, [1, 2])
        with pytest.raises(EarlError, match=r"17\.pth: holds a list"):
            open_dataset(path)[0]
        dataset = open_dataset(path)
        file.unlink()
        with pytest.raises(EarlError, match=r"17\.pth: does not exist"):
            dataset[0]

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("{", "damaged"),
            ("[]", "path_list"),
            ('{"path_list": [1]}', "path_list"),
            (r'{"path_list": ["\ud83d.pth"]}', "path_list"),
            (r'{"path_list": ["a"], "prefix": "\ud83d"}', "prefix"),
        ],
    )
    def test_wrong_listing(self, text: str, part: str, tmp_path: Path) -> None:
        path = tmp_path / "tokenized_datalist.json"
        path.write_text(text)
        with pytest.raises(EarlError, match=rf"tokenized_datalist\.json: .*{part}"):
            ReferenceDataset(path)
        path.write_text('{"prefix": "", "path_list": []}')
        with pytest.raises(EarlError, match="empty"):
            ReferenceDataset(path)
