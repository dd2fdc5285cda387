"""Files appear whole or not at all, carry what readers need, and are checked when read."""

import hashlib
import io
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from earl.files import atomic, images, manifest, tables
from earl.messages.errors import EarlError
from earl.messages.text import encodable

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)


def rollout_columns(**changes):
    picture = images.struct(images.encode(RED))
    columns = {
        "episode_id": ["000001-0000-00", "000001-0000-01"],
        "group_id": ["000001-0000"] * 2,
        "sample_index": [0, 1],
        "dataset": ["d"] * 2,
        "example_id": ["7"] * 2,
        "task": ["remove", None],
        "instruction": ["remove the circle"] * 2,
        "prompt_token_ids": [[1, 2, 700]] * 2,
        "completion_token_ids": [[3], [4, 5]],
        "behavior_logprobs": [[-0.5], [-0.25, 0.0]],
        "finish_reason": ["stop", "length"],
        "completion_text": ["", ""],
        "original": [picture] * 2,
        "target": [picture, None],
        "edited": [picture, None],
    }
    return columns | changes


def write_rollouts(path, **changes):
    tables.write_table(path, tables.ROLLOUTS, rollout_columns(**changes), {"run": "r"}, largest_token=700)
    return path


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError), atomic.file(path) as temporary:
        temporary.write_text("half" * 10_000 + "\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_folder_and_appears_whole(tmp_path):
    path = tmp_path / "policy"
    for content in ("one", "two"):
        with atomic.folder(path) as temporary:
            (temporary / "weights").write_text(content)
            assert not (path / "weights").exists() or (path / "weights").read_text() != content
    assert (path / "weights").read_text() == "two"
    assert os.listdir(tmp_path) == ["policy"]


def test_disk_full_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    """A file size limit makes the system refuse the write half-way, as a full disk does."""
    script = (
        "import sys; from earl.messages.errors import EarlError; from earl.files import tables; import pyarrow as pa\n"
        "schema = pa.schema([pa.field('x', pa.float64())])\n"
        "import numpy as np\n"
        "try: tables.write_table(sys.argv[1], schema, {'x': np.random.default_rng(0).random(100000)}, {})\n"
        "except EarlError as error: print(error); sys.exit(2)\n"
    )
    path = tmp_path / "big.parquet"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stdout
    assert "could not be written" in done.stdout
    assert os.listdir(tmp_path) == []


def test_killed_while_writing_leaves_no_file_under_the_final_name(tmp_path):
    script = (
        "import sys, time; from earl.files import atomic\n"
        "with atomic.file(sys.argv[1]) as t:\n"
        "    t.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    path = tmp_path / "a.txt"
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists()
    assert len(os.listdir(tmp_path)) == 1
    atomic.write_text(path, "whole")
    assert os.listdir(tmp_path) == ["a.txt"], "the next writer clears what the killed one left"


def test_rollouts_open_in_pandas_duckdb_and_datasets_with_their_images(tmp_path):
    import datasets
    import duckdb
    import pandas as pd

    path = write_rollouts(tmp_path / "0000.parquet")
    frame = pd.read_parquet(path)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(frame.edited[0]["bytes"]))), RED)
    assert frame.edited[1] is None
    assert list(frame.prompt_token_ids[0]) == [1, 2, 700]
    stopped = duckdb.sql(f"select episode_id from '{path}' where finish_reason = 'stop'").fetchall()
    assert [tuple(row) for row in stopped] == [("000001-0000-00",)]
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(np.asarray(loaded[0]["original"]), RED)
    assert loaded[1]["edited"] is None


def test_tokens_are_stored_in_the_smallest_type_of_the_vocabulary(tmp_path):
    path = write_rollouts(tmp_path / "a.parquet")
    assert pq.read_schema(path).field("completion_token_ids").type == pa.list_(pa.uint16())
    assert tables.smallest_unsigned(255) == pa.uint8()
    assert tables.smallest_unsigned(256) == pa.uint16()
    assert tables.smallest_unsigned(184_621) == pa.uint32()


def test_equal_tables_are_equal_bytes(tmp_path):
    first, second = (write_rollouts(tmp_path / name).read_bytes() for name in ("a", "b"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (lambda t: t.drop_columns("completion_token_ids"), "column 'completion_token_ids' is missing"),
        (lambda t: t.set_column(2, "sample_index", pa.array(["a", "b"])), "column 'sample_index' has type string"),
        (lambda t: t.set_column(4, "example_id", pa.array(["a", None])), "column 'example_id' is null in row 1"),
        (
            lambda t: t.set_column(
                9, "behavior_logprobs", pa.array([[float("nan")], [0.0, 0.0]], pa.list_(pa.float32()))
            ),
            "column 'behavior_logprobs' holds nan",
        ),
    ],
)
def test_a_wrong_column_is_named(tmp_path, broken, complaint):
    path = write_rollouts(tmp_path / "a.parquet")
    pq.write_table(broken(pq.read_table(path)), path)
    with pytest.raises(EarlError, match=complaint) as caught:
        tables.read_table(path, tables.ROLLOUTS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [-0.5, 10.5])
