"""Rows of a raw data set by value, by chance and in pairs; Parquet and Arrow files alike."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import load
from earl.config.sections import RawDataset
from earl.data import row_files
from earl.data.raw import RawRow, RawSource
from earl.data.selection import Selection
from earl.data.tokenised import open_dataset
from earl.files import images
from earl.messages.errors import EarlError
from earl.stages import tokenise
from tests.support.evaluation_files import demo_config
from tests.support.raw_files import parquet, rejected

COLUMNS = {"instruction": "text", "original": "before", "edited": "after", "task": None, "example_id": None}


def picture(value: int) -> dict:
    return images.struct(images.encode(np.full((64, 64, 3), value, np.uint8)))


def table(rows: int, first: int = 0, **columns: list) -> pa.Table:
    """Rows whose text is their number; pictures are bytes that say which they are."""
    numbers = range(first, first + rows)
    found = {
        "text": [f"row {number}" for number in numbers],
        "before": [{"bytes": b"before %d" % number, "path": None} for number in numbers],
        "after": [{"bytes": b"after %d" % number, "path": None} for number in numbers],
    }
    return pa.table(found | columns)


def write(path: Path, rows: pa.Table, group: int = 4) -> Path:
    """Write a table in groups of a few rows, in the form that the name's end and middle say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=group)
        return path
    new = pa.ipc.new_file if ".file" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=group)
    return path


FORMS = ("a.parquet", "a.stream.arrow", "a.file.arrow")


def source(path: Path, **fields: Any) -> RawSource:
    """The source that an entry of raw_datasets means."""
    entry = RawDataset.model_validate({"source": "parquet", "path": str(path), "columns": COLUMNS} | fields)
    return RawSource(path, entry.columns, Selection.of(entry), entry.instruction_prefix, entry.task_name)


def read(found: RawSource, window: int = 1024, at_once: int = 128) -> list[RawRow]:
    return [row for part in found.windows(window) for rows in found.read(part, at_once) for row in rows]


