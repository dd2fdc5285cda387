"""What vLLM calls in each of its processes, through this package's entry points (see pyproject.toml).

vLLM starts helper processes: to inspect a model's class, to run an engine, one worker a GPU. Each of them resolves the
platform first and loads general plugins later, so that both functions reach all of them. Kept light: most processes
that run this never touch an Emu3.
"""

from earl.execution import torch_extensions


def platform() -> None:
    """Make transformers importable before vLLM imports it. Offers no platform: None leaves the choice to vLLM."""
    torch_extensions.work_around()


def register() -> None:
    """Tell vLLM which class runs Emu3's text model."""
    from vllm import ModelRegistry

    if "Emu3ForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("Emu3ForCausalLM", "earl.engines.vllm_policy:Emu3ForCausalLM")
