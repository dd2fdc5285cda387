"""Requests on their way through the batches of vLLM's two model runners, for the tests of the grid constraint.

Imports vLLM, which takes seconds: to be imported by a test that runs, not where tests are collected.
"""

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from earl.emu3 import grid
from earl.engines import vllm_constraint

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
