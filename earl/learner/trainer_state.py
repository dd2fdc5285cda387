"""The `trainer/` folder of an iteration: what the learner needs beside the policy to go on.

    optimizer.safetensors   exp_avg.<parameter> and exp_avg_sq.<parameter>, float32
    state.json              counters, and digests that bind the state to its policy and configuration
    manifest.json           seals the folder

No generator state is kept: every draw of a run is a function of (seed, place), see `earl.seeds`.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.errors import EarlError
from earl.files import manifest

if TYPE_CHECKING:
    import torch

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerState:
    """Counters and bindings of a trainer folder."""

    iteration: int
    optimizer_steps: int
    policy_digest: str
    config_digest: str
    code_version: str


def optimizer_tensors(model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> dict[str, "torch.Tensor"]:
    """Adam's two moments by name of moment and parameter; empty before the first step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].detach().cpu().contiguous()
    return tensors


def put_optimizer_tensors(
    model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
    tensors: dict[str, "torch.Tensor"],
    steps: int,
    path: Path,
) -> None:
    """Give an optimizer the moments read from `path`, and `steps` as the number of its past steps.

    Raises:
        EarlError: a moment is missing, left over, not finite, or of another shape than its parameter.
    """
    import torch

    expected = {f"{moment}.{name}": p for name, p in model.named_parameters() for moment in MOMENTS}
    if unlike := sorted(expected.keys() ^ tensors.keys()):
        raise EarlError(f"{path}: tensor {unlike[0]!r} is missing or belongs to another model; {_REMEDY}")
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            raise EarlError(
                f"{path}: tensor {key!r} has shape {tuple(tensors[key].shape)} where the policy has "
                f"{tuple(parameter.shape)}; {_REMEDY}"
            )
        if not torch.isfinite(tensors[key]).all():
            raise EarlError(f"{path}: tensor {key!r} is not finite; {_REMEDY}")
    for name, parameter in model.named_parameters():
        moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


_REMEDY = "restore the iteration (earl restore) or train it again"


def save(folder: Path, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", state: TrainerState) -> None:
    """Fill and seal an existing (temporary) folder."""
    from safetensors.torch import save_file

    save_file(optimizer_tensors(model, optimizer), folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    manifest.seal(folder)


def load(
    folder: Path,
    model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
    *,
    iteration: int,
    policy_digest: str,
    config_digest: str,
) -> TrainerState:
    """Put the state of `folder` into `optimizer` and say what was loaded.

    Args:
        iteration: the iteration that the folder must belong to.
        policy_digest: digest of the policy that `model` holds.
        config_digest: of the configuration in use. Another one is reported, not refused: a run's configuration is
            frozen elsewhere, and a change that the user accepted must be able to go on from here.

    Raises:
        EarlError: the folder is missing, incomplete or damaged, or belongs to another iteration, policy or model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = check(folder, iteration=iteration, policy_digest=policy_digest, config_digest=config_digest)
    path = folder / OPTIMIZER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EarlError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    put_optimizer_tensors(model, optimizer, tensors, state.optimizer_steps, path)
    log.info("trainer: loaded iteration %d (%d optimizer steps) from %s", iteration, state.optimizer_steps, folder)
    return state


def check(folder: Path, *, iteration: int, policy_digest: str, config_digest: str) -> TrainerState:
    """Check a folder as `load` does, as far as that goes without reading tensors; return its counters."""
    manifest.check(folder)
    state = read_state(folder)
    _check_binding(folder, state, iteration, policy_digest, config_digest)
    return state


def read_state(folder: Path) -> TrainerState:
    """Read `state.json` alone; EarlError naming the file where it is missing or damaged."""
    path = folder / STATE
    try:
        return TrainerState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise EarlError(f"{path}: is missing; {_REMEDY}") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise EarlError(f"{path}: is damaged ({error}); {_REMEDY}") from error


def _check_binding(folder: Path, state: TrainerState, iteration: int, policy_digest: str, config_digest: str) -> None:
    path = folder / STATE
    for name, found, expected in (
        ("iteration", state.iteration, iteration),
        ("policy_digest", state.policy_digest, policy_digest),
    ):
        if found != expected:
            raise EarlError(
                f"{path}: {name} is {found!r} where {expected!r} is in use: the state of another run; {_REMEDY}"
            )
    if state.config_digest != config_digest:
        log.warning(
            "trainer: %s was written under configuration %s, now %s is in use", path, state.config_digest, config_digest
        )
