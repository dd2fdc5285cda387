"""The rollout engines that tests go through; a fixture `<name>_engine` gives each."""

import pytest

ENGINES = ["torch", pytest.param("vllm", marks=pytest.mark.slow)]
"""Importing and starting vLLM takes ten seconds."""
