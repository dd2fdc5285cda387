"""Settings of the learner: what its loop and its optimizer need to know of the configuration."""

from dataclasses import dataclass

from earl.learner import logprobs, objective


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer beside its rate; the defaults are those of RL."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices and embeddings alone


@dataclass(frozen=True)
class Settings:
    """Settings of the learning loop."""

    kl_coeff: float
    temperature: float
    micro_batch: int
    visual_range: tuple[int, int]
    support: logprobs.Support  # what log-probs are normalised over
    counted: str  # "all", "text" or "visual": see objective.counted_tokens
    bfloat16: bool
    entropy_coeff: float = 0.0
    learning_rate: float | None = None  # of this iteration; None: that of the optimizer
    options: objective.Options = objective.SPEC
    normalization: str = "tokens"  # see objective.loss_denominator
    max_completion_tokens: int = 1  # the constant of the normalization "constant"
    optimizer_steps: int = 1  # mini-batches that the episodes are cut into
    parity_tolerance: float | None = None  # see check_parity
    packed: bool = False  # see packing
    whole_groups: bool = False  # a micro-batch holds all episodes of a group, such as a pair's, or none
    attention: str = "sdpa"  # see attention.choose
    gradient_checkpointing: bool = False  # compute layers again in the backward pass instead of keeping what they need
