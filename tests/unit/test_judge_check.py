"""The judge gate: images whose order is known, what is measured on them, and that no run starts below the minimum."""

import json
import math
import sys
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.config import freeze
from earl.config.sections import JudgeGate
from earl.files import images
from earl.judges import Judgement, Verdict, check, known_order
from earl.judges.known_order import Ranked
from earl.messages.errors import EarlError
from earl.shapes import world
from tests.support.evaluation_files import demo_config

BLANK = Judgement("x", *(np.zeros((4, 4, 3), np.uint8) for _ in range(3)))


def ranked(*ranks: float, example: str = "a") -> list[Ranked]:
    return [Ranked(example, rank, f"r{rank:g}", BLANK) for rank in ranks]


def gave(*scores: float | None) -> list[Verdict]:
    return [
        Verdict("failed", "", failure="no words") if one is None else Verdict("ok", "", *([one] * 4)) for one in scores
    ]


# Images


def test_the_shapes_world_gives_four_images_in_order_for_each_example():
    found = known_order.of_shapes(len(world.TASKS), seed=3)
    assert [(one.rank, one.label) for one in found[:4]] == [
        (0, "noise"),
        (1, "copy"),
        (2, "partial edit"),
        (3, "target"),
    ]
    for index in range(0, len(found), 4):
        _, copy, partial, target = (one.judgement.edited.astype(int) for one in found[index : index + 4])
        judged = found[index].judgement
        assert np.array_equal(copy, judged.original)
        assert np.array_equal(target, judged.target)
        assert 0 < np.abs(partial - copy).sum() < np.abs(target - copy).sum()
        assert 0 < np.abs(partial - target).sum() < np.abs(target - copy).sum()
    again = known_order.of_shapes(2, seed=3)
    assert np.array_equal(again[4].judgement.edited, found[4].judgement.edited)


def test_a_parquet_file_of_ones_own_is_read_as_it_was_written(tmp_path):
    found = known_order.of_shapes(2, seed=1)
    known_order.write(tmp_path / "pairs.parquet", found)
    read = known_order.read(tmp_path / "pairs.parquet")
    assert [(one.example_id, one.rank, one.label) for one in read] == [(o.example_id, o.rank, o.label) for o in found]
    assert np.array_equal(read[5].judgement.edited, found[5].judgement.edited)
    assert len(known_order.read(tmp_path / "pairs.parquet", examples=1)) == 4


def test_a_column_that_is_missing_is_named(tmp_path):
    known_order.write(tmp_path / "pairs.parquet", known_order.of_shapes(1, seed=1))
    pq.write_table(pq.read_table(tmp_path / "pairs.parquet").drop_columns("rank"), tmp_path / "pairs.parquet")
    with pytest.raises(EarlError, match=r"pairs\.parquet: column 'rank' is missing"):
        known_order.read(tmp_path / "pairs.parquet")


PICTURE = images.encode(np.zeros((8, 8, 3), np.uint8))


def pairs(**changes):
    """Columns of two images of an example as pandas would hold them."""
    cell = {"bytes": PICTURE, "path": None}
    columns = {
        "example_id": [7, 7],
        "rank": [0, 1],
        "instruction": ["add a cat"] * 2,
        "original": [cell] * 2,
        "edited": [cell] * 2,
    }
    return {name: values for name, values in (columns | changes).items() if values is not None}


def not_utf8(*values):
    lengths = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(lengths), pa.py_buffer(b"".join(values)))


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, ["rank 0", "rank 1"]),
        ({"label": [None, None], "target": [None, None]}, ["rank 0", "rank 1"]),
        ({"label": ["noise", None]}, ["noise", "rank 1"]),
        ({"label": pd.Categorical(["noise", "copy"])}, ["noise", "copy"]),
        ({"rank": [0.5, 1.5], "label": ["", "b"]}, ["rank 0.5", "b"]),
        ({"original": [PICTURE] * 2, "target": [{"bytes": PICTURE, "path": "x"}] * 2}, ["rank 0", "rank 1"]),
    ],
)
def test_pairs_are_read_as_pandas_writes_them(changes, labels, tmp_path):
    pd.DataFrame(pairs(**changes), index=[5, 9]).to_parquet(tmp_path / "pairs.parquet")
    found = known_order.read(tmp_path / "pairs.parquet")
    assert [(one.example_id, one.label) for one in found] == [("7", label) for label in labels]
    assert all((one.judgement.target is None) == ("target" not in changes or not changes["target"][0]) for one in found)
    assert found[1].rank == changes.get("rank", [0, 1])[1]


