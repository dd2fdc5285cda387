"""The command line as a process: what a user's mistake looks like."""

import os
import subprocess
import sys

import pytest


def earl(*arguments):
    return subprocess.run([sys.executable, "-m", "earl", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["score", "--config", "no.json", "--rollouts", "r.parquet", "--out", "s.parquet"], "no.json"),
        (["config", "show", "no.jsonnet"], "no.jsonnet"),
        (["config", "show", "config/demo.jsonnet", "--set", "learning_rat=1"], "learning_rate"),
        (["config", "show", "config/sft_s__rl_s.jsonnet"], "APP__"),
        (["generate", "--config", "c", "--iteration", "1", "--policy", "p", "--out", "o"], "--shard"),
        (["report", "--run", "no-run", "--out", "o.html"], "no-run"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, complaint, monkeypatch):
    for name in ("APP__DATA_DIR", "APP__BASE_EXP_DIR", "APP__RUN_NAME", "APP__REWARD_FUNCTION_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    done = earl(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resolved_configuration_says_where_values_come_from(tmp_path):
    done = earl("config", "show", "config/demo.jsonnet", "--set", "num_iterations=7")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "num_iterations" in line)
    assert "7" in line
    assert "--set" in line
    (tmp_path / "again.jsonnet").write_text(done.stdout)
    assert earl("config", "show", tmp_path / "again.jsonnet").returncode == 0


def test_a_folder_whose_name_is_no_unicode_can_be_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as locales other than C have it
    run = tmp_path / os.fsdecode(b"run-\xff")
    earl("config", "freeze", "config/demo.jsonnet", run / "config.json")
    done = earl("status", "--run", run)
    assert "Traceback" not in done.stderr
    assert r"run-\udcff: has not started" in done.stdout
    assert r"run-\udcff: has not started" in earl("verify", "--run", run).stderr


ENDING = """
import atexit, sys, threading, time
from earl import cli

class Global:
    def __del__(self):
        print("Python was taken down")

kept = Global()

def call(arguments):
    atexit.register(print, "what was registered")
    threading.Thread(target=lambda: time.sleep(0.1) or print("a thread")).start()
    if arguments:
        raise KeyError(arguments[0])
    return 3

cli.call = call
cli.main()
"""


def test_a_process_ends_after_threads_and_what_was_registered_and_then_at_once():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (3, ["a thread", "what was registered"]), done.stderr
    failed = subprocess.run([sys.executable, "-c", ENDING, "no"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "KeyError: 'no'" in failed.stderr
    assert "what was registered" in failed.stdout