def texts(found: RawSource, **sizes: int) -> list[str]:
    return [row.instruction for row in read(found, **sizes)]


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("window", "at_once"), [(1024, 128), (5, 3), (1, 1), (7, 100)])
    def test_every_row_once_in_order(self, form: str, window: int, at_once: int, tmp_path: Path) -> None:
        found = source(write(tmp_path / form, table(19)))
        rows = read(found, window, at_once)
        assert [row.instruction for row in rows] == [f"row {number}" for number in range(19)]
        assert [(row.row, row.example_id) for row in rows] == [(number, str(number)) for number in range(19)]
        assert [row.original for row in rows] == [b"before %d" % number for number in range(19)]
        assert (len(found), [part.rows for part in found.windows(8)]) == (19, [8, 8, 3])

    def test_what_datasets_saves_to_disk(self, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "before": [b"x"] * 3, "after": [b"y"] * 3})
        rows.save_to_disk(tmp_path / "saved", num_shards=2)
        found = source(tmp_path / "saved")
        assert [file.suffix for file in found.files] == [".arrow", ".arrow"]
        assert texts(found) == ["a", "b", "c"]
        assert [row.example_id for row in read(found)] == ["0", "1", "2"]

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("keep", [0, 5, 0.5, -9])
    def test_a_cut_file_is_named(self, form: str, keep: float, tmp_path: Path) -> None:
        path = write(tmp_path / form, table(64))
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(EarlError, match=rf"{form}: (is (not a complete|damaged)|the data set is empty)"):
            read(source(path))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
            (b"a,b\n1,2\n", "is plain text, such as CSV"),
        ],
    )
    def test_what_is_no_arrow_is_told(self, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(EarlError, match=rf"a\.arrow: {words}"):
            source(tmp_path / "a.arrow")

    @pytest.mark.parametrize("form", FORMS[1:])
    def test_the_digest_is_of_the_content(self, form: str, tmp_path: Path) -> None:
        path = write(tmp_path / form, table(8))
        before = source(path).footers_digest
        assert source(path).footers_digest == before
        content = bytearray(path.read_bytes())
        content[content.rindex(b"after 7")] ^= 1
        path.write_bytes(content)
        assert source(path).footers_digest != before

    def test_offsets_beyond_the_buffer_are_refused(self, tmp_path: Path) -> None:
        """A map into memory is as trustworthy as its offsets: they are checked before anything is read through them."""
        path = write(tmp_path / "a.arrow", table(8), group=8)
        content = bytearray(path.read_bytes())
        offsets = np.cumsum([0] + [len(f"row {number}") for number in range(8)]).astype("<i4").tobytes()
        place = content.index(offsets)
        content[place + 16 : place + 20] = (2**30).to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(EarlError, match=r"a\.arrow: record batch 0 is damaged"):
            read(source(path))

    def test_only_groups_with_wanted_rows_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.parquet", table(40, kind=["x", *["y"] * 38, "x"]))
        asked = []
        group = row_files._Parquet.group

        def counted(self: Any, index: int, columns: list[str], rows: int) -> Any:
            if "before" in columns:
                asked.append(index)
            return group(self, index, columns, rows)

        monkeypatch.setattr(row_files._Parquet, "group", counted)
        assert texts(source(path, filter={"kind": "x"})) == ["row 0", "row 39"]
        assert asked == [0, 9]


class TestFilter:
    @pytest.mark.parametrize("form", FORMS)
    def test_rows_with_a_value(self, form: str, tmp_path: Path) -> None:
        path = write(tmp_path / form, table(6, source=["ag", "kubric", "ag", None, "mb", "ag"]))
        assert texts(source(path, filter={"source": "ag"})) == ["row 0", "row 2", "row 5"]
        assert texts(source(path, filter={"source": ["mb", "kubric"]})) == ["row 1", "row 4"]

    def test_rows_are_numbered_through_all_files(self, tmp_path: Path) -> None:
        for number in range(3):
            kinds = ["y", "x", "y", "x"] if number != 1 else ["y"] * 4
            write(tmp_path / f"{number}.parquet", table(4, 4 * number, kind=kinds))
        rows = read(source(tmp_path, filter={"kind": "x"}), at_once=1)
        assert [(row.example_id, row.row) for row in rows] == [("1", 1), ("3", 3), ("9", 1), ("11", 3)]
        assert [row.instruction for row in rows] == ["row 1", "row 3", "row 9", "row 11"]

    def test_several_places_and_kinds_of_value(self, tmp_path: Path) -> None:
        meta = [{"ok": True, "n": 1}, {"ok": False, "n": 1}, {"ok": True, "n": 2}, None]
        path = write(tmp_path / "a.parquet", table(4, meta=meta))
        assert texts(source(path, filter={"meta.ok": True})) == ["row 0", "row 2"]
        assert texts(source(path, filter={"meta.ok": True, "meta.n": 1})) == ["row 0"]
        with pytest.raises(EarlError, match="no row has it"):  # 1 is not true
            source(path, filter={"meta.ok": 1})

    def test_classes_go_by_their_names(self, tmp_path: Path) -> None:
        """A `ClassLabel` is stored as an index; two files may number the same names differently."""
        for number, names in enumerate((["train", "test"], ["test", "train"])):
            split = datasets.ClassLabel(names=names)
            features = datasets.Features(
                {
                    "text": datasets.Value("string"),
                    "before": datasets.Value("binary"),
                    "after": datasets.Value("binary"),
                }
                | {"meta": {"split": split}}
            )
            rows = {"text": [f"{number}{index}" for index in range(3)], "before": [b"x"] * 3, "after": [b"y"] * 3}
            rows["meta"] = [{"split": 0}, {"split": 1}, {"split": 0}]
            datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{number}.parquet")
        assert texts(source(tmp_path, filter={"meta.split": "train"})) == ["00", "02", "11"]
        with pytest.raises(EarlError, match="no row has it; there is 'test', 'train'"):
            source(tmp_path, filter={"meta.split": 0})

    def test_a_name_may_hold_dots_and_brackets(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(3, **{"meta.kind": ["a", "b", "a"], "meta": [{"kind": "b"}] * 3}))
        assert texts(source(path, filter={"meta.kind": "a"})) == ["row 0", "row 2"]

    def test_what_is_not_utf8_is_no_value(self, tmp_path: Path) -> None:
        kinds = pa.Array.from_buffers(
            pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], "<i4").tobytes()), pa.py_buffer(b"a\xffa")]
        )
        assert texts(source(write(tmp_path / "a.parquet", table(3, kind=kinds)), filter={"kind": "a"})) == [
            "row 0",
            "row 2",
        ]

    def test_a_column_that_stands_twice(self, tmp_path: Path) -> None:
        whole = table(2).append_column("kind", [["a", "b"]]).append_column("kind", [["b", "a"]])
        with pytest.raises(EarlError, match="column 'kind' stands twice"):
            source(write(tmp_path / "a.parquet", whole), filter={"kind": "a"})

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(3, source=["ag", "kubric", None]))
        with pytest.raises(EarlError, match=r"source is 'AG', but no row has it; there is 'ag', 'kubric', None"):
            source(path, filter={"source": "AG"})
        with pytest.raises(EarlError, match=r"column 'origin' \(filter\.origin\) is missing; the file has text, "):
            source(path, filter={"origin": "ag"})


