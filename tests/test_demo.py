"""The demo through the real workflow: killed again and again, it ends in the bytes of a run in one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import one_process
from earl.files import manifest
from earl.layout import Run
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent


def workflow(base: Path, *options: str) -> subprocess.Popen:
    """Start the workflow on the small demo, as a user would."""
    settings = {**SMALL, "base_exp_dir": str(base), "run_name": "killed"}
    overrides = json.dumps([f"{name}={value}" for name, value in settings.items()])
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--config"]
    command += ["experiment=config/demo.jsonnet", f"set={overrides}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(child: subprocess.Popen, pattern: str, base: Path) -> None:
    """Kill the workflow's main process, and it alone, once a file is there."""
    while not list(base.glob(pattern)):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_bytes_of_an_undisturbed_run(small_config, tmp_path):
    undisturbed = one_process.run_all(small_config("plain"))
    for moment in (
        "shared/tokenised/*/manifest.json",
        "shared/logs/sft/*.log",
        "killed/iterations/000001/rollouts/*.parquet",
        "killed/iterations/000002/.policy*",
    ):
        kill_when(workflow(tmp_path), moment, tmp_path)
    last = workflow(tmp_path)
    output = last.communicate()[0]
    assert last.returncode == 0, output
    run = Run(tmp_path / "killed")
    for index in (0, 1, 2):
        assert manifest.digest_folder(run.iteration(index).policy) == manifest.digest_folder(
            undisturbed.iteration(index).policy
        )
    for name in ("heldout", "heldout_greedy"):
        for index in (0, 2):
            found, expected = (r.evaluation(name, index).summary for r in (run, undisturbed))
            assert found.read_text() == expected.read_text()
    assert run.report.stat().st_size > 10_000
    assert not list(tmp_path.rglob(".*tmp-*")), "nothing half-written is left"
