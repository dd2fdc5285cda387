"""The executor with submitit's local cluster: jobs are processes of this machine, so nothing has to be installed."""

import os
import signal

import pytest

from tests.support.toy_workflow import Bench, kill, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(local_bench):
    return local_bench


def test_jobs_run_side_by_side_with_the_drivers_gpus(bench):
    # The driver may run in a job of Slurm.
    bench.env |= {"CUDA_VISIBLE_DEVICES": "3,5", "SLURM_JOB_ID": "7"}
    driver, _ = bench.start("out/a", "out/b"), bench.begun(2)
    bench.hurry()
    bench.ended(driver)
    assert sorted(bench.words()) == ["begin", "begin", "end", "end"]
    assert (bench.path / "logs" / "a.log").read_text() == "at work with GPUs 3,5\n"
    assert not list((bench.path / ".snakemake" / "submitit").iterdir())


def test_set_up_lines_run_first_and_a_setting_arrives_as_it_was_given(bench):
    word = r"""it's "a" \"b\" for $HOME, `pwd` [x]"""
    bench.ended(bench.start("word", "said", config=word, setup="export WORD=set"))
    assert (bench.path / "word").read_text() == "set\n"
    assert (bench.path / "said").read_text() == word


def test_what_a_job_left_that_ended_without_a_driver_is_removed_later(bench):
    driver, _ = bench.start(), bench.begun()
    kill(driver)
    bench.hurry()
    wait_until(lambda: list(bench.path.glob(".snakemake/submitit/*/*_result.pkl")))
    bench.ended(bench.start("word", setup="export WORD=set"))
    (result,) = bench.path.glob(".snakemake/submitit/*/*_result.pkl")
    os.utime(result, (1, 1))
    (bench.path / "word").unlink()
    bench.ended(bench.start("word", setup="export WORD=set"))
    assert not list((bench.path / ".snakemake" / "submitit").iterdir())


def test_a_job_that_is_killed_fails(bench):
    driver, _ = bench.start(), bench.begun()
    wait_until(lambda: "log: " in bench.said())
    (controller,) = (int(pid) for pid, command in bench.jobs().items() if "local._local" in command)
    os.kill(controller, signal.SIGTERM)
    os.kill(controller, signal.SIGINT)
    bench.ended(driver, status=1)
    assert "ended without a result" in bench.said()


def test_a_wrong_resource_is_refused_before_anything_runs(bench):
    bench.ended(bench.start("out/a", "fail", gpu="four"), status=1)
    assert "resource gpu='four' should be a number of GPUs" in bench.said()
    assert not bench.lines()


def test_debug_runs_jobs_in_the_foreground(tmp_path):
    bench = Bench(tmp_path, {}, "--submitit-cluster", "debug")
    bench.hurry()
    bench.ended(bench.start())
    assert bench.words() == ["begin", "end"]
    bench.ended(bench.start("fail"), status=1)
    assert "went wrong" in bench.said()
