"""The grid constraint of `earl.emu3.grid` in vLLM, behind either of its two interfaces for logits processors.

GPUs run vLLM's Model Runner V2, whose processors see tokens and positions on the device; CPUs run V1, whose processors
see each request's output as a list on the host. Both classes keep, for a slot of the batch, the grid and the place of
``img``, and turn the distance from it into a kind. A request says in ``SamplingParams.extra_args`` which grid it is
held to (`extra_args`); one that says nothing is free.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from earl.emu3 import grid
from earl.emu3.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

KEY = "emu3_grid"
_LAST = itemgetter(-1)
_BEFORE_IMG = 2**40
"""Larger than any number of tokens, so that the place is 0."""


def extra_args(size: tuple[int, int]) -> dict[str, list[int]]:
    """Return what a request's ``SamplingParams.extra_args`` must hold to be held to a grid of H x W visual tokens."""
    return {KEY: [int(side) for side in size]}


def _grid_of(params: "SamplingParams") -> tuple[int, int]:
    """Return (H, W) of a request, or (0, 0) for one that is free."""
    height, width = (params.extra_args or {}).get(KEY, (0, 0))
    return height, width


def _validate(params: "SamplingParams") -> None:
    size = (params.extra_args or {}).get(KEY)
    well_formed = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if size is not None and not well_formed:
        raise ValueError(f"extra_args[{KEY!r}] is {size!r}; it must be [rows, columns], both at least 1")