class TestSubset:
    @pytest.mark.parametrize(("size", "rows", "seed"), [(3589, 1000, 42), (20, 20, 0), (7, 1, 5)])
    def test_the_rows_that_datasets_draws(self, size: int, rows: int, seed: int, tmp_path: Path) -> None:
        whole = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(size)]})
        expected = whole.shuffle(seed=seed).select(range(rows))["text"]
        path = write(tmp_path / "a.parquet", table(size), group=500)
        found = texts(source(path, subset={"rows": rows, "seed": seed}))
        assert found == sorted(expected, key=lambda text: int(text[4:])), "the same rows, in the order of the file"

    def test_by_hand(self, tmp_path: Path) -> None:
        """numpy's default_rng(42).permutation(10) is 5 6 0 7 3 2 4 9 1 8."""
        path = write(tmp_path / "a.arrow", table(10))
        assert texts(source(path, subset={"rows": 3, "seed": 42})) == ["row 0", "row 5", "row 6"]

    def test_it_is_drawn_from_what_the_filter_leaves(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(20, kind=["x", "y"] * 10))
        drawn = texts(source(path, filter={"kind": "y"}, subset={"rows": 3, "seed": 42}))
        assert drawn == ["row 1", "row 11", "row 13"]  # of the odd rows, those at 0, 5 and 6

    def test_more_than_there_are(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(5))
        with pytest.raises(EarlError, match=r"subset\.rows is 6, but there are only 5 rows"):
            source(path, subset={"rows": 6, "seed": 1})


def one_image_a_row() -> dict[str, list]:
    """Two originals, three edits (one of them before its original), one edit of nothing that is there."""
    ids = ["e0", "a", "e1", "b", "e2", "e3"]
    return {
        "image_id": ids,
        "image": [{"bytes": name.encode(), "path": None} for name in ids],
        "caption": [f"caption of {name}" for name in ids],
        "source_image_id": ["b", "", "a", None, "a", "gone"],
        "category": ["object", None, "counting", None, "object", "object"],
    }


PAIRS = {
    "columns": {"instruction": "caption", "original": "image", "edited": "image", "task": "category"},
    "pairing": {"image_id": "image_id", "original_id": "source_image_id"},
}


