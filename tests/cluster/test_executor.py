"""The executor on this machine and on a real Slurm, with a toy workflow: what holds on either cluster."""

import signal

import pytest

from tests.support.toy_workflow import kill

pytestmark = pytest.mark.slow


def test_a_killed_driver_finds_its_jobs_again(bench):
    driver, _ = bench.start(), bench.begun()
    kill(driver)
    driver = bench.start()
    bench.waits_for(": found running")
    bench.hurry()
    bench.ended(driver)
    assert bench.words() == ["begin", "end"]


def test_another_command_for_the_same_output_begins_when_the_first_is_gone(bench):
    driver, [[job, *_]] = bench.start(), bench.begun()
    kill(driver)
    driver = bench.start(config="other")
    _, (another, *_) = bench.begun(2)
    assert another != job or job == "-", "Slurm's has another number"
    bench.hurry()
    bench.ended(driver)
    assert bench.words() == ["begin", "begin", "end"]


def test_an_interrupted_driver_cancels(bench):
    driver, _ = bench.start("out/a", "out/b"), bench.begun(2)
    driver.send_signal(signal.SIGINT)
    bench.ended(driver, status=1)
    bench.idle()
    assert bench.words() == ["begin", "begin"]


def test_a_job_that_fails_without_a_log_of_its_rule_shows_what_it_printed(bench):
    bench.ended(bench.start("fail"), status=1)
    assert "exit status 1; its log: " in bench.said()
    assert "went wrong" in bench.said()