def test_pairs_of_arrow_types_are_read(tmp_path):
    key = uuid.UUID(int=5)
    columns = pairs(example_id=pa.array([key.bytes] * 2, pa.uuid()), label=[1, 0])
    table = pa.table(columns | {"edited": pa.array([PICTURE] * 2, pa.large_binary())})
    features = {"label": {"_type": "ClassLabel", "names": ["copy", "noise"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "pairs.parquet")
    found = known_order.read(tmp_path / "pairs.parquet")
    assert [(one.example_id, one.label) for one in found] == [(str(key), "noise"), (str(key), "copy")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, r"column 'rank' is missing; the file has example_id, instruction"),
        ({"rank": [0, math.nan]}, r"row 1, column 'rank': is nan; give a number"),
        ({"rank": ["low", "high"]}, r"row 0, column 'rank': is 'low'; give a number"),
        ({"example_id": ["a", None]}, r"row 1, column 'example_id': is None; give a text"),
        ({"instruction": ["add a cat", " \n"]}, r"row 1, column 'instruction': is empty"),
        ({"instruction": not_utf8(b"cat", b"\xff")}, r"row 1, column 'instruction': text is not UTF-8: .*0xff"),
        ({"label": not_utf8(b"\xff", b"cat")}, r"row 0, column 'label': text is not UTF-8"),
        ({"edited": [1, 2]}, r"row 0, column 'edited': is a int; give the bytes of an image"),
        ({"original": [None, None]}, r"row 0, column 'original': the image does not decode \(no bytes"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(changes, message, tmp_path):
    pq.write_table(pa.table(pairs(**changes)), tmp_path / "pairs.parquet")
    with pytest.raises(EarlError, match=rf"pairs\.parquet: {message}"):
        known_order.read(tmp_path / "pairs.parquet")


@pytest.mark.parametrize("changes", [{"rank": [1, 1]}, {"rank": [1, 1.0]}, {"example_id": ["a", "b"]}])
def test_pairs_without_an_order_are_refused_before_a_judge_is_asked(changes, tmp_path, monkeypatch):
    class Judge:
        def score(self, judgements):
            raise AssertionError("the judge was asked")

    monkeypatch.setattr(check.judges, "get", lambda config: Judge())
    pq.write_table(pa.table(pairs(**changes)), tmp_path / "pairs.parquet")
    gate = JudgeGate(pairs=str(tmp_path / "pairs.parquet"))
    with pytest.raises(EarlError, match=r"pairs\.parquet: .*at least two of one example, with different ranks"):
        check.run(demo_config(), gate)


def test_a_column_that_stands_twice_is_named(tmp_path):
    table = pa.table(pairs(label=["a", "b"]))
    pq.write_table(table.append_column("label", table.column("label")), tmp_path / "pairs.parquet")
    with pytest.raises(EarlError, match=r"pairs\.parquet: column 'label' stands twice in the file"):
        known_order.read(tmp_path / "pairs.parquet")


# Measures


def test_accuracy_and_correlation_by_hand():
    # Example a: 3 pairs, one of them the wrong way round. Example b: right, and one equal. Means over examples.
    images = [*ranked(0, 1, 2), *ranked(0, 1, 1, example="b")]
    found = check.measure(images, gave(1, 5, 3, 2, 2, 8), "viescore")
    assert (found["examples"], found["images"], found["pairs"]) == (2, 6, 5)
    assert found["accuracy"]["mean"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found["accuracy_by_pair"] == {"r1 > r0": pytest.approx(2.5 / 3), "r2 > r0": 1, "r2 > r1": 0}
    assert found["spearman"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["failed"] == 0


def test_failed_judgements_are_left_out_and_counted():
    found = check.measure(ranked(0, 1, 2, 3), gave(1, None, 3, 4), "viescore")
    assert (found["failed"], found["failed_fraction"], found["pairs"]) == (1, 0.25, 3)
    assert found["accuracy"]["mean"] == 1


def test_a_judge_that_scores_all_alike_is_half_right_and_has_no_correlation():
    found = check.measure(ranked(0, 1, 2), gave(5, 5, 5), "viescore")
    assert (found["accuracy"]["mean"], found["spearman"]) == (0.5, 0)


def test_nothing_to_compare_is_an_error_with_the_reasons():
    with pytest.raises(EarlError, match=r"1 of 2 judgements failed\n  no words"):
        check.measure(ranked(0, 1), gave(1, None), "viescore")


def test_costs_count_what_is_shared_once():
    request = {"question": "q", "attempt": 0, "continues": None, "tokens_in": 100, "tokens_out": 10, "seconds": 0.5}
    other = request | {"question": "r", "tokens_in": None, "tokens_out": 30}
    verdicts = [Verdict("ok", "", requests=[request]), Verdict("ok", "", requests=[request, other])]
    found = check.costs(verdicts, (2.0, 10.0))
    assert found == {
        "tokens_in_per_judgement": 50,
        "tokens_out_per_judgement": 20,
        "seconds_per_judgement": 0.5,
        "cost_per_judgement": pytest.approx((50 * 2 + 20 * 10) / 1e6),
    }


# The command


def test_the_program_judge_knows_its_world():
    found = check.run(demo_config(), JudgeGate(examples=28))
    # A copy and noise both score 0, which is right by half; everything else is in order.
    assert found["accuracy"]["mean"] > 0.9
    assert found["accuracy_by_pair"]["copy > noise"] == 0.5
    assert found["accuracy_by_pair"]["target > partial edit"] == 1
    assert found["spearman"] > 0.9
    assert "tokens_in_per_judgement" not in found


def test_the_command_prints_writes_and_stops_below_the_minimum(earl, tmp_path):
    freeze.write(demo_config(), tmp_path / "config.json")
    known_order.write(tmp_path / "pairs.parquet", known_order.of_shapes(7, seed=1))
    command = ["judge", "check", "--config", tmp_path / "config.json", "--pairs", tmp_path / "pairs.parquet"]
    done = earl(*command, "--out", tmp_path / "check.json")
    assert done.returncode == 0, done.stderr
    assert "pairwise accuracy" in done.stdout
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["judge"], found["examples"], found["failed_fraction"]) == ("program", 7, 0)
    done = earl(*command, "--minimum", "0.99", "--out", tmp_path / "none.json")
    assert done.returncode == 2
    assert "fewer than judge_gate.minimum_accuracy = 0.99" in done.stderr
    assert not (tmp_path / "none.json").exists()


def test_too_many_failures_stop_too():
    report = {"failed_fraction": 0.5, "images": 8, "accuracy": {"mean": 1.0}}
    with pytest.raises(EarlError, match=r"failed on 50\.0% of 8 images"):
        check.check(report, JudgeGate(), 0.05)


# The workflow


@pytest.mark.slow
def test_a_run_starts_only_behind_its_gate(workplace):
    gated = workplace.experiment("gated", judge_gate={"minimum_accuracy": 0.8}, num_iterations=1)
    workplace.run(gated, fails=True, earl_command=f"{sys.executable} -c 'raise SystemExit(2)'")
    assert not workplace.folder("gated").iteration(0).path.exists()
    workplace.run(gated)
    order = [line.split()[0] for line in workplace.stages()]
    assert order.index("judge") < order.index("start") < order.index("generate")
    workplace.run(gated)
    assert workplace.stages() == []


@pytest.mark.slow
def test_a_gate_that_is_set_later_makes_nothing_again(workplace):
    workplace.run(workplace.experiment("late", num_iterations=1))
    workplace.run(workplace.experiment("late", num_iterations=1, judge_gate={}))
    assert [line.split()[0] for line in workplace.stages()] in ([], ["judge"])