class TestPairing:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("at_once", [1, 128])
    def test_an_edit_gets_its_original(self, form: str, at_once: int, tmp_path: Path) -> None:
        rows = read(source(write(tmp_path / form, pa.table(one_image_a_row()), 2), **PAIRS), at_once=at_once)
        assert [(row.original, row.edited, row.task) for row in rows] == [
            (b"b", b"e0", "object"), (b"a", b"e1", "counting"), (b"a", b"e2", "object"), (None, b"e3", "object"),
        ]  # fmt: skip
        assert [row.problem for row in rows] == [None, None, None, ("original", "no original: no row has the id gone")]
        assert rows[0].instruction == "caption of e0"

    def test_originals_in_another_file(self, tmp_path: Path) -> None:
        whole = pa.table(one_image_a_row())
        write(tmp_path / "0.parquet", whole.slice(0, 1))
        write(tmp_path / "1.parquet", whole.slice(1))
        rows = read(source(tmp_path, **PAIRS))
        assert [(row.original, row.edited) for row in rows[:2]] == [(b"b", b"e0"), (b"a", b"e1")]

    def test_a_filter_is_about_edits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", pa.table(one_image_a_row()))
        rows = read(source(path, **PAIRS, filter={"category": "counting"}))
        assert [(row.original, row.edited) for row in rows] == [(b"a", b"e1")]

    def test_ids_that_are_numbers(self, tmp_path: Path) -> None:
        """pandas makes floats of whole numbers beside missing ones."""
        columns = one_image_a_row() | {"image_id": [10, 11, 12, 13, 14, 15]}
        columns["source_image_id"] = [13.0, float("nan"), 11.0, None, 11.0, float("nan")]
        rows = read(source(write(tmp_path / "a.parquet", pa.table(columns)), **PAIRS))
        assert [(row.original, row.edited) for row in rows] == [(b"b", b"e0"), (b"a", b"e1"), (b"a", b"e2")]

    def test_an_id_that_cannot_be_read_rejects_its_row(self, tmp_path: Path) -> None:
        ends = np.array([0, 1, 1, 2, 2, 3, 4], "<i4").tobytes()
        originals = pa.Array.from_buffers(pa.string(), 6, [None, pa.py_buffer(ends), pa.py_buffer(b"b\xffax")])
        columns = one_image_a_row() | {"source_image_id": originals}
        rows = read(source(write(tmp_path / "a.parquet", pa.table(columns)), **PAIRS))
        assert [row.original for row in rows] == [b"b", None, b"a", None]
        assert rows[1].problem[1].startswith("no original: its id cannot be read: text is not UTF-8")

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        twice = one_image_a_row() | {"image_id": ["a", "a", "e1", "b", "e2", "e3"]}
        with pytest.raises(EarlError, match=r"rows 0 and 1 both have image_id 'a'"):
            source(write(tmp_path / "a.parquet", pa.table(twice)), **PAIRS)
        none = one_image_a_row() | {"source_image_id": pa.nulls(6, pa.string())}
        with pytest.raises(EarlError, match=r"original_id is 'source_image_id', which is empty in every row"):
            source(write(tmp_path / "b.parquet", pa.table(none)), **PAIRS)


class TestText:
    def test_reasoning_of_several_columns(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.parquet",
            table(3, grounding=["a cat", " ", None], thinking=["so", "so", None], meta=[{"plan": "go"}, None, None]),
        )
        columns = COLUMNS | {"reasoning": ["grounding", "meta.plan", "thinking"]}
        pairs = [row.reasoning_pairs() for row in read(source(path, columns=columns))]
        assert pairs == [[("grounding", "a cat"), ("plan", "go"), ("thinking", "so")], [("thinking", "so")], None]

    def test_a_missing_one_of_them(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(1, thinking=["so"], number=[1]))
        for name, part in (("plan", r"'plan' \(reasoning\) is missing"), ("number", "'number' has type int64")):
            with pytest.raises(EarlError, match=part):
                source(path, columns=COLUMNS | {"reasoning": ["thinking", name]})

    def test_the_instructions_prefix(self, tmp_path: Path) -> None:
        given = ["edit_instruction: add", "add", " edit_instruction: add", "edit_instruction: ", None]
        path = write(tmp_path / "a.parquet", table(5, text=given))
        found = texts(source(path, instruction_prefix="edit_instruction: "))
        assert found == ["add", "add", " edit_instruction: add", "", None]

    def test_a_task_for_all(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(2))
        columns = {name: place for name, place in COLUMNS.items() if name != "task"}
        assert [row.task for row in read(source(path, columns=columns, task_name="counting"))] == ["counting"] * 2


