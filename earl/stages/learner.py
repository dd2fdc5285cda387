"""The learner of a run in memory: the policy in training and what trains it, loaded from a checkpoint."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from earl.config.freeze import config_digest
from earl.emu3 import adapter, saving
from earl.emu3.checkpoint import check_files
from earl.emu3.vocabulary import Vocabulary
from earl.execution.ranks import Ranks
from earl.files import manifest
from earl.files.layout import Run
from earl.learner import grpo, sharding, trainer_state
from earl.messages.errors import EarlError
from earl.run import state

if TYPE_CHECKING:
    from transformers import Emu3ForCausalLM

    from earl.config.schema import Config

log = logging.getLogger(__name__)


@dataclass
class Learner:
    """The policy in training and what trains it, as of an iteration; `step` takes it to the next one.

    Attributes:
        reference: the frozen policy that the KL term looks at, and its digest; None where no KL term is wanted. It is
            that of `earl.run.state.reference_at`, for the next iteration once `refresh_reference` was called. Where an
            adapter is trained it is `policy` itself, see `earl.learner.grpo`.
        iteration: the last one that was trained; 0: the starting policy.
        optimizer_steps: done since the run began.
        policy_digest: of the folder that the policy has or would have.
        companions: the folder's files that training does not change, by name: the tokenizer's, and of an adapter its
            settings and what its base is.
    """

    policy: "Emu3ForCausalLM"
    optimizer: torch.optim.Optimizer
    reference: "Emu3ForCausalLM | None"
    reference_digest: str | None
    iteration: int
    optimizer_steps: int
    policy_digest: str
    vocabulary: Vocabulary
    companions: dict[str, bytes]

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy's weights, of an adapter those alone, by name, whole and on the device; all ranks of the
        team do so together.
        """
        return saving.whole_weights(self.policy, dtype)

    def refresh_reference(self, config: "Config") -> None:
        """Make the policy the reference where the next iteration is the first to have it; all ranks do so together.

        It is rounded as its folder and a reference that is loaded from there would be.
        """
        due = state.reference_at(config, self.iteration + 1) == self.iteration
        if self.reference is not None and due and self.reference_digest != self.policy_digest:
            sharding.copy_weights(self.policy, self.reference)
            self.reference_digest = self.policy_digest


def splits_alone(config: "Config") -> bool:
    """Return whether models are split (see `sharding`) where one rank trains."""
    return config.dtype == "bfloat16" or config.reference_offload


def load(config: "Config", files: Run, index: int, team: Ranks) -> Learner:
    """Return the learner as iteration `index` left it, from its checkpoint; all ranks of the team call this.

    Args:
        index: of the iteration; 0 loads the starting policy, with a fresh optimizer.

    Raises:
        EarlError: the checkpoint is missing, damaged or not the one on record, or its parts do not belong together.
    """
    iteration = files.iteration(index)
    digest = digest_of(iteration.policy, team)
    state.check_policy(files, index, digest)
    binding = {"iteration": index, "policy_digest": digest, "config_digest": config_digest(config)}
    trained = trainer_state.check(iteration.trainer, **binding) if index else None
    companions = saving.companions(iteration.policy) | _adapter_files(config, files, index, digest, team)
    policy = _policy(config, iteration.policy, team)
    optimizer = grpo.new_optimizer(policy, config.learning_rate)
    if trained is None:
        log.info("trainer: iteration 1 starts with a fresh optimizer from %s", iteration.policy)
    else:
        trainer_state.load(iteration.trainer, policy, optimizer, team, **binding)
    if config.compile:
        sharding.compile_layers(policy)
    return Learner(
        policy,
        optimizer,
        *_reference(config, policy, files, index + 1, team),
        iteration=index,
        optimizer_steps=trained.optimizer_steps if trained else 0,
        policy_digest=digest,
        vocabulary=Vocabulary.from_folder(iteration.policy),
        companions=companions,
    )


def _policy(config: "Config", folder: Path, team: Ranks) -> "Emu3ForCausalLM":
    bfloat16 = config.dtype == "bfloat16"
    if config.lora is None:
        return sharding.load(folder, team, bfloat16)
    return sharding.load_with_adapter(folder, config.lora.settings, config.random_seed, team, bfloat16)


def _adapter_files(config: "Config", files: Run, index: int, digest: str, team: Ranks) -> dict[str, bytes]:
    """Return the files that the folder of an adapter has; none where all weights are trained.

    Raises:
        EarlError: the folder of the iteration has others, so it was trained with other settings or on another base.
    """
    start, folder = files.iteration(0).policy, files.iteration(index).policy
    adapter.check_full(start)
    wanted: dict[str, bytes] = {}
    if config.lora is not None:
        base = os.path.relpath(start, files.iteration(1).policy)  # the same from every iteration
        wanted = adapter.files(config.lora.settings, base, digest_of(start, team) if index else digest)
    found = {name: (folder / name).read_bytes() for name in (adapter.CONFIG, adapter.BASE) if (folder / name).is_file()}
    if index and found != wanted:
        raise EarlError(
            f"{folder}: was trained with another value of the field lora, or on another starting policy, and cannot be "
            f"trained on with this one; go back to the old value, or train from the start again: earl rewind --run "
            f"{files.path} --iteration 1"
        )
    return wanted


def digest_of(policy: Path, team: Ranks) -> str:
    """Return the digest of a policy folder; one that nobody sealed, all of which is read, is read by one rank."""
    return team.of_first(manifest.digest_folder(check_files(policy)) if team.first else "")


def _reference(
    config: "Config", policy: "Emu3ForCausalLM", files: Run, next_index: int, team: Ranks
) -> "tuple[Emu3ForCausalLM, str] | tuple[None, None]":
    """Weights and digest of the frozen reference of an iteration; where no KL term is wanted it is not loaded."""
    if config.kl_coeff == 0:
        return None, None
    bfloat16, offload = config.dtype == "bfloat16", config.reference_offload
    state.check_reference(files, config, next_index)
    folder = files.iteration(state.reference_at(config, next_index)).policy
    digest = digest_of(folder, team)
    if config.lora is not None:
        return policy, digest
    return sharding.load(folder, team, bfloat16, frozen=True, offload=offload), digest