class GridConstraintV1(V1LogitsProcessor):
    """For the V1 model runner. Slot and row of the batch are the same.

    The kinds of all places of a completion are looked up when its request joins, so that a step costs a handful of
    array operations: on a CPU each costs microseconds, and more where the model has swept the caches.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.scheduler_config.async_scheduling:
            raise ValueError("the V1 grid constraint reads sampled tokens on the host; set async_scheduling to False")
        slots, length = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        vocabulary = Vocabulary.from_folder(vllm_config.model_config.model)
        self.img = vocabulary.img
        forbidden = grid.forbidden_table(vocabulary, vllm_config.model_config.get_vocab_size())
        # To add is several times as fast as to fill on a CPU; x + 0 is x, bit for bit.
        self.masks = torch.zeros(forbidden.shape).masked_fill(forbidden, -torch.inf).to(device)
        self.free = len(forbidden) + grid.FREE
        self.slots = np.arange(slots)
        self.kinds_of_slots = np.zeros((slots, length + 1), dtype=np.int64)
        """Kinds by place: 0 is any before ``img``, 1 the first after it."""
        self.offsets = np.zeros(slots, dtype=np.int64)
        """What to subtract from the number of tokens generated to get the place; `_BEFORE_IMG` before it."""
        self.searching = np.zeros(0, dtype=np.int64)
        """Slots that have not seen ``img``."""
        self.outputs: list[list[int]] = [[] for _ in range(slots)]
        """vLLM's own lists, which grow as tokens are sampled."""

    @classmethod
    def validate_params(cls, params: "SamplingParams") -> None:
        _validate(params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._clear(slot)
        for slot, params, _, output in batch_update.added:
            self._add(slot, _grid_of(params), output)
        for source, target, direction in batch_update.moved:
            for state in (self.kinds_of_slots, self.offsets):
                state[[source, target]] = state[[target, source]]
            self.outputs[source], self.outputs[target] = self.outputs[target], self.outputs[source]
            if direction is MoveDirectionality.UNIDIRECTIONAL:
                self._clear(source)
        self.searching = np.flatnonzero(self.offsets == _BEFORE_IMG)

    def _add(self, slot: int, size: tuple[int, int], output: list[int]) -> None:
        self.outputs[slot] = output
        if not all(size):
            self.kinds_of_slots[slot], self.offsets[slot] = self.free, 0
            return
        self.kinds_of_slots[slot] = grid.kind_at(np.arange(-1, self.kinds_of_slots.shape[1] - 1), *size)
        # A request that was preempted comes back with what it had generated.
        self.offsets[slot] = output.index(self.img) if self.img in output else _BEFORE_IMG

    def _clear(self, slot: int) -> None:
        self.kinds_of_slots[slot], self.offsets[slot], self.outputs[slot] = self.free, 0, []

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        kinds = torch.from_numpy(self.kinds(len(logits)))
        return logits.add_(self.masks.index_select(0, kinds.to(logits.device)))

    def kinds(self, rows: int) -> np.ndarray:
        """Return int64 [rows]: the row of the mask table, that is the kind, that each row of the batch is held to."""
        lengths = np.fromiter(map(len, self.outputs), np.int64, rows)
        if len(self.searching):
            self._search(lengths)
        places = np.maximum(lengths - self.offsets[:rows], 0)
        return self.kinds_of_slots[self.slots[:rows], places]

    def _search(self, lengths: np.ndarray) -> None:
        """Look whether ``img`` was the last token of those that have not seen it."""
        speaking = self.searching[lengths[self.searching] > 0]
        last = np.fromiter(map(_LAST, map(self.outputs.__getitem__, speaking.tolist())), np.int64, len(speaking))
        found = speaking[last == self.img]
        if len(found):
            self.offsets[found] = lengths[found] - 1
            self.searching = np.flatnonzero(self.offsets == _BEFORE_IMG)


class GridConstraintV2(V2LogitsProcessor):
    """For Model Runner V2. All but the arrival of a request happens on the device, and the host waits for nothing."""

    def __init__(self, vllm_config: "VllmConfig", req_states: "LogitsProcRequestState") -> None:
        vocabulary = Vocabulary.from_folder(vllm_config.model_config.model)
        device, slots = req_states.device, req_states.max_num_reqs
        self.requests = req_states
        self.img = vocabulary.img
        self.forbidden = grid.forbidden_table(vocabulary, req_states.vocab_size).to(device)
        self.grids = torch.zeros(slots, 2, dtype=torch.int64, device=device)
        self.image_places = torch.full((slots,), -1, dtype=torch.int64, device=device)
        """Place of ``img`` in a request's whole sequence; -1 before it."""
        self._arrived: dict[int, tuple[int, int]] = {}

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        _validate(sampling_params)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        self._arrived[req_idx] = _grid_of(sampling_params)
        return True

    def apply_staged_writes(self) -> None:
        if not self._arrived:
            return
        device = self.grids.device
        # New tensors each time: a copy to the device may still be reading those of the last.
        slots = torch.tensor(list(self._arrived)).to(device, non_blocking=True)
        self.grids[slots] = torch.tensor(list(self._arrived.values())).to(device, non_blocking=True)
        self._arrived.clear()
        # A request that was preempted comes back with what it had generated, behind its prompt.
        tokens = self.requests.all_token_ids.gpu[slots]
        places = torch.arange(tokens.shape[1], device=device)
        generated = places >= self.requests.prompt_len.gpu[slots, None]
        found = generated & (places < self.requests.prefill_len.gpu[slots, None]) & (tokens == self.img)
        self.image_places[slots] = torch.where(found.any(1), found.int().argmax(1), -1)

    def apply(self, logits: torch.Tensor, ctx: "LogitsContext") -> torch.Tensor:
        return logits.masked_fill_(self.forbidden[self.kinds(ctx)], -torch.inf)

    def kinds(self, ctx: "LogitsContext") -> torch.Tensor:
        """Return int64 [rows]: the kind that each row is held to."""
        slots = ctx.expanded_idx_mapping
        places = self.image_places[slots]
        here = (ctx.input_ids == self.img) & (ctx.pos >= self.requests.prompt_len.gpu[slots]) & (places < 0)
        places = torch.where(here, ctx.pos.long(), places)
        self.image_places[slots] = places
        k = torch.where(places >= 0, ctx.pos - places, -1)
        height, width = self.grids[slots].unbind(1)
        return torch.where(height > 0, grid.kind_at(k, height, width), grid.FREE)
