"""Workers that have GPUs of their own: names of GPUs in the environment, on a machine that need not have any."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from earl.execution import processes
from tests.integration.test_workers import Workplace, expected, locks, score, wait_until, workplace  # noqa: F401

SHOW = [sys.executable, "-c", "import os; print('shown', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"]


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("p")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("TMPDIR", str(folder))
    with workplace(folder) as place:
        yield place


def launch(place: Workplace, command: list[object], gpu: int, **env: str) -> subprocess.Popen:
    words = ["launch", "--launcher", "local", "--name", "stage", "--folder", Path(place.pool.path) / "none"]
    return place.start(*words, "--resource", f"gpu={gpu}", "--", *command, **env)


def launched(place: Workplace, command: list[object], gpu: int, **env: str) -> str:
    child = launch(place, command, gpu, **env)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return out + err


def stage(arguments: list[object]) -> list[object]:
    return [sys.executable, "-m", "earl", *arguments]


def shown_to(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(value.partition("=")[2] for value in variables if value.startswith("CUDA_VISIBLE_DEVICES="))


def test_a_worker_keeps_its_gpu_and_gives_it_up_when_it_has_no_work(place, expected, tmp_path):  # noqa: F811
    out = tmp_path / "scores.parquet"
    launched(place, stage(score(expected, out)), gpu=1)
    worker = place.worker("judge.gpus1-0")
    assert shown_to(worker) == "4"
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
    assert "shown 7" in launched(place, SHOW, gpu=1), "the first GPU is the worker's"
    launched(place, stage(score(expected, out)), gpu=1)
    assert place.worker("judge.gpus1-0") == worker
    # More than are free: a worker without work goes.
    assert "shown 4,7" in launched(place, SHOW, gpu=2)
    assert not processes.is_alive(worker)
    launched(place, stage(score(expected, out)), gpu=2)
    assert shown_to(place.worker("judge.gpus2-0")) == "4,7"
    child = launch(place, stage(score(expected, out)), gpu=3)
    assert "3 GPUs are asked for where 2 are visible" in child.communicate(timeout=60)[1]
    assert child.returncode == 2


def test_of_two_workers_the_one_used_last_stays(place, expected, tmp_path):  # noqa: F811
    judge = stage(score(expected, tmp_path / "scores.parquet"))
    launched(place, judge, gpu=1)
    wrong = ["generate", "--config", "no.json", "--iteration", 1, "--shard", 0, "--policy", "p", "--out", "o"]
    assert launch(place, stage(wrong), gpu=1).wait(timeout=60) == 2
    launched(place, judge, gpu=1)
    for _ in range(2):
        assert "shown 7" in launched(place, SHOW, gpu=1)
        assert place.worker("judge.gpus1-0")


def test_a_worker_at_work_keeps_its_gpu(place, expected, tmp_path):  # noqa: F811
    out = tmp_path / "scores.parquet"
    arguments = [str(word) for word in score(expected, out)]
    with place.pool.writing(arguments):
        client = launch(place, stage(arguments), gpu=2)
        wait_until(lambda: list(Path(place.pool.path).glob("judge.gpus2-0.json")))
        waiting = launch(place, SHOW, gpu=1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
        assert (client.poll(), waiting.poll()) == (None, None)
    for child in (client, waiting):
        said = child.communicate(timeout=60)
        assert child.returncode == 0, said
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()


@pytest.mark.parametrize("visible", ["4,7", ""])
def test_a_worker_that_is_killed_leaves_its_gpus_to_the_stage(place, expected, tmp_path, visible):  # noqa: F811
    """Or whatever there is, on a machine without any."""
    out = tmp_path / "scores.parquet"
    arguments = [str(word) for word in score(expected, out)]
    launched(place, stage(arguments), gpu=2, CUDA_VISIBLE_DEVICES=visible)
    worker = place.worker("judge.gpus2-0")
    out.unlink()
    with place.pool.writing(arguments):
        client = launch(place, stage(arguments), gpu=2, CUDA_VISIBLE_DEVICES=visible)
        wait_until(lambda: any("-> POSIX" in line and str(worker) in line.split() for line in locks()))
        os.kill(worker, signal.SIGKILL)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 0, said
    assert "going on without it" in said
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
