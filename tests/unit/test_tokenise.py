"""Raw pairs become tokenised shards: any columns, rows that cannot be used set aside, a killed run goes on."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import freeze, paths
from earl.config.schema import Config
from earl.data import boxes
from earl.data.tokenised import open_dataset
from earl.files import images, manifest, tables
from earl.messages.errors import EarlError
from earl.shapes import dataset as shapes
from earl.stages import tokenise
from tests.support.evaluation_files import demo_config
from tests.support.raw_files import PICTURE, parquet, raw_columns, rejected, write_raw

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSizes:
    @pytest.mark.parametrize(
        ("width", "height", "expected"),
        [(64, 64, (64, 64)), (128, 128, (64, 64)), (128, 32, (128, 32)), (400, 100, (128, 32)), (9, 1000, (8, 672))],
    )
    def test_size(self, width: int, height: int, expected: tuple[int, int]) -> None:
        assert tokenise.scaled_size(width, height, 64 * 64, 8) == expected


class TestBoxes:
    def test_boxes_scale_with_the_image(self) -> None:
        text = "a cat at [10, 20, 30, 41], a dog at [1.5, 2.0,3.25, 4] and [1, 2, 3]"
        scaled = boxes.scale_boxes(text, 2, 0.5)
        assert scaled == "a cat at [20, 10, 60, 21], a dog at [3.00, 1.00, 6.50, 2] and [1, 2, 3]"
        assert boxes.scale_boxes(text, 1, 1) == text

    @pytest.mark.parametrize(
        "text",
        [
            "at [0.10, 0.20, 0.50, 0.60]",
            "all of it, [0, 0, 1, 1]",
            "RGBA [255, 0, 0, 128]",
            "a fill of rgba: [10, 20, 30, 40]",
            "its colour is blue, CMYK = [10, 20, 30, 40]",
            '{"color": [10, 20, 30, 40]}',
            "from the right [30, 20, 10, 40]",
            "from below [10, 40, 30, 20]",
            "of a thousand [100, 20, 900, 40]",
            "too low [10, 20, 30, 101]",
            "left of it [-5, 20, 30, 40]",
        ],
    )
    def test_what_cannot_be_a_box_in_pixels_stays(self, text: str) -> None:
        assert boxes.scale_boxes(text, 2, 2, width=200, height=100) == text

    @pytest.mark.parametrize(
        "text", ["[0, 0, 200, 100]", "colourful [10, 20, 30, 40]", "[10,20,30,40] RGBA", "[10, 20, 10, 20]"]
    )
    def test_what_can_be_does_not(self, text: str) -> None:
        assert boxes.scale_boxes(text, 2, 2, width=200, height=100) != text

    @pytest.mark.parametrize(
        ("unit", "found"),
        [
            ("pixels", ["[0.1, 0.2, 0.5, 0.6]", "[100, 20, 900, 40]"]),
            ("relative", ["[10, 20, 30, 40]", "[100, 20, 900, 40]"]),
            ("none", []),
        ],
    )
    def test_what_is_of_another_unit_is_found(self, unit: str, found: list[str]) -> None:
        text = "[0.1, 0.2, 0.5, 0.6] and [10, 20, 30, 40] and [100, 20, 900, 40] in RGBA [255, 0, 0, 128]"
        assert boxes.misfits(text, unit, 200, 100) == found

    @pytest.mark.parametrize(
        ("unit", "expected", "said"),
        [
            (None, "[8, 8, 32, 16], [0.1, 0.2, 0.5, 0.6], RGBA [255, 0, 0, 128]", "[0.1, 0.2, 0.5, 0.6]"),
            ("pixels", "[8, 8, 32, 16], [0.1, 0.2, 0.5, 0.6], RGBA [255, 0, 0, 128]", "[0.1, 0.2, 0.5, 0.6]"),
            ("relative", "[16, 16, 64, 32], [0.1, 0.2, 0.5, 0.6], RGBA [255, 0, 0, 128]", "[16, 16, 64, 32]"),
            ("none", "[16, 16, 64, 32], [0.1, 0.2, 0.5, 0.6], RGBA [255, 0, 0, 128]", None),
        ],
    )
    def test_the_data_set_says_the_unit(
        self, unit: str | None, expected: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        columns = raw_columns(1)
        columns["original"] = [images.struct(images.encode(np.full((128, 128, 3), 200, np.uint8)))]
        columns["reasoning"] = [json.dumps({"where": "[16, 16, 64, 32], [0.1, 0.2, 0.5, 0.6], RGBA [255, 0, 0, 128]"})]
        raw = write_raw(tmp_path / "raw.parquet", columns)
        # 128 x 128 become 64 x 64.
        tokenise.run(parquet(raw, **({"boxes": unit} if unit else {})), "d", raw, tmp_path / "out")
        assert open_dataset(tmp_path / "out")[0].reasoning == [("where", expected)]
        printed = capsys.readouterr().err
        if said is None:
            assert "four numbers" not in printed
        else:
            assert f"1 lists of four numbers in reasoning, such as {said} in raw.parquet: row 0, are not" in printed
            assert "raw_datasets.d.boxes" in printed

    def test_the_unit_is_part_of_what_the_result_depends_on(self, tmp_path: Path) -> None:
        folders = {
            paths.tokenised_folder(parquet(tmp_path, boxes=unit), "d") for unit in ("pixels", "relative", "none")
        }
        assert len(folders) == 3

    def test_shapes_have_no_unit_to_choose(self) -> None:
        with pytest.raises(EarlError, match=r"raw_datasets\.shapes_rl.*boxes"):
            demo_config(**{"raw_datasets.shapes_rl.boxes": "relative"})


class TestTokenise:
    def test_shapes_become_examples_of_their_own_size(self, tmp_path: Path) -> None:
        raw, out = tmp_path / "raw.parquet", tmp_path / "out"
        shapes.write_raw(raw, count=20, seed=5)
        tokenise.run(demo_config(), "shapes_rl", raw, out)
        manifest.check(out, deep=True)
        dataset = open_dataset(out, codebook_size=256)
        source = pq.read_table(raw).to_pylist()
        assert (len(dataset), dataset.name) == (20, "shapes_rl")
        for row in (0, 19):
            example = dataset[row]
            for name in ("example_id", "task", "instruction"):
                assert getattr(example, name) == source[row][name]
            assert dict(example.reasoning) == json.loads(source[row]["reasoning"])
            assert example.original_tokens.shape == (8, 8)
            pixels = images.decode(source[row]["edited"]["bytes"], "")
            assert (images.decode(example.target, "") == pixels).all()
        cell = pq.read_table(out / "data" / "0000.parquet").column("original_tokens")[0].as_py()
        assert (cell["height"], cell["width"], len(cell["ids"])) == (8, 8, 64), "256 codes take a byte each"
        first = (out / "data" / "0000.parquet").read_bytes()
        tokenise.run(demo_config(), "shapes_rl", raw, out)
        assert (out / "data" / "0000.parquet").read_bytes() == first

    def test_images_and_boxes_scale_together(self, tmp_path: Path) -> None:
        columns = raw_columns(1)
        big = images.struct(images.encode(np.full((64, 256, 3), 200, np.uint8)))
        columns |= {"original": [big], "edited": [PICTURE]}
        raw = tmp_path / "raw.parquet"
        pq.write_table(pa.table(columns, schema=tables.RAW).drop_columns(["task"]), raw)
        tokenise.run(demo_config(), "d", raw, tmp_path / "out")
        example = open_dataset(tmp_path / "out")[0]
        # 256 x 64 of 16,384 pixels becomes 128 x 32 of 4,096.
        assert example.original_tokens.shape == example.target_tokens.shape == (4, 16)
        assert images.decode(example.target, "").shape == (32, 128, 3)
        assert example.reasoning == [("where", "[0, 0, 16, 8]")]
        assert example.task is None


class TestRejects:
    def test_rows_that_cannot_be_used_are_set_aside_with_their_reason(self, tmp_path: Path) -> None:
        columns = raw_columns(9)
        columns["edited"][1] = {"bytes": b"no image", "path": ""}
        columns["original"][2] = {"bytes": None, "path": "x"}
        columns["reasoning"][3] = "{"
        columns["reasoning"][4] = '{"a": 1}'
        columns["instruction"][5] = " \n"
        columns["reasoning"][6] = None
        raw, out = write_raw(tmp_path / "raw.parquet", columns), tmp_path / "out"
        tokenise.run(parquet(raw, max_rejected_fraction=0.6), "d", raw, out)
        dataset = open_dataset(out)
        assert [dataset[i].example_id for i in range(len(dataset))] == ["e0", "e6", "e7", "e8"]
        assert dataset[1].reasoning is None
        found = [(row["file"], row["row"], row["example_id"], row["column"]) for row in rejected(out)]
        assert found == [
            ("raw.parquet", 1, "e1", "edited"),
            ("raw.parquet", 2, "e2", "original"),
            ("raw.parquet", 3, "e3", "reasoning"),
            ("raw.parquet", 4, "e4", "reasoning"),
            ("raw.parquet", 5, "e5", "instruction"),
        ]
        assert json.loads((out / "summary.json").read_text()) == {
            "rows": 9,
            "kept": 4,
            "rejected": {
                "does not decode": 1,
                "no bytes": 1,
                "no instruction": 1,
                "reasoning is no JSON object of text": 1,
                "reasoning is not JSON": 1,
            },
        }
        manifest.check(out, deep=True)
        # Who takes the folder's Parquet files gets the rows that were kept.
        assert duckdb.sql(f"select count(*) from '{out}/data/*.parquet'").fetchall() == [(4,)]

    def test_a_text_that_is_not_utf8_is_one_of_them(self, tmp_path: Path) -> None:
        table = pa.table(raw_columns(3), schema=tables.RAW)
        bad = pa.array([b"add", b"\xff", b"cut"]).view(pa.string())
        raw, out = tmp_path / "raw.parquet", tmp_path / "out"
        pq.write_table(table.set_column(table.schema.get_field_index("instruction"), "instruction", bad), raw)
        tokenise.run(parquet(raw, max_rejected_fraction=0.4), "d", raw, out)
        assert [(row["row"], row["column"], row["reason"].partition(":")[0]) for row in rejected(out)] == [
            (1, "instruction", "text is not UTF-8")
        ]

    def test_what_json_may_hold_and_no_file_may(self, tmp_path: Path) -> None:
        columns = raw_columns(3)
        columns["reasoning"][:2] = ['{"a": "\\ud800"}', '{"a": ' + "[" * 100_000]
        raw, out = write_raw(tmp_path / "raw.parquet", columns), tmp_path / "out"
        tokenise.run(parquet(raw, max_rejected_fraction=0.7), "d", raw, out)
        reasons = [row["reason"].partition(":")[0] for row in rejected(out)]
        assert reasons == ["reasoning is no text", "reasoning is not JSON"]

    def test_rejects_are_the_same_bytes_in_every_process(self, tmp_path: Path) -> None:
        columns = raw_columns(2)
        columns["edited"][1] = {"bytes": b"no image", "path": ""}
        raw = write_raw(tmp_path / "raw.parquet", columns)
        tokenise.run(parquet(raw, max_rejected_fraction=0.5), "d", raw, tmp_path / "a")
        assert [row["reason"] for row in rejected(tmp_path / "a")] == ["does not decode: no known image format"]
        in_the_way = [bytearray(1000) for _ in range(1000)]  # so that objects stand elsewhere in memory
        tokenise.run(parquet(raw, max_rejected_fraction=0.5), "d", raw, tmp_path / "b")
        assert in_the_way
        assert manifest.digest_folder(tmp_path / "a") == manifest.digest_folder(tmp_path / "b")

    def test_too_many_stop_the_run_and_raising_the_limit_goes_on(self, tmp_path: Path) -> None:
        columns = raw_columns(8)
        columns["edited"][6] = columns["edited"][7] = {"bytes": b"", "path": ""}
        raw, out = write_raw(tmp_path / "raw.parquet", columns), tmp_path / "out"
        with pytest.raises(EarlError) as error:
            tokenise.run(parquet(raw, max_rejected_fraction=0.24), "d", raw, out)
        message = str(error.value)
        assert "2 rows rejected (2 empty), more than max_rejected_fraction allows (1 of 8)" in message
        assert "raw.parquet: row 7, column 'edited': empty: 0 bytes" in message
        assert not out.exists()
        assert len(rejected(tmp_path / ".out.unfinished")) == 2
        tokenise.run(parquet(raw, max_rejected_fraction=0.25), "d", raw, out)
        assert len(open_dataset(out)) == 6
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw.parquet"]

    def test_a_data_set_of_rejects_alone_is_an_error(self, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "raw.parquet", raw_columns(2) | {"instruction": ["", ""]})
        with pytest.raises(EarlError, match="no row is left; 2 rows rejected"):
            tokenise.run(parquet(raw, max_rejected_fraction=1), "d", raw, tmp_path / "out")

    def test_a_bad_file_is_named(self, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "raw.parquet", raw_columns(0))
        with pytest.raises(EarlError, match=r"raw\.parquet: the data set is empty"):
            tokenise.run(demo_config(), "d", raw, tmp_path / "out")
        write_raw(raw, raw_columns(9))
        content = raw.read_bytes()
        table = pq.read_table(raw)
        pq.write_table(table.drop_columns(["edited"]), raw)
        with pytest.raises(EarlError, match=r"column 'edited' \(edited\) is missing"):
            tokenise.run(demo_config(), "d", raw, tmp_path / "out")
        raw.write_bytes(content[:-100])
        with pytest.raises(EarlError, match=r"raw\.parquet: is not a complete Parquet file"):
            tokenise.run(demo_config(), "d", raw, tmp_path / "out")
        column = pq.read_metadata(write_raw(raw, raw_columns(9))).row_group(0).column(2)
        damaged = bytearray(raw.read_bytes())
        # The end of the page that says which rows have which instruction.
        damaged[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 0xFF
        raw.write_bytes(damaged)
        with pytest.raises(EarlError, match=r"raw\.parquet: is damaged after row 0"):
            tokenise.run(demo_config(), "d", raw, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_command_keeps_an_older_result_when_it_fails(self, earl: Callable, tmp_path: Path) -> None:
        config = tmp_path / "config.json"
        freeze.write(demo_config(), config)
        raw, out = write_raw(tmp_path / "raw.parquet", raw_columns(2)), tmp_path / "out"
        command = ["tokenise", "--config", config, "--dataset", "d", "--raw", raw, "--out", out]
        done = earl(*command)
        assert done.returncode == 0
        assert "tokenise d: 2 of 2 rows kept" in done.stderr
        before = contents(out)
        write_raw(raw, raw_columns(2) | {"original": [PICTURE, {"bytes": b"GIF89a", "path": ""}]})
        failed = earl(*command)
        assert failed.returncode == 2
        assert "error: 1 row rejected" in failed.stderr
        assert "raw.parquet: row 1, column 'original'" in failed.stderr
        assert contents(out) == before


class TestColumns:
    """The columns of any data set are mapped to ours."""

    COLUMNS = {"instruction": "prompts[1]", "original": "pair.before", "edited": "after", "task": "kind"}  # noqa: RUF012

    @staticmethod
    def write(path: Path, rows: int, first: int = 0) -> None:
        pair = pa.struct([("before", tables.IMAGE), ("note", pa.string())])
        columns = {
            "prompts": pa.array([["", f"edit {first + i}"] for i in range(rows)]),
            "pair": pa.array([{"before": PICTURE, "note": "x"}] * rows, pair),
            "after": pa.array([PICTURE["bytes"]] * rows, pa.large_binary()),
            "kind": pa.array([3] * rows),
            "reasoning": pa.array([{"where": "[0, 0, 8, 8]", "why": None}] * rows),
        }
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=3)

    def test_items_fields_and_files_of_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenise, "ROWS_PER_FILE", 4)
        monkeypatch.setattr(tokenise, "ROWS_AT_ONCE", 3)
        for name, rows, first in (("train-0.parquet", 7, 0), ("train-1.parquet", 2, 7), ("val.parquet", 1, 9)):
            self.write(tmp_path / "raw" / name, rows, first)
        pattern = tmp_path / "raw" / "train-*.parquet"
        tokenise.run(parquet(pattern, columns=self.COLUMNS), "d", pattern, tmp_path / "out")
        dataset = open_dataset(tmp_path / "out")
        # Rows without ids are numbered through all files, and shards end where files do.
        assert [(dataset[i].example_id, dataset[i].instruction) for i in range(len(dataset))] == [
            (str(i), f"edit {i}") for i in range(9)
        ]
        shards = sorted((tmp_path / "out" / "data").glob("*.parquet"))
        assert [pq.read_metadata(file).num_rows for file in shards] == [4, 3, 2]
        assert (dataset[0].task, dataset[0].reasoning) == ("3", [("where", "[0, 0, 8, 8]")])
        config = parquet(tmp_path / "raw", columns=self.COLUMNS | {"task": None}, keep_images=False)
        tokenise.run(config, "d", tmp_path / "raw", tmp_path / "all")
        dataset = open_dataset(tmp_path / "all")
        assert (len(dataset), dataset[9].task, dataset[9].original) == (10, None, None)

    def test_other_forms_of_the_same_values(self, tmp_path: Path) -> None:
        """Categories of pandas, views, and lists of one length."""
        columns = {
            "task": pa.array(["add", "swap"]).dictionary_encode(),
            "prompts": pa.array([["", "one"], ["", "two"]], pa.list_(pa.string(), 2)),
            "original": pa.array([PICTURE["bytes"]] * 2, pa.binary_view()),
            "edited": pa.array([PICTURE] * 2, tables.IMAGE),
        }
        raw = tmp_path / "raw.parquet"
        pq.write_table(pa.table(columns), raw)
        tokenise.run(parquet(raw, columns={"instruction": "prompts[1]"}), "d", raw, tmp_path / "out")
        dataset = open_dataset(tmp_path / "out")
        assert [(dataset[i].task, dataset[i].instruction) for i in range(2)] == [("add", "one"), ("swap", "two")]

    def test_a_missing_item_is_a_reject(self, tmp_path: Path) -> None:
        raw = tmp_path / "raw" / "a.parquet"
        self.write(raw, 2)
        config = parquet(raw, columns=self.COLUMNS | {"instruction": "prompts[2]"})
        with pytest.raises(EarlError, match=r"row 1, column 'instruction': no instruction"):
            tokenise.run(config, "d", raw, tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"original": "before"}, r"column 'before' \(original\) is missing; the file has prompts, pair, after"),
            ({"original": "pair.after"}, r"column 'pair\.after' \(original\) is missing"),
            ({"original": "kind"}, "column 'kind' has type int64, which cannot be original"),
            ({"original": "pair"}, r"column 'pair' has type struct.* cannot be original"),
            ({"instruction": "prompts"}, r"column 'prompts' has type list.* cannot be instruction"),
            ({"example_id": "id"}, r"column 'id' \(example_id\) is missing"),
        ],
    )
    def test_mistakes_are_named_before_a_model_loads(self, change: dict, part: str, tmp_path: Path) -> None:
        raw = tmp_path / "raw" / "a.parquet"
        self.write(raw, 2)
        config = parquet(raw, columns=self.COLUMNS | change)
        with pytest.raises(EarlError, match=rf"a\.parquet: {part}"):
            tokenise.run(config, "d", raw, tmp_path / "out")

    def test_files_of_other_columns_are_kept_apart(self, tmp_path: Path) -> None:
        self.write(tmp_path / "raw" / "a.parquet", 2)
        self.write(tmp_path / "raw" / "b.parquet", 2)
        table = pq.read_table(tmp_path / "raw" / "b.parquet")
        pq.write_table(table.drop_columns(["reasoning"]), tmp_path / "raw" / "b.parquet")
        with pytest.raises(EarlError, match=r"b\.parquet: has other columns than .*a\.parquet"):
            tokenise.run(parquet(tmp_path / "raw", columns=self.COLUMNS), "d", tmp_path / "raw", tmp_path / "out")

    def test_a_pattern_without_files_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EarlError, match=r"x-\*\.parquet: there is no such Parquet file"):
            tokenise.run(demo_config(), "d", tmp_path / "x-*.parquet", tmp_path / "out")


KILLED = """
import os, signal, sys
from collections.abc import Callable
from pathlib import Path
from earl.config import load
from earl.data import shards
from earl.stages import tokenise
tokenise.ROWS_PER_FILE = 4
write, count = shards.ShardWriter.write, 0
def killed(self, number, columns, rejects):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, number, columns, rejects)
shards.ShardWriter.write = killed
tokenise.run(load.load("config/demo.jsonnet").config, "shapes_rl", Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_shards_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "ROWS_PER_FILE", 4)
    raw = tmp_path / "raw.parquet"
    shapes.write_raw(raw, count=14, seed=5)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(raw), str(tmp_path / "out")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    unfinished = tmp_path / ".out.unfinished"
    stood = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("data/*.parquet")}
    assert sorted(stood) == ["0000.parquet", "0001.parquet"]
    assert not (tmp_path / "out").exists()
    tokenise.run(demo_config(), "shapes_rl", raw, tmp_path / "out")
    tokenise.run(demo_config(), "shapes_rl", raw, tmp_path / "undisturbed")
    assert {name: (tmp_path / "out" / "data" / name).stat().st_mtime_ns for name in stood} == stood
    left, right = (contents(tmp_path / name) for name in ("out", "undisturbed"))
    assert left == right
    assert sorted(left) == ["README.md", *(f"data/000{i}.parquet" for i in range(4)), "manifest.json", "summary.json"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"original": None}, "field raw_datasets.d.columns (in --set) says that there is no original"),
        ({"picture": "a"}, "raw_datasets.d.columns.picture"),
        ({"original": "a[x]"}, "raw_datasets.d.columns.original"),
    ],
)
def test_a_mapping_that_cannot_be_is_an_error_of_the_configuration(columns: dict, part: str) -> None:
    with pytest.raises(EarlError) as error:
        parquet(Path("a.parquet"), columns=columns)
    assert part in str(error.value)


