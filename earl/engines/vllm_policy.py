"""Emu3's text model in vLLM: a Llama, whose weights come under other names in one of the two checkpoint formats."""

from collections.abc import Iterable

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM

from earl.emu3.checkpoint import text_weight_name


class Emu3ForCausalLM(LlamaForCausalLM):
    """Takes `Emu3ForCausalLM` and the text model of `Emu3ForConditionalGeneration`."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        named = ((text_weight_name(name), weight) for name, weight in weights)
        return super().load_weights((name, weight) for name, weight in named if name is not None)
