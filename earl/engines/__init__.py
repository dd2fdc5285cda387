"""Rollout engines: what turns prompts into completions. One interface; `get` finds an implementation by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from earl.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    temperature: float
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability; 1 keeps all."""
    top_k: int = -1
    """Keep this many likeliest tokens; -1 keeps all."""
    max_tokens: int = 2048
    """Tokens a completion may have at most."""


@dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted of it."""

    prompt_token_ids: Sequence[int]
    grid: tuple[int, int]
    """Rows and columns (H, W) of visual tokens in the original image."""
    seeds: Sequence[int]
    """One seed for each sample, see `earl.seeds`: a completion depends on its own seed alone."""


@dataclass(frozen=True)
class Completion:
    """What the policy did, up to and including ``eos``."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from: after constraint, temperature and
    truncation. Forced tokens have 0."""
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """What every engine can do."""

    def load(self, policy: Path) -> None:
        """Take a policy into memory, in place of one loaded before."""
        ...

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """Return for each request, in order, one completion for each of its seeds."""
        ...


def get(config: "Config") -> Engine:
    """Return the configured engine, with no policy loaded yet.

    Raises:
        EarlError: when this version has no such engine.
    """
    if config.engine == "torch":
        from earl.engines.torch_engine import TorchEngine

        return TorchEngine.from_config(config)
    raise EarlError(f"engine is {config.engine!r}, which this version does not have; it has 'torch'")
