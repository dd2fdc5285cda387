"""Who writes where: locks, writers that outlive a workflow, and processes that end with it."""

import errno
import getpass
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from earl.execution import processes
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import state
from tests.support import run_of_six


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of_six.write(tmp_path)


# Processes


def test_lock_names_its_holder_and_is_given_up_on_close(tmp_path):
    path = tmp_path / "lock"
    with processes.lock(path), pytest.raises(EarlError, match=f"process {os.getpid()} is writing here"):
        processes.lock(path, patience=0)
    processes.lock(path, patience=0).close()


def test_lock_is_given_up_by_a_killed_process(tmp_path):
    path = str(tmp_path / "lock")
    code = f"import time; from earl.execution import processes; held = processes.lock({path!r}); print(1, flush=True); "
    code += "time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(EarlError, match=f"process {holder.pid}"):
        processes.lock(tmp_path / "lock", patience=0)
    holder.kill()
    holder.communicate()
    processes.lock(tmp_path / "lock", patience=5).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_with_a_remedy(tmp_path, monkeypatch, number):
    def flock(stream, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(EarlError, match=rf"{tmp_path / 'lock'}: cannot be locked .* has no locks.*base_exp_dir"):
        processes.lock(tmp_path / "lock", patience=0)


def test_a_lock_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EarlError, match=r"file/lock: the lock cannot be made \((File exists|Not a directory)\); check"):
        processes.lock(tmp_path / "file" / "lock", patience=0)
    (tmp_path / "lock").mkdir()
    with pytest.raises(EarlError, match=r"lock: the lock cannot be made \(Is a directory\); check"):
        processes.try_lock(tmp_path / "lock")


def test_a_lock_on_a_full_disk_is_one_message(tmp_path):
    code = "import sys; from earl.execution import processes; from earl.messages.errors import EarlError\n"
    code += "try: processes.lock(sys.argv[1])\nexcept EarlError as error: print(error)"
    nothing = (resource.RLIMIT_FSIZE, (0, 0))  # what can be written to any file
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lock")], preexec_fn=lambda: resource.setrlimit(*nothing),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path / 'lock'}: cannot be locked (File too large); free space, then start again\n"


def test_a_user_without_a_name_gets_one(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    processes.name_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"


def test_stage_ends_with_the_workflow_that_started_it():
    stage = "import time; from earl.execution import processes; processes.end_with_workflow(); print(1, flush=True); "
    stage += "time.sleep(600)"
    workflow = (
        "import subprocess, sys, time; from earl.execution import processes; processes.end_stages_with_this_process();"
        f"subprocess.Popen([sys.executable, '-c', {stage!r}]); time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", workflow], stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"1\n"
    started.kill()
    started.communicate(timeout=60)  # the pipe closes only when the stage, too, has ended


# Writers that a killed workflow has left on a cluster


def test_stages_write_side_by_side_and_a_segment_alone(tmp_path):
    run = Run(tmp_path / "run")
    with state.writing(run, alone=False), state.writing(run, alone=False):
        assert processes.try_lock(run.path / ".writing.lock") is None
    with state.writing(run, alone=True):
        assert processes.try_lock(run.path / ".writing.lock", shared=True) is None


@pytest.mark.slow
def test_nothing_is_removed_below_a_job_that_writes(run):
    environment = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
    # Of one run, one command would wait for the other.
    other = Run(shutil.copytree(run.path, run.path.with_name("other"), symlinks=True))
    commands = [
        [sys.executable, "-m", "earl", "rewind", "--iteration", "5", "--run", str(run.path)],
        [sys.executable, "-m", "earl", "prune", "--run", str(other.path)],
    ]
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with state.writing(run, alone=False), state.writing(other, alone=False):
        # Side by side, since each of them waits a while for the job.
        for refused in [subprocess.Popen(command, **pipes) for command in commands]:
            _, said = refused.communicate(timeout=120)
            assert refused.returncode != 0
            assert f"process {os.getpid()} (stage on " in said
    for each in (run, other):
        assert (state.newest_complete(each), state.has_checkpoint(each.iteration(1))) == (6, True)
    for command in commands:
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


def test_what_lies_outside_of_the_run_may_always_be_written(tmp_path):
    run = Run(tmp_path / "run")
    with state.writing(run, alone=True), state.writing_to(tmp_path / "elsewhere.parquet", run):
        pass
    with state.writing_to(run.iteration(1).rollouts(0), run):
        assert processes.try_lock(run.path / ".writing.lock") is None
