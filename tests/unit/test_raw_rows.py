"""Rows of raw data sets: values of any writer are read as what they mean, or their row says why not."""

import json
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.data.raw import RawRow, RawSource
from earl.files import tables
from earl.messages.errors import EarlError

CELLS = pa.array([{"bytes": b"x", "path": "x.png"}] * 3, tables.IMAGE)


def texts(*values: bytes | None) -> pa.StringArray:
    """A column of texts that are not checked to be UTF-8."""
    lengths = np.cumsum([0, *(len(value or b"") for value in values)]).astype(np.int32)
    known = np.packbits([value is not None for value in values], bitorder="little")
    buffers = (pa.py_buffer(lengths), pa.py_buffer(b"".join(value or b"" for value in values)), pa.py_buffer(known))
    return pa.StringArray.from_buffers(len(values), *buffers)


def read(path: Path, places: dict | None = None, **columns: object) -> list[RawRow]:
    """Write three rows and read them in parts of two."""
    given = {"instruction": ["a", "b", "c"], "original": CELLS, "edited": CELLS} | columns
    pq.write_table(pa.table(given), path / "raw.parquet")
    return rows_of(path, places)


def rows_of(path: Path, places: dict | None = None) -> list[RawRow]:
    source = RawSource(path / "raw.parquet", places)
    return [row for window in source.windows(3) for part in source.read(window, 2) for row in part]


# Text that is not UTF-8


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    rows = read(tmp_path, instruction=texts(b"add", b"caf\xe9", b"cut"), task=texts(b"\xff", None, b"swap"))
    assert [row.problem and row.problem[0] for row in rows] == ["task", "instruction", None]
    assert rows[1].problem[1].startswith("text is not UTF-8: ")
    assert [row.instruction for row in rows] == ["add", None, "cut"]
    assert rows[2].task == "swap"
    assert all(row.original == b"x" for row in rows)


def test_it_costs_nothing_where_nobody_looks(tmp_path: Path) -> None:
    """A file name of an image, or a field that is not mapped."""
    bad = texts(b"\xe9.png", b"x", b"y")
    image = pa.StructArray.from_arrays([pa.array([b"1", b"2", b"3"]), bad], ["bytes", "path"])
    rows = read(tmp_path, {"task": "more.kind"}, original=image, more=more_of(bad, pa.array(["p", "q", "r"])))
    assert [(row.original, row.task, row.problem) for row in rows] == [
        (b"1", "p", None),
        (b"2", "q", None),
        (b"3", "r", None),
    ]


def more_of(note: pa.Array, kind: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays([note, kind], ["note", "kind"])


def test_inside_lists_and_structs_too(tmp_path: Path) -> None:
    bad = texts(b"cat", b"\xff", b"dog")
    rows = read(tmp_path, reasoning=pa.StructArray.from_arrays([bad, pa.array(["x"] * 3)], ["what", "why"]))
    assert [row.problem and row.problem[0] for row in rows] == [None, "reasoning", None]
    assert rows[2].reasoning_pairs() == [("what", "dog"), ("why", "x")]
    prompts = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), bad)
    rows = read(tmp_path, {"instruction": "prompts[0]"}, prompts=prompts)
    assert [row.instruction for row in rows] == ["cat", None, "dog"]
    assert rows[1].problem[0] == "instruction"


# Classes


def test_classes_of_hugging_face_have_names(tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["add", "swap"])
    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "original": datasets.Value("binary"),
            "edited": datasets.Value("binary"),
            "kind": kinds,
            "edit": {"kind": kinds},
            "kinds": datasets.List(kinds),
            "edits": datasets.List({"kind": kinds}),
        }
    )
    numbers = [1, 0, None]
    columns = {
        "instruction": ["a", "b", "c"],
        "original": [b"x"] * 3,
        "edited": [b"x"] * 3,
        "kind": numbers,
        "edit": [{"kind": number} for number in numbers],
        "kinds": [[0, number] for number in numbers],
        "edits": [[{"kind": number}] for number in numbers],
    }
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "raw.parquet")
    for place in ("kind", "edit.kind", "kinds[1]", "edits[0].kind"):
        assert [row.task for row in rows_of(tmp_path, {"task": place})] == ["swap", "add", None]
    # A class may be the instruction itself.
    assert [row.instruction for row in rows_of(tmp_path, {"instruction": "kind"})] == ["swap", "add", None]


def labelled(path: Path, feature: object, values: pa.Array, file: str = "raw.parquet") -> None:
    table = pa.table({"instruction": ["a", "b", "c"], "original": CELLS, "edited": CELLS, "task": values})
    metadata = {"huggingface": json.dumps({"info": {"features": {"task": feature}}})}
    pq.write_table(table.replace_schema_metadata(metadata), path / file)


CLASS = {"_type": "ClassLabel", "names": ["add", "swap"]}


