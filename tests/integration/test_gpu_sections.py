"""Every section of the GPU check once, shrunk, on a CPU, with only what torch, transformers and peft bring.

The one of vLLM itself: see test_vllm_engine.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import learner, results, supervisor
from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.context import Context
from earl.estimate import memory
from earl.learner import grpo
from tests.support.make import make

ROOT = Path(__file__).parents[2]
ABSENT = (
    "pydantic",
    "pyarrow",
    "snakemake",
    "vllm",
    "flash_attn",
    "_jsonnet",
    "wandb",
    "submitit",
    "jinja2",
    "datasets",
)
"""Packages that a machine with torch and transformers may lack."""
VARIANTS = {"learner.padded": learner.padded, "learner.activations_kept": learner.activations_kept}
"""The same as `learner.packed` but for a setting; a process and an estimate of their own would take long."""
HIDE = f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""

TOGETHER = """
import os, sys
from benchmarks.gpu import section
from benchmarks.gpu.__main__ import SECTIONS
from earl.estimate import memory, simulation
memory.simulate = lambda cases: [simulation.run(case) for case in cases]  # which otherwise starts a process each time
path, *names = sys.argv[1:]
for each in SECTIONS:
    if each.name in names:
        assert section.main(each.name, each.function, "cpu", path, "3600", str(os.getppid())) == 0
"""


def check(out: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[results.Result]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "60", *arguments]
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done, results.Reader(out / supervisor.RESULTS).new()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Most sections, where packages are hidden: one as the check runs it, others in one process, to start it once."""
    hidden, out = tmp_path_factory.mktemp("hidden"), tmp_path_factory.mktemp("gpu")
    (hidden / "sitecustomize.py").write_text(HIDE)
    names = [section.name for section in SECTIONS if section.name not in {"vllm", *VARIANTS}]
    command = [sys.executable, "-c", TOGETHER, str(out / supervisor.RESULTS), *names]
    environment = {"PYTHONPATH": f"{hidden}:{ROOT}", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return check(out, "--only", "vllm", PYTHONPATH=str(hidden))


@pytest.mark.slow
def test_every_section_runs_without_other_packages(bare):
    done, found = bare
    assert [result for result in found if result.verdict == results.FAILED] == []
    assert done.returncode == 0, done.stderr
    assert {result.section for result in found} | VARIANTS.keys() == {section.name for section in SECTIONS}
    skipped = {(result.section, result.found) for result in found if result.verdict == results.SKIPPED}
    assert {section for section, _ in skipped} == {"learner.flash", "vllm"}
    assert ("vllm", "vllm is not installed here") in skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "check"),
    [
        ("environment", "bfloat16 product"),
        ("requirements", "deterministic gradient of masked attention"),
        ("tiny", "learner, packed: repeats itself"),
        ("tiny", "split learner repeats itself"),
        ("constraint", "vLLM's constraint: mask equal to the CPU's"),
        ("vision", "tokens that differ from the CPU's"),
        ("parity", "packed: mean difference"),
        ("learner.packed", "peak memory"),
        ("learner.packed", "price of determinism"),
        ("learner.lora", "rate"),
        ("handoff", "/dev/shm: written, hashed and sealed"),
        ("decode", "8 rows: rate"),
    ],
)
def test_each_section_comes_to_its_checks(bare, section, check):
    assert (section, check) in {(result.section, result.check) for result in bare[1]}


@pytest.mark.slow
def test_sampler_and_learner_are_near_each_other_in_bfloat16(bare):
    """What `parity` and `tiny` compare is the same policy: random numbers would differ by nats."""
    gaps = [
        result.value
        for result in bare[1]
        if "differ" in result.check and result.found.partition(",")[0].endswith("nats")
    ]
    assert len(gaps) == 5
    assert all(gap < 0.3 for gap in gaps)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_learner(name, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "learner", lambda *_: memory.Memory({"overhead": 0}, at_rest=1, peak=2))
    path = tmp_path / supervisor.RESULTS
    VARIANTS[name](Context(name, True, path, end=float("inf")))
    found = {result.check: result for result in results.Reader(path).new()}
    assert found.keys() >= {"layers", "peak memory", "seconds a step", "rate"}
    assert {result.verdict for result in found.values()} == {results.MEASURED}


def test_where_memory_does_not_suffice_fewer_layers_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "learner", lambda *_: memory.Memory({"overhead": 0}, at_rest=1, peak=2))
    whole = grpo.train_iteration

    def too_much(policy, *arguments, **options):
        if policy.config.num_hidden_layers > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return whole(policy, *arguments, **options)

    monkeypatch.setattr(grpo, "train_iteration", too_much)
    path = tmp_path / supervisor.RESULTS
    learner.packed(Context("learner.packed", True, path, end=float("inf")))
    first, second, *_ = results.Reader(path).new()
    assert (first.check, first.verdict) == ("memory", results.FAILED)
    assert first.found.startswith("2 layers: OutOfMemoryError: CUDA out of memory")
    assert (second.check, second.value) == ("layers", 1.0)


@pytest.mark.slow
def test_without_a_gpu_nothing_but_the_environment_is_tried(tmp_path):
    done, found = check(tmp_path, "--device", "cuda", "--only", "environment,tiny", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert results.table(found) in done.stdout
    assert "name --device cpu" in done.stdout
    assert "environment says that nothing can be run here" in done.stdout


def test_a_section_that_there_is_not_is_refused(tmp_path):
    done, _ = check(tmp_path, "--only", "learner,speed")
    assert done.returncode == 2
    assert "there is no section 'speed'" in done.stderr


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ([], "--minutes 10 --device cuda --out runs/gpu-check"),
        (["ONLY=learner,tiny", "MINUTES=4"], "--only learner,tiny --minutes 4 --device cuda --out runs/gpu-check"),
        (["DEVICE=cpu", "RUNS=/scratch"], "--minutes 10 --device cpu --out /scratch/gpu-check"),
    ],
)
def test_make_passes_on_what_it_is_given(tmp_path, given, asked):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = make(tmp_path, "--dry-run", "gpu", f"PYTHON={sys.executable}", *given)
    assert done.returncode == 0, done.stderr
    _, _, options = done.stdout.replace("\\\n", " ").partition(" -m benchmarks.gpu ")
    assert options.split() == asked.split()
