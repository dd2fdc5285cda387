"""Emu3's text model in vLLM: a Llama, whose weights come under other names in one of the two checkpoint formats."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM

from earl.emu3.checkpoint import text_weight_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Emu3ForCausalLM(LlamaForCausalLM):
    """Takes `Emu3ForCausalLM` and the text model of `Emu3ForConditionalGeneration`."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        """Build the model from its text configuration, which in a policy's `config.json` is a section."""
        whole = vllm_config.model_config.hf_config
        if (text := whole.get_text_config()) is not whole:
            vllm_config = vllm_config.with_hf_config(text)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        named = ((text_weight_name(name), weight) for name, weight in weights)
        return super().load_weights((name, weight) for name, weight in named if name is not None)
