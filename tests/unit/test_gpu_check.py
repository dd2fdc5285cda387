"""The GPU check's frame: sections that hang, crash or raise leave the others, and what they said, as they were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import environment, results, supervisor
from benchmarks.gpu.results import Range, Result
from benchmarks.gpu.supervisor import Section
from earl.execution import processes


def section(name: str, seconds: float = 600) -> Section:
    return Section(name, f"tests.support.gpu_sections:{name}", seconds)


def run(out: Path, *names: str, **more) -> list[Result]:
    return list(supervisor.run([section(name) for name in names], "cpu", out, 6000, **more))


def summary(found: list[Result]) -> list[tuple[str, str, str]]:
    return [(result.section, result.check, result.verdict) for result in found]


def test_a_crash_and_an_error_leave_the_other_sections_and_what_was_said_before(tmp_path):
    found = run(tmp_path, "crashes", "raises", "fine")
    assert summary(found) == [
        ("crashes", "before", "measured"),
        ("crashes", "process", "FAILED"),
        ("raises", "before", "measured"),
        ("raises", "first", "FAILED"),
        ("raises", "section", "FAILED"),
        ("fine", "rate", "measured"),
        ("fine", "sum", "ok"),
    ]
    assert found[1].found == f"was ended by SIGSEGV; see {tmp_path / 'crashes.log'}: last words"
    assert [found[3].found, found[4].found] == ["RuntimeError: kernel refused", "ValueError: nothing left"]
    assert found[5].value == 12.5


def test_a_section_whose_time_is_up_is_ended_with_all_that_it_started(tmp_path):
    """The clock jumps as soon as the section has said what it had to say."""
    path = tmp_path / supervisor.RESULTS
    found = run(tmp_path, "hangs", "fine", clock=lambda: 1000.0 if path.is_file() else 0.0)
    assert summary(found)[:2] == [("hangs", "child", "measured"), ("hangs", "process", "FAILED")]
    assert found[1].found == f"did not end within 600 s; see {tmp_path / 'hangs.log'}"
    assert not processes.is_alive(int(found[0].found))
    assert summary(found)[2:] == [("fine", "rate", "measured"), ("fine", "sum", "ok")]


def test_sections_for_which_no_time_is_left_are_named(tmp_path):
    path = tmp_path / supervisor.RESULTS
    found = run(tmp_path, "fine", "skips", clock=lambda: 5995.0 if path.is_file() else 0.0)
    assert summary(found)[-1] == ("skips", "section", "skipped")
    assert found[-1].found == "no time was left; run it by itself: --only skips"


def test_what_cannot_run_here_is_skipped_with_the_reason(tmp_path):
    found = run(tmp_path, "skips", "lacks")
    assert {result.verdict for result in found} == {"skipped"}
    assert [result.found for result in found] == [
        "no such kernel here",
        "not on this card",
        "needs a_package_that_nobody_has, which is not installed here",
    ]


def test_where_nothing_can_run_the_others_are_not_tried(tmp_path):
    found = run(tmp_path, "stops", "fine")
    assert summary(found) == [("stops", "section", "FAILED"), ("fine", "section", "skipped")]


def test_results_are_added_to_the_file_and_a_later_call_reports_its_own(tmp_path):
    first = run(tmp_path, "fine")
    assert run(tmp_path, "fine") == first
    lines = (tmp_path / supervisor.RESULTS).read_text().splitlines()
    assert [json.loads(line)["check"] for line in lines] == ["rate", "sum"] * 2


@pytest.mark.parametrize(
    ("expected", "value", "holds", "text"),
    [
        (Range(low=40), 40, True, "at least 40 GB/s"),
        (Range(low=40), 39.9, False, "at least 40 GB/s"),
        (Range(high=0.5), 0.51, False, "at most 0.5 GB/s"),
        (Range(30, 36.5), 36.5, True, "30 to 36.5 GB/s"),
    ],
)
def test_a_range_says_what_it_holds(expected, value, holds, text):
    assert (expected.holds(value), expected.text("GB/s")) == (holds, text)


def test_a_table_cell_stays_one_cell():
    row = results.table([Result("a", "b|c", "", "two\nlines", "ok")]).splitlines()[-1]
    assert row == "| a | b\\|c |  | two lines | ok |"


def test_the_supervisor_imports_nothing_that_may_be_broken():
    program = "import sys, benchmarks.gpu.__main__; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=supervisor.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GH200 480GB", 989),
        ("Tesla V100", None),
    ],
)
def test_a_card_is_known_by_its_name(name, teraflops):
    assert environment.specification(name) == teraflops
