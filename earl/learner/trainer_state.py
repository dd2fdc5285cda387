"""The `trainer/` folder of an iteration: what the learner needs beside the policy to go on.

    optimizer-00001-of-00002.safetensors   exp_avg.<parameter> and exp_avg_sq.<parameter>, float32, a file a rank; and
                                           weight.<parameter>, float32, where the policy's files are bfloat16
    state.json                             counters, and digests that bind the state to its policy and configuration
    manifest.json                          seals the folder

Of a policy with an adapter (`earl.emu3.adapter`) parameters are those of the adapter.

Each rank writes the parts that it holds, and reads those that it needs, by `torch.distributed.checkpoint`: any number
of ranks goes on from what any other number wrote. The files are those that its HuggingFaceStorageReader reads. Its
writer of them is not used, since the entries of its headers come in another order in every process: equal states would
have unequal bytes. Its default format keeps a pickle.

No generator state is kept: every draw of a run is a function of (seed, place), see `earl.statistics.seeds`.
"""

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.execution.ranks import Ranks
from earl.files import atomic, manifest
from earl.files.tensors import own_part
from earl.learner import sharding
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
_REMEDY = "restore the iteration (earl restore) or train it again"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerState:
    """Counters and bindings of a trainer folder."""

    iteration: int
    optimizer_steps: int
    policy_digest: str
    config_digest: str
    code_version: str


def save(
    folder: Path,
    model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
    state: TrainerState,
    team: Ranks,
    with_weights: bool = False,
) -> None:
    """Fill and seal an existing (temporary) folder; all ranks call this, each writes its part.

    Args:
        with_weights: also write the weights themselves, where the policy's files hold them rounded.
    """
    if not state.optimizer_steps:
        put_zeros(model, optimizer, 0)  # what AdamW begins with; until its first step it holds nothing
    parts = write_parts(folder, model, optimizer, team, with_weights)
    if team.first:
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        manifest.seal(folder, parts)


def write_parts(
    folder: Path, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", team: Ranks, with_weights: bool
) -> dict[str, manifest.Entry]:
    """Write the moments, and the weights if wanted, each rank what it holds of them; return the files, when all have.

    Raises:
        EarlError: on any rank the system refuses the write (disk full, no permission), or a tensor is not finite.
    """
    import torch.distributed.checkpoint as dcp

    from earl.learner.parts import PartWriter

    tensors, writer = _tensors(model, optimizer, with_weights), PartWriter(folder, team)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=not team.splits, process_group=team.group)
        except dcp.CheckpointException as error:  # of all ranks, whichever failed
            reason = next(failure for failure, _ in error.failures.values())
            if isinstance(reason, OSError):
                raise EarlError(atomic.refusal(folder, reason)) from error
            if isinstance(reason, EarlError):
                raise EarlError(f"{folder}: {reason}") from error
            raise
    return dict(team.gather((writer.path.name, writer.entry)))


def _tensors(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", with_weights: bool
) -> dict[str, "torch.Tensor"]:
    """What a folder holds, by name, whole or as this rank's part."""
    tensors = {}
    for name, parameter in sharding.trained(model).items():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        if with_weights:
            tensors[f"{WEIGHT}.{name}"] = parameter.detach()
    return tensors


def load(
    folder: Path,
    model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
    team: Ranks,
    *,
    iteration: int,
    policy_digest: str,
    config_digest: str,
) -> TrainerState:
    """Put the state of `folder` into `optimizer` and say what was loaded; all ranks call this.

    Where the folder holds weights, `model` has them rounded to bfloat16 and gets them as they were.

    Args:
        iteration: the iteration that the folder must belong to.
        policy_digest: digest of the policy that `model` holds.
        config_digest: of the configuration in use. Another one is reported, not refused: a run's configuration is
            frozen elsewhere, and a change that the user accepted must be able to go on from here.

    Raises:
        EarlError: the folder is missing, incomplete or damaged, or belongs to another iteration, policy or model.
    """
    import torch

    state = check(folder, iteration=iteration, policy_digest=policy_digest, config_digest=config_digest)
    with_weights = has_weights(folder, model)
    rounded = [own_part(p).bfloat16() for p in sharding.trained(model).values()] if with_weights else []
    with manifest.reading(folder, remedy=_REMEDY, rank=team.rank, ranks=team.size):
        read_parts(folder, model, optimizer, state.optimizer_steps, team, with_weights)
    for (name, parameter), before in zip(sharding.trained(model).items(), rounded, strict=False):
        if not torch.equal(own_part(parameter).bfloat16(), before):
            raise EarlError(f"{folder}: tensor '{WEIGHT}.{name}' is not what the policy rounds; {_REMEDY}")
    log.info(
        "trainer: loaded iteration %d (%d optimizer steps%s) from %s",
        iteration,
        state.optimizer_steps,
        ", float32 weights" if with_weights else "",
        folder,
    )
    return state


def read_parts(
    folder: Path,
    model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
    steps: int,
    team: Ranks,
    with_weights: bool,
    remedy: str = _REMEDY,
) -> None:
    """Give an optimizer the moments, and `model` the weights if wanted, that any number of ranks has written.

    Args:
        steps: the number of the optimizer's past steps.
        remedy: what an error advises.

    Raises:
        EarlError: a file cannot be read.
    """
    put_zeros(model, optimizer, steps)
    _read(folder, _tensors(model, optimizer, with_weights), team, remedy)


def put_zeros(model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", steps: int) -> None:
    """Give an optimizer moments of 0 and `steps` as the number of its past steps."""
    import torch

    for parameter in sharding.trained(model).values():
        moments = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}


def has_weights(folder: Path, model: "torch.nn.Module", remedy: str = _REMEDY) -> bool:
    """Return whether weights are among what a folder holds.

    Raises:
        EarlError: names or shapes of what it holds are not the model's.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EarlError(f"{folder}: cannot be read ({error}); {remedy}") from error
    with_weights = any(name.startswith(f"{WEIGHT}.") for name in stored)
    kinds = (*MOMENTS, WEIGHT) if with_weights else MOMENTS
    expected = {f"{kind}.{name}": p.shape for name, p in sharding.trained(model).items() for kind in kinds}
    if unlike := sorted(expected.keys() ^ stored.keys()):
        raise EarlError(f"{folder}: tensor {unlike[0]!r} is missing or belongs to another model; {remedy}")
    for name, shape in expected.items():
        if stored[name].size != shape:
            raise EarlError(
                f"{folder}: tensor {name!r} has shape {tuple(stored[name].size)} where the policy has {tuple(shape)}; "
                f"{remedy}"
            )
    return with_weights


def _read(folder: Path, tensors: dict[str, "torch.Tensor"], team: Ranks, remedy: str) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=not team.splits, process_group=team.group)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        raise EarlError(f"{folder}: cannot be read ({error}); {remedy}") from error


def check(folder: Path, *, iteration: int, policy_digest: str, config_digest: str) -> TrainerState:
    """Check a folder as `load` does, as far as that goes without reading tensors; return its counters."""
    manifest.check(folder, remedy=_REMEDY)
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
    except (OSError, ValueError, TypeError) as error:
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