def test_shards_of_other_data_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "ROWS_PER_FILE", 4)
    raw, out = tmp_path / "raw.parquet", tmp_path / "out"
    write_raw(raw, raw_columns(8) | {"instruction": ["first"] * 7 + [""]})
    with pytest.raises(EarlError, match="1 row rejected"):
        tokenise.run(demo_config(), "d", raw, out)
    assert (tmp_path / ".out.unfinished" / "data" / "0000.parquet").is_file()
    write_raw(raw, raw_columns(8) | {"instruction": ["second"] * 8})
    tokenise.run(demo_config(), "d", raw, out)
    dataset = open_dataset(out)
    assert {dataset[i].instruction for i in range(8)} == {"second"}


def test_the_pipeline_depends_on_every_file_of_a_pattern(tmp_path: Path) -> None:
    files = [write_raw(tmp_path / f"a-{i}.parquet", raw_columns(1)) for i in range(2)]
    pattern = tmp_path / "a-*.parquet"
    stage = {"train_paths_file": ["stage:tokenise/d"]}

    def folder(**fields: Any) -> Path:
        config = Config.model_validate(parquet(pattern, **fields).model_dump() | stage)
        made = paths.shared_stages(config)[paths.tokenised_folder(config, "d")]
        assert made.inputs == tuple(files)
        return made.output

    assert folder(max_rejected_fraction=0.5) == folder()
    assert folder(columns={"task": None}) != folder()
