"""The demo through the real workflow: killed again and again, it ends in the bytes of an undisturbed run by stage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl.execution import processes
from earl.files import manifest
from earl.files.layout import Run
from tests.support import bare_loop
from tests.support.demo import ROOT, SMALL


def workflow(base: Path) -> subprocess.Popen:
    """Start the workflow on the small demo, as a user would."""
    settings = {**SMALL, "base_exp_dir": str(base), "run_name": "killed"}
    overrides = json.dumps([f"{name}={value}" for name, value in settings.items()])
    command = [sys.executable, "-m", "snakemake", "--config", "experiment=config/demo.jsonnet", f"set={overrides}"]
    env = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(child: subprocess.Popen, pattern: str, base: Path) -> None:
    """Kill the workflow's main process, and it alone, once a file is there."""
    while not list(base.glob(pattern)):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    child.kill()
    child.communicate()  # ends when the last process that writes to the pipe has ended


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_bytes_of_an_undisturbed_run(small_config, tmp_path):
    # Of the same name, since files say whose they are.
    undisturbed = bare_loop.run_all(small_config("killed"))
    for moment in (
        "shared/logs/sft/*.log",
        "killed/iterations/000001/train/metrics.json",
    ):
        kill_when(workflow(tmp_path), moment, tmp_path)
    last = workflow(tmp_path)
    output = last.communicate()[0]
    assert last.returncode == 0, output
    run = Run(tmp_path / "killed")
    for index in (0, 2):
        assert manifest.digest_folder(run.iteration(index).policy) == manifest.digest_folder(
            undisturbed.iteration(index).policy
        )
        for name in ("heldout", "heldout_greedy"):
            found, expected = (r.evaluation(name, index).summary for r in (run, undisturbed))
            assert found.read_text() == expected.read_text()
    for index in (1, 2):
        assert run.iteration(index).metrics.read_text() == undisturbed.iteration(index).metrics.read_text()
    assert run.report.stat().st_size > 10_000
    assert not list(tmp_path.rglob(".*tmp-*")), "nothing half-written is left"
