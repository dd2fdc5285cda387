"""Fixtures of the executor's tests: a toy workflow on each kind of cluster."""

import pytest

from tests.support.toy_workflow import Bench, LocalBench, SlurmBench


@pytest.fixture
def slurm_bench(tmp_path, slurm):
    """The toy workflow on Slurm; its jobs are cancelled at the end."""
    bench = SlurmBench(tmp_path, slurm)
    yield bench
    for job in bench.jobs():
        slurm.call("scancel", job)
    bench.idle()


@pytest.fixture
def local_bench(tmp_path):
    """The toy workflow on this machine; no job of it may be left at the end."""
    bench = LocalBench(tmp_path)
    yield bench
    bench.hurry()
    bench.idle()


@pytest.fixture(params=["local", "slurm"])
def bench(request) -> Bench:
    """The toy workflow on either cluster."""
    return request.getfixturevalue(f"{request.param}_bench")
