"""`make matrix` as it is called, cut down: the ten experiments in the shapes world, from raw data to one table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from earl.execution import processes
from tests.support.html import Page

ROOT = Path(__file__).parents[2]
SMALL = {
    "heldout": 4,
    "sft_steps": 2,
    "episodes_per_iteration": 8,
    "generations_per_sample": 4,
    "engine_batch_size": 8,
    # Two steps teach nobody to think: those who were made to would write until they may no more.
    "max_response_tokens": 96,
}
MAKEFILE = (ROOT / "Makefile").read_text()
NAMES = re.search(r"^MATRIX := ((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1].replace("\\", " ").split()


def make_matrix(runs: Path) -> str:
    """Run the target with this Python's packages, into another folder; return what it prints."""
    command = ["make", "matrix", f"VENV={sys.prefix}", f"RUNS={runs}", "ITERATIONS=1"]
    # What is installed here may be older than pyproject.toml, and is not for a test to change.
    command += ["--old-file", f"{sys.prefix}/.installed"]
    command.append("SET=" + " ".join(f"{field}={value}" for field, value in SMALL.items()))
    # Neither what the `make` around the tests was called with, nor whose process it shall end with.
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", processes.WATCHED)}
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_matrix_names_all_ten():
    assert sorted(NAMES) == sorted(path.stem for path in (ROOT / "config" / "shapes").glob("sft_*.jsonnet"))
    assert len(NAMES) == 10


@pytest.mark.slow
def test_make_matrix_goes_from_raw_data_to_ten_rows(tmp_path):
    text = make_matrix(tmp_path)
    shared = [folder.name.rpartition("-")[0] for folder in (tmp_path / "shared" / "sft").iterdir() if folder.is_dir()]
    assert sorted(shared) == ["s", "sc", "sc2stage", "think_s"]
    labels = [f"shapes_{name}" for name in NAMES]
    found = json.loads((tmp_path / "matrix.json").read_text())
    assert [entry["label"] for entry in found["entries"]] == labels
    for entry in found["entries"]:
        assert {name: part["n"] for name, part in entry["evaluations"].items()} == {"simple": 4, "complex": 4}
        assert all(entry["start"].values()), "the policy it started from was evaluated too"
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| shapes_sft")]
    assert rows == [*labels, *labels[1:], *labels], "means, changes from the first, changes in training"
    assert len(found["published"]["rows"]) == 7, "five of the paper, two of model cards"
    html = (tmp_path / "matrix.html").read_text()
    assert Page(html).open == []
    charts = re.findall(r'<svg class="chart dots".*?</svg>', html)
    assert [all(label in chart for label in labels) for chart in charts] == [True, True], "simple and complex"
