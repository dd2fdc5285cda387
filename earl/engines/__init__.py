"""Rollout engines: what turns prompts into completions. One interface; `get` finds an implementation by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch

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
    """Tokens that a completion may have at most; fewer where the context ends before."""


@dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted of it."""

    prompt_token_ids: Sequence[int]
    grid: tuple[int, int]
    """Rows and columns (H, W) of visual tokens in the original image."""
    seeds: Sequence[int]
    """One seed for each sample, see `earl.statistics.seeds`: a completion depends on its own seed alone."""


@dataclass(frozen=True)
class Completion:
    """What the policy did, up to and including ``eos``."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from: after constraint, temperature and
    truncation. Forced tokens have 0, and so have all at temperature 0."""
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """What every engine can do."""

    def load(self, policy: Path) -> None:
        """Take a policy into memory, in place of one loaded before.

        Where this process is one of several ranks, all of them call this together: vLLM's engines meet when they start.

        Raises:
            EarlError: when the folder is not a whole, finite policy (`earl.emu3.checkpoint.check_policy`), or does not
                fit into memory.
        """
        ...

    def update(self, weights: "Iterable[tuple[str, torch.Tensor]]", digest: str) -> None:
        """Replace the weights of the loaded policy in place; wakes a sleeping engine.

        Args:
            weights: By the names of `Emu3ForCausalLM`, or where the configuration says `lora` those of the adapter by
                their names in its file; whole, in any order, of any dtype and on any device; rounded to the engine's
                dtype. Iterated exactly once, to the end: other ranks may gather each weight with this one.
            digest: Digest of the policy folder that holds these weights, or would if it were written.

        Raises:
            EarlError: when no policy is loaded, or a weight is missing, unknown, of another shape or not finite. After
                a failure no policy is loaded.
        """
        ...

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """Return for each request, in order, one completion for each of its seeds.

        Raises:
            EarlError: when no policy is loaded, the engine sleeps, a prompt fills the context (see `room`), or memory
                does not suffice.
        """
        ...

    def sleep(self) -> None:
        """Give GPU memory to others, the learner above all, and keep the policy; does nothing on a CPU."""
        ...

    def wake(self) -> None:
        """Take the memory back after `sleep`; the policy is as it was."""
        ...

    def close(self) -> None:
        """Give back all memory; `load` starts the engine again."""
        ...


def get(config: "Config") -> Engine:
    """Return a new engine of the configured kind, with no policy loaded yet.

    Raises:
        EarlError: when the engine is not installed or cannot do what the configuration asks for here.
    """
    if config.engine == "torch":
        from earl.engines.torch_engine import TorchEngine

        return TorchEngine.from_config(config)
    from earl.engines.vllm_engine import VllmEngine

    return VllmEngine.from_config(config)


def room(request: Request, params: SamplingParams, context: int) -> int:
    """Return the most tokens that a completion of this prompt may have: it ends where the context does, as in vLLM.

    Raises:
        EarlError: when the prompt fills the context by itself.
    """
    length = len(request.prompt_token_ids)
    if length >= context:
        raise EarlError(
            f"a prompt has {length} tokens, which leaves no room for a completion in model_context_size ({context}); "
            "raise it, or leave the example out"
        )
    return min(params.max_tokens, context - length)


def checked(
    weights: "Iterable[tuple[str, torch.Tensor]]", shapes: "Mapping[str, torch.Size]"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield weights, each after a check: those of ``shapes``, each once and finite. See `Engine.update`.

    Raises:
        EarlError: see `Engine.update`.
    """
    missing = dict(shapes)
    for name, weight in weights:
        if name not in missing:
            raise EarlError(f"weight {name!r} is not one of the policy that is loaded, or comes twice")
        if (expected := missing.pop(name)) != weight.shape:
            raise EarlError(f"weight {name!r} has shape {list(weight.shape)}, not {list(expected)}")
        # The extremes of a tensor with NaN are NaN, and both are found in one pass without another tensor.
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise EarlError(f"weight {name!r} is not finite; lower the learning rate, and resume from a checkpoint")
        yield name, weight
    if missing:
        raise EarlError(f"weight {min(missing)!r} is missing, {len(missing)} of them in all")


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn what torch raises when memory does not suffice, on GPU or CPU, into an EarlError that ends in ``remedy``."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EarlError(f"out of memory ({str(error).splitlines()[0]}); {remedy}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise EarlError(f"out of memory ({str(error).splitlines()[0]}); {remedy}") from error