def test_older_forms_of_sequences(tmp_path: Path) -> None:
    lists = pa.array([[0], [1], [0]])
    for feature in ([CLASS], {"_type": "Sequence", "feature": CLASS}, {"_type": "LargeList", "feature": CLASS}):
        labelled(tmp_path, feature, lists)
        assert [row.task for row in rows_of(tmp_path, {"task": "task[0]"})] == ["add", "swap", "add"]
    labelled(tmp_path, {"_type": "Sequence", "feature": {"kind": CLASS}}, pa.array([{"kind": [1]}] * 3))
    assert [row.task for row in rows_of(tmp_path, {"task": "task.kind[0]"})] == ["swap"] * 3


def test_a_number_without_a_name(tmp_path: Path) -> None:
    labelled(tmp_path, CLASS, pa.array([-1, 2, 1]))
    rows = rows_of(tmp_path)
    assert [row.task for row in rows] == [None, None, "swap"]
    assert [row.problem for row in rows] == [None, ("task", "no such class: 2 of 2"), None]


def test_every_file_has_its_own_classes(tmp_path: Path) -> None:
    (tmp_path / "raw.parquet").mkdir()
    labelled(tmp_path / "raw.parquet", CLASS, pa.array([0, 1, 0]), "a.parquet")
    other = CLASS | {"names": ["swap", "add"]}
    labelled(tmp_path / "raw.parquet", other, pa.array([0, 1, 0]), "b.parquet")
    assert [row.task for row in rows_of(tmp_path)] == ["add", "swap", "add", "swap", "add", "swap"]


@pytest.mark.parametrize("feature", [{"_type": "Value", "dtype": "int64"}, {"_type": "ClassLabel"}, None, 3, "x", []])
def test_other_metadata_leaves_numbers(feature: object, tmp_path: Path) -> None:
    labelled(tmp_path, feature, pa.array([0, 1, 0]))
    assert [row.task for row in rows_of(tmp_path)] == ["0", "1", "0"]


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]", b"null"])
def test_metadata_that_is_damaged_leaves_numbers(text: bytes, tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a"] * 3, "original": CELLS, "edited": CELLS, "task": [0, 1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "raw.parquet")
    assert [row.task for row in rows_of(tmp_path)] == ["0", "1", "0"]


def test_categories_are_their_values(tmp_path: Path) -> None:
    assert [row.task for row in read(tmp_path, task=pa.array(["x", "y", None]).dictionary_encode())] == ["x", "y", None]
    assert [row.task for row in read(tmp_path, task=pa.array([4, 5, 4]).dictionary_encode())] == ["4", "5", "4"]


# Types of Arrow


@pytest.mark.parametrize("store_schema", [True, False])
def test_json_and_uuid_are_what_they_hold(store_schema: bool, tmp_path: Path) -> None:
    keys = [uuid.UUID(int=number) for number in range(3)]
    columns = {
        "example_id": pa.array([key.bytes for key in keys], pa.uuid()),
        "instruction": ["a", "b", "c"],
        "reasoning": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"what": "cat"}'] * 3)),
        "original": CELLS,
        "edited": CELLS,
    }
    pq.write_table(pa.table(columns), tmp_path / "raw.parquet", store_schema=store_schema)
    rows = rows_of(tmp_path)
    assert [row.example_id for row in rows] == list(map(str, keys))
    assert rows[0].reasoning_pairs() == [("what", "cat")]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("example_id", pa.array([1.0, 2.0, None])),
        ("example_id", pa.array([b"a", b"b", b"c"])),
        ("example_id", pa.array([0, 1, 2], pa.timestamp("us"))),
        ("task", pa.array([True, False, None])),
        ("task", pa.array([0, 1, 2], pa.date32())),
        ("instruction", pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"cat"'] * 3))),
        ("instruction", pa.array([b"x" * 16] * 3, pa.uuid())),
        ("original", pa.array([b"xx"] * 3, pa.binary(2))),
        ("reasoning", pa.StructArray.from_arrays([pa.array(["x"] * 3)] * 2, ["a", "a"])),
    ],
)
def test_types_that_say_too_little_are_refused_before_a_row_is_read(
    column: str, values: pa.Array, tmp_path: Path
) -> None:
    with pytest.raises(EarlError, match=rf"raw\.parquet: column '{column}' has type .*, which cannot be {column}"):
        read(tmp_path, **{column: values})


def test_a_column_that_stands_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a"] * 3, "original": CELLS, "edited": CELLS, "x": ["p"] * 3})
    twice = table.append_column("x", table.column("x"))
    pq.write_table(twice, tmp_path / "raw.parquet")
    assert rows_of(tmp_path)[0].instruction == "a"
    with pytest.raises(EarlError, match=r"raw\.parquet: column 'x' stands twice in the file; rename or remove"):
        rows_of(tmp_path, {"task": "x"})


# Instructions


@pytest.mark.parametrize("text", [None, "", " \t\n", "\u00a0", "\u200b", "\ufeff", "\u200b \u2060"])
def test_an_instruction_without_anything_to_see_is_none(text: str | None, tmp_path: Path) -> None:
    row = read(tmp_path, instruction=pa.array([text] * 3, pa.string()))[0]
    with pytest.raises(EarlError, match="no instruction"):
        row.checked_instruction()


@pytest.mark.parametrize("text", ["x", "\u732b", "\U0001f408", " a\u200b"])
def test_any_sign_is_something_to_see(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, instruction=[text] * 3)[0].checked_instruction() == text
