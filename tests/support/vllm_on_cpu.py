"""Importing this imports vLLM, so that what is forked afterwards need not."""

from earl.engines import vllm_process

vllm_process.prepare_process("cpu")
from vllm import LLM  # noqa: E402, F401
