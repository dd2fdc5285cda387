"""The logits processors that benchmarks/rollouts.py compares; a module of its own, since vLLM imports it."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor

from earl.emu3 import grid
from earl.emu3.vocabulary import Vocabulary
from earl.engines.vllm_constraint import GridConstraintV1

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class NaiveConstraint(AdapterLogitsProcessor):
    """One call a request and step, each of which searches the output for ``img`` and builds a mask."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self.vocabulary = Vocabulary.from_folder(vllm_config.model_config.model)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: "SamplingParams") -> Callable[[list[int], torch.Tensor], torch.Tensor]:
        vocabulary, (height, width) = self.vocabulary, params.extra_args["emu3_grid"]
        forced = grid.forced_ids(vocabulary)

        def constrain(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            k = len(output) - output.index(vocabulary.img) - 1 if vocabulary.img in output else -1
            end = (width + 1) * height
            mask = torch.full_like(logits, -torch.inf)
            if k < 0:
                mask[: vocabulary.first_visual] = 0
            elif k >= end:
                mask[forced[min(grid.EOF + k - end, grid.EOS)]] = 0
            elif k % (width + 1) == width:
                mask[vocabulary.eol] = 0
            else:
                mask[vocabulary.first_visual :] = 0
            return logits + mask

        return constrain


class Switch(LogitsProcessor):
    """One of the constraints or none, as ``active`` says, with the CPU seconds that it took: one engine runs all."""

    active: ClassVar[str] = "none"
    seconds: ClassVar[float] = 0.0

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        arguments = vllm_config, device, is_pin_memory
        self.processors = {"constraint": GridConstraintV1(*arguments), "naive": NaiveConstraint(*arguments)}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for processor in self.processors.values():
            processor.update_state(batch_update)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if Switch.active == "none":
            return logits
        start = time.process_time()
        logits = self.processors[Switch.active].apply(logits)
        Switch.seconds += time.process_time() - start
        return logits