def test_scores_outside_their_range_are_refused(tmp_path, value):
    columns = {name: [None] for name in tables.SCORES.names}
    columns |= {"episode_id": ["a"], "group_id": ["g"], "status": ["ok"], "judge": ["j"], "overedit": [value]}
    tables.write_table(tmp_path / "s.parquet", tables.SCORES, columns, {})
    with pytest.raises(EarlError, match=r"column 'overedit' holds -?\d+\.5, outside 0\.\.10"):
        tables.read_table(tmp_path / "s.parquet", tables.SCORES)


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write_rollouts(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EarlError, match="is not a complete Parquet file"):
        tables.read_table(path, tables.ROLLOUTS)


def test_a_flipped_byte_names_the_column(tmp_path):
    path = write_rollouts(tmp_path / "a.parquet", instruction=["remove the purple triangle " * 20, "x"])
    column = pq.ParquetFile(path).metadata.row_group(0).column(6)
    assert column.path_in_schema == "instruction"
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(EarlError, match="column 'instruction' is damaged"):
        tables.read_table(path, tables.ROLLOUTS)


def test_chosen_rows_are_read_from_the_row_groups_that_hold_them_alone(tmp_path, monkeypatch):
    """Rows a b | c d | e f: asking for f, c and one that is not there reads the images of two groups."""
    ids = list("abcdef")
    columns = {name: [values[0]] * 6 for name, values in rollout_columns().items()}
    pictures = [images.struct(images.encode(np.full((2, 2, 3), shade, np.uint8))) for shade in range(6)]
    columns |= {"episode_id": ids, "edited": pictures}
    path = tmp_path / "a.parquet"
    tables.write_table(path, tables.ROLLOUTS, columns, {}, rows_per_group=2)
    read, group_of = [], tables.read_group

    def read_group(path, source, schema, columns, group, *more):
        read.append((group, *columns))
        return group_of(path, source, schema, columns, group, *more)

    monkeypatch.setattr(tables, "read_group", read_group)
    found = tables.read_rows(path, tables.ROLLOUTS, ["edited"], "episode_id", {"f", "c", "x"})
    assert found == {"c": {"edited": pictures[2]}, "f": {"edited": pictures[5]}}
    assert [group for group, *columns in read if "edited" in columns] == [1, 2]
    pq.write_table(pq.read_table(path).drop_columns("target"), path)
    with pytest.raises(EarlError, match="column 'target' is missing"):
        tables.read_rows(path, tables.ROLLOUTS, ["target"], "episode_id", {"a"})


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_what_a_library_wrote_for_its_owner_alone_is_shared_as_the_umask_says(tmp_path, umask, files, folders):
    old = os.umask(umask)
    try:
        with atomic.folder(tmp_path / "policy") as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "model.safetensors").touch(0o600)
        with atomic.file(tmp_path / "table") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"policy": folders, "part": folders, "model.safetensors": files, "table": files}


def test_a_sealed_folder_tells_missing_cut_and_changed_files(tmp_path):
    folder = tmp_path / "policy"
    with atomic.folder(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        (temporary / "weights").write_text("1234")
        digest = manifest.seal(temporary)
    assert manifest.digest_folder(folder) == digest
    manifest.check(folder, deep=True)
    (folder / "weights").write_text("4321")
    manifest.check(folder)
    with pytest.raises(EarlError, match="weights: is damaged: its content differs"):
        manifest.check(folder, deep=True)
    (folder / "weights").write_text("123")
    with pytest.raises(EarlError, match="has 3 bytes where"):
        manifest.check(folder)
    (folder / "weights").unlink()
    with pytest.raises(EarlError, match="weights: is missing"):
        manifest.check(folder)
    (folder / manifest.NAME).unlink()
    with pytest.raises(EarlError, match="is incomplete"):
        manifest.check(folder)


def test_help_answers_without_heavy_imports():
    script = (
        "import sys; from typer.testing import CliRunner; from earl.cli import app\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "heavy = ('torch', 'transformers', 'pyarrow', 'pandas', 'snakemake', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_halves_of_surrogate_pairs_can_be_written_and_whole_ones_stay():
    assert encodable("plain") == "plain"
    assert encodable("\ud83d\ude00 \U0001f600") == "\U0001f600 \U0001f600"
    assert encodable("a\ud83db\ude00\udcff") == "a\ufffdb\ufffd\ufffd"


def test_a_page_that_names_a_file_of_odd_bytes_is_written(tmp_path):
    atomic.write_text(tmp_path / "page.html", "<p>" + os.fsdecode(b"run-\xff") + "</p>")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "<p>run-\ufffd</p>"


def test_a_column_that_is_no_unicode_is_named(tmp_path):
    columns = {"episode_id": ["a"], "group_id": ["\ud83d"], "reward": [0.0], "advantage": [0.0], "used": [True]}
    columns |= {"reason": [None], "viescore": [None], "completion_tokens": [1], "prompt_digest": ["p"]}
    with pytest.raises(EarlError, match=r"e\.parquet: column 'group_id'"):
        tables.write_table(tmp_path / "e.parquet", tables.EPISODES, columns, {})
