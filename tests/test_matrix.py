"""The ten experiments in the shapes world, cut down, from raw data to one table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import one_process
from earl.config import load
from earl.stages import compare

ROOT = Path(__file__).parent.parent
SMALL = {
    "heldout": 4,
    "sft_steps": 2,
    "num_iterations": 1,
    "episodes_per_iteration": 8,
    "generations_per_sample": 4,
    "engine_batch_size": 8,
    "rollout_shards": 1,
    # Two steps teach nobody to think: those who were made to would write until they may no more.
    "max_response_tokens": 96,
}
MAKEFILE = (ROOT / "Makefile").read_text()
NAMES = re.search(r"^MATRIX := ((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1].replace("\\", " ").split()


def test_make_matrix_names_all_ten():
    assert sorted(NAMES) == sorted(path.stem for path in (ROOT / "config" / "shapes").glob("sft_*.jsonnet"))
    assert len(NAMES) == 10


@pytest.mark.slow
def test_ten_experiments_give_ten_rows(tmp_path):
    runs = []
    for name in NAMES:
        path = ROOT / "config" / "shapes" / f"{name}.jsonnet"
        runs.append(one_process.run_all(load.load(path, {**SMALL, "base_exp_dir": str(tmp_path)}).config))
    shared = [folder.name.rpartition("-")[0] for folder in (tmp_path / "shared" / "sft").iterdir() if folder.is_dir()]
    assert sorted(shared) == ["s", "sc", "sc2stage", "think_s"]
    text = compare.run([str(run.path) for run in runs], tmp_path / "matrix.html", published=True)
    found = json.loads((tmp_path / "matrix.json").read_text())
    assert [entry["label"] for entry in found["entries"]] == [f"shapes_{name}" for name in NAMES]
    for entry in found["entries"]:
        assert {name: part["n"] for name, part in entry["evaluations"].items()} == {"simple": 4, "complex": 4}
    assert sum(line.startswith("| shapes_sft") for line in text.splitlines()) == 10 + 9, "and the changes of nine"
    assert len(found["published"]["rows"]) == 5