class TestTokenise:
    def test_what_was_selected_is_tokenised(self, tmp_path: Path) -> None:
        """Five edits in one file of two groups; one original is missing, one row is filtered out."""
        columns = one_image_a_row()
        columns["image"] = [picture(20 * number) for number in range(6)]
        path = write(tmp_path / "raw.arrow", pa.table(columns), 2)
        fields = PAIRS | {"filter": {"category": ["object"]}, "max_rejected_fraction": 0.5}
        tokenise.run(parquet(path, **fields), "d", path, tmp_path / "out")
        found = open_dataset(tmp_path / "out")
        assert [found[row].example_id for row in range(len(found))] == ["0", "4"]
        assert [found[row].instruction for row in range(2)] == ["caption of e0", "caption of e2"]
        assert images.decode(found[0].original, "").mean() == 60
        assert images.decode(found[0].target, "").mean() == 0
        assert [(row["row"], row["column"], row["reason"]) for row in rejected(tmp_path / "out")] == [
            (5, "original", "no original: no row has the id gone")
        ]
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (summary["rows"], summary["kept"]) == (3, 2)

    def test_shards_hold_whole_windows_of_selected_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenise, "ROWS_PER_FILE", 2)
        rows = table(12, before=[picture(0)] * 12, after=[picture(1)] * 12, kind=[*"xyyyxyyyyyyx"])
        path = write(tmp_path / "a.parquet", rows)
        tokenise.run(parquet(path, columns=COLUMNS, filter={"kind": "x"}), "d", path, tmp_path / "out")
        files = sorted((tmp_path / "out" / "data").glob("*.parquet"))
        shards = [pq.read_table(file)["example_id"].to_pylist() for file in files]
        assert shards == [["0", "4"], ["11"]]

    def test_shards_of_other_rows_are_not_taken_over(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", table(4, before=[picture(0)] * 4, after=[None, None, None, picture(1)]))
        whole = parquet(path, columns=COLUMNS)
        with pytest.raises(EarlError, match="more than max_rejected_fraction allows"):
            tokenise.run(whole, "d", path, tmp_path / "out")
        some = load.changed(whole, {"raw_datasets.d.subset": {"rows": 1, "seed": 0}})
        assert np.random.default_rng(0).permutation(4)[0] == 2
        with pytest.raises(EarlError, match=r"1 row rejected .*0 of 1"):
            tokenise.run(some, "d", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (
            {"columns": {"original": ["a", "b"]}},
            r"columns \(in --set\) has the list \['a', 'b'\] for original; .* reasoning alone",
        ),
        ({"columns": {"reasoning": []}}, r"columns \(in --set\) has the list \[\] for reasoning"),
        ({"filter": {"a": []}}, r"filter\.a \(in --set\) is \[\]: must be a text, a whole number"),
        ({"filter": {"a": 1.5}}, r"filter\.a \(in --set\) is 1\.5: must be a text, a whole number"),
        ({"filter": {"a": ["b", None]}}, r"filter\.a \(in --set\) is \[\"b\", null\]: must be a text"),
        ({"columns": {"task": 3}}, r"columns\.task \(in --set\) is 3: is no place in a row, such as"),
        (
            {"columns": {"reasoning": ["a", None]}},
            r"columns\.reasoning \(in --set\) is \[\"a\", null\]: is no place in a row",
        ),
        (
            {"columns": {"reasoning": ["a", "b["]}},
            r"columns\.reasoning \(in --set\) is \[\"a\", \"b\[\"\]: is no place in a row",
        ),
        ({"filter": {"a.": "x"}}, r"filter"),
        ({"subset": {"rows": 0, "seed": 1}}, r"subset\.rows \(in --set\) is 0"),
        ({"subset": {"rows": 1}}, r"subset\.seed \(in --set\) is missing"),
        ({"pairing": {"image_id": "a"}}, r"pairing\.original_id \(in --set\) is missing"),
        ({"instruction_prefix": ""}, r"instruction_prefix"),
        (
            {"task_name": "x", "columns": {"task": "y"}},
            r"task_name \(in --set\) is set, but columns\.task names a column",
        ),
    ],
)
def test_mistakes_in_the_configuration(fields: dict, part: str) -> None:
    with pytest.raises(EarlError, match=rf"raw_datasets\.d\.?.*{part}"):
        parquet(Path("/a.parquet"), **fields)


@pytest.mark.parametrize("name", ["filter", "pairing", "subset", "instruction_prefix", "task_name"])
def test_the_shapes_world_has_no_such_fields(name: str) -> None:
    values = {
        "filter": {"a": "b"}, "pairing": {"image_id": "a", "original_id": "b"}, "subset": {"rows": 1, "seed": 1},
        "instruction_prefix": "a", "task_name": "a",
    }  # fmt: skip
    with pytest.raises(EarlError, match=rf"{name} \(in --set\) has no meaning when source is `shapes`"):
        demo_config(**{"raw_datasets.d": {"source": "shapes", "count": 1, "seed": 1, name: values[name]}})
