"""What a phase took: its own peak, whatever the process had before and whatever lies in it."""

from pathlib import Path

import pytest
import torch

from earl.learner import performance
from earl.learner.performance import Clock

CPU = torch.device("cpu")
MIB = 2**20


def hold(mebibytes: int) -> None:
    assert torch.full((mebibytes * MIB // 8,), 1.0, dtype=torch.float64).sum() > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak cannot be reset here")
def test_a_phase_has_a_peak_of_its_own():
    hold(400)
    clock = Clock(CPU)
    for size in (100, 200, 50):
        with clock.phase("twice" if size < 200 else "once"):
            hold(size)
    low, high = clock.peaks["twice"], clock.peaks["once"]
    assert 80 * MIB < high - low < 120 * MIB
    assert list(clock.seconds) == list(clock.peaks) == ["twice", "once"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak cannot be reset here")
def test_a_phase_counts_what_lies_in_it_and_what_came_before_that():
    outer, inner = Clock(CPU), Clock(CPU)
    with outer.phase("early"):
        hold(300)
        with inner.phase("inside"):
            hold(100)
    with outer.phase("late"):
        with inner.phase("inside, large"):
            hold(300)
        hold(100)
    assert inner.peaks["inside"] < outer.peaks["early"] - 150 * MIB
    assert outer.peaks["late"] >= inner.peaks["inside, large"]
    assert abs(outer.peaks["late"] - outer.peaks["early"]) < 60 * MIB


def test_a_phase_that_fails_counts_too():
    clock = Clock(CPU)
    with pytest.raises(ValueError, match="no"), clock.phase("x"):
        raise ValueError("no")
    assert clock.peaks["x"] > 0
    assert Clock._open == []


def test_the_summary_has_each_rank_s_peak_and_each_phase_s():
    seconds = {"read": 1.0, "forward": 2.0, "step": 2.0}
    peaks = [{"read": 5, "forward": 7, "step": 3}, {"read": 6, "forward": 6, "step": 9}]
    found = performance.summary(seconds, peaks, 80, CPU)
    assert (found["ranks"], found["tokens_per_second"]) == (2, 20.0)
    assert found["peak_memory_bytes"] == [7, 9]
    assert found["peak_memory_bytes_by_phase"] == {"read": 6, "forward": 7, "step": 9}


def test_on_a_gpu_a_phase_has_a_peak_of_its_own(monkeypatch):
    """torch counts the most since the counter was reset."""
    peak = {"now": 700}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["now"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = Clock(torch.device("cuda"))
    for name, taken in (("large", 300), ("small", 100)):
        with clock.phase(name):
            peak["now"] = max(peak["now"], taken)
    assert clock.peaks == {"large": 300, "small": 100}
