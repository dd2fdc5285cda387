"""Programs that tests fork are as those that Python starts."""

import os
import select
import signal
import subprocess
import sys

import pytest

from tests.support import forked
from tests.support.demo import DEMO

ARGUMENTS = ["--config", "config.json", "--rollouts", "none.parquet", "--out", "none"]


@pytest.mark.slow
def test_status_output_folder_and_environment_pass_through(tmp_path):
    """To and from a program forked by command; one that cannot be forked is Python's own."""
    (tmp_path / "a.jsonnet").write_text(f"(import '{DEMO}') + {{ run_name: std.extVar('APP__NAME') }}")
    commands = [
        ["-u", "-m", "earl", "config", "show", "a.jsonnet"],
        ["-m", "earl", "config", "show", "none.jsonnet"],
        ["-m", "json.tool", "--help"],
        ["-c", "import os, sys; print(os.getcwd(), os.environ['APP__NAME']); sys.exit(3)"],
    ]
    done = {}
    for python in (sys.executable, forked.python("earl")):
        for command in commands:
            env = os.environ | {"APP__NAME": "found", "PYTHONPATH": str(forked.ROOT)}
            found = subprocess.run([python, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
            done.setdefault(" ".join(command), []).append((found.returncode, found.stdout, found.stderr))
    for command, (alone, warm) in done.items():
        assert alone == warm, command
    assert [found[0][0] for found in done.values()] == [0, 2, 0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_forked_program(tmp_path, number):
    os.mkfifo(tmp_path / "config.json")
    client = subprocess.Popen([forked.python("earl"), "-m", "earl", "score", *ARGUMENTS], cwd=tmp_path)
    with open(tmp_path / "config.json", "w") as written:  # Once the program reads.
        client.send_signal(number)
        assert client.wait(60) == -number
        closed = select.poll()
        closed.register(written, select.POLLERR)
        assert closed.poll(60_000), "nobody reads any more"


@pytest.mark.slow
def test_what_nobody_waits_for_is_killed(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    started = forked.Forked("earl", ["score", *ARGUMENTS], cwd=tmp_path)
    with open(tmp_path / "config.json", "w") as written:
        del started
        closed = select.poll()
        closed.register(written, select.POLLERR)
        assert closed.poll(60_000), "nobody reads any more"
