"""The demo through the real workflow: killed again and again, it ends in the bytes of a run in one process.

Its stages run in workers, which end with a workflow that is killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl.files import manifest
from earl.run.layout import Run
from tests.support import bare_loop
from tests.support.demo import SMALL

ROOT = Path(__file__).parents[2]


def workflow(base: Path, temporary: Path, *options: str) -> subprocess.Popen:
    """Start the workflow on the small demo, as a user would; its pool of workers is in ``temporary``."""
    settings = {**SMALL, "base_exp_dir": str(base), "run_name": "killed"}
    overrides = json.dumps([f"{name}={value}" for name, value in settings.items()])
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--config"]
    command += ["experiment=config/demo.jsonnet", f"set={overrides}", *options]
    env = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(child: subprocess.Popen, pattern: str, base: Path, temporary: Path) -> None:
    """Kill the workflow's main process, and it alone, once a file is there."""
    while not list(base.glob(pattern)):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    assert len(pools(temporary)) == 1, "stages run in workers"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    # The last worker takes the pool along.
    while pools(temporary):
        time.sleep(0.02)


def pools(temporary: Path) -> list[Path]:
    return list(temporary.glob("earl-workers-*"))


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_bytes_of_an_undisturbed_run(small_config, tmp_path, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("t")
    # Of the same name, since files say whose they are.
    undisturbed = bare_loop.run_all(small_config("killed"))
    for moment in (
        "shared/tokenised/*/manifest.json",
        "shared/logs/sft/*.log",
        "killed/iterations/000001/rollouts/*.parquet",
        "killed/iterations/000002/policy",
    ):
        kill_when(workflow(tmp_path, temporary), moment, tmp_path, temporary)
    last = workflow(tmp_path, temporary)
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
    assert not pools(temporary)
