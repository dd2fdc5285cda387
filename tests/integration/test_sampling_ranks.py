"""Each rank of a segment samples with a vLLM of its own: the same completions as one process.

The torch engine on ranks: see test_iterate.py.
"""

import json

import pytest

from tests.support import forked_ranks, policies, sampling_program


@pytest.mark.slow
def test_ranks_sample_what_one_process_samples(vllm_engine, policy_folder, tmp_path):
    other = policies.write(tmp_path / "other", policies.be_picky, seed=1)
    for name in ("alone", "ranks"):
        (tmp_path / name).mkdir()
    forked_ranks.launch(2, sampling_program.__name__, policy_folder, other, tmp_path / "ranks")
    sampling_program.sample_by(vllm_engine, policy_folder, other, tmp_path / "alone")
    found = {
        name: [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("alone", "ranks")
    }
    assert found["ranks"] == found["alone"]
    for first, updated, again in found["ranks"]:
        assert first == again != updated
