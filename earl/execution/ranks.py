"""The processes that train together: who they are, how work is shared out, and how they end together.

A stage that is run plainly is one process; under torchrun (`WORLD_SIZE` in the environment) it is one of several, the
ranks. Each rank reads the same files and comes to the same plan, so that only weights, gradients and sums travel.

The ranks of a program are its world. The first of them may form a team of their own, `Ranks.first_ranks`: of a program
that samples on every GPU, fewer may train.
"""

import functools
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from earl.files import atomic
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

PATIENCE = 60.0
"""Seconds that a rank waits to be ended after another one has said what is wrong."""
_LONGEST_WAIT = timedelta(days=1)
"""The longest that a rank waits for another in a collective: one may have to wait for a judge that does not answer. The
partners of a rank that died are ended by whoever launched them."""
_numbers = itertools.count()
"""Of the process groups that this process opens, one after another: their keys in the store must not meet."""
_FAILURES = "failures"
"""Where the store counts ranks that have failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together: all of a program, or a team of the first of them.

    Attributes:
        rank: 0..size-1; rank 0 writes what is written once.
        size: how many there are.
        device: what this rank computes on.
        splits_alone: whether models are split even where there is one rank; see `sharding`.
        group: the process group of `torch.distributed`; None: all ranks that were launched, or this process alone.
    """

    rank: int
    size: int
    device: "torch.device"
    splits_alone: bool = False
    group: "torch.distributed.ProcessGroup | None" = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def splits(self) -> bool:
        """Whether models are split over the ranks."""
        return self.size > 1 or self.splits_alone

    def gather(self, value: Item) -> list[Item]:
        """Return the values of all ranks, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: Item) -> Item:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def first_ranks(self, count: int) -> "Ranks | None":
        """Return the team of the first `count` of all launched ranks, and None on the others; every rank calls this."""
        if count == self.size:
            return self
        import torch.distributed as dist

        group = dist.new_group(list(range(count)))
        return Ranks(self.rank, count, self.device, self.splits_alone, group) if self.rank < count else None


def alone(device: "torch.device") -> Ranks:
    """One process that works by itself."""
    return Ranks(0, 1, device)


def is_launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "WORLD_SIZE" in os.environ


def rounds(batches: Sequence[Item], ranks: Ranks) -> Iterator[tuple[Item, bool]]:
    """Yield a rank's share of the micro-batches of an optimizer step, and whether each counts.

    Round k gives batch k * size + r to rank r, so that batches in the order of their lengths are spread evenly. Every
    rank gets as many, since all take part when weights are gathered and gradients added: where a round runs out of
    batches, the last one again, which does not count.
    """
    for start in range(0, len(batches), ranks.size):
        index = start + ranks.rank
        yield batches[min(index, len(batches) - 1)], index < len(batches)


@contextmanager
def folder(path: Path, team: Ranks) -> Iterator[Path]:
    """Yield a temporary folder, the same on all ranks, that becomes `path` when all have left the block."""
    if team.first:
        with atomic.folder(path) as temporary:
            team.of_first(temporary)
            yield temporary
            team.of_first(None)
    else:
        temporary = team.of_first(path)
        try:
            yield temporary
        except OSError as error:
            raise EarlError(atomic.refusal(path, error)) from error
        team.of_first(None)


@functools.cache
def meeting() -> "tuple[torch.distributed.Store, int, int]":
    """Return the store by which launched ranks find each other, this one's rank, and how many there are."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://"))


@contextmanager
def joined(device: "torch.device", splits_alone: bool = False) -> Iterator[Ranks]:
    """Join the other ranks, if there are any, and leave them at the end of the block.

    An error ends all ranks. The rank that met it first raises it; the others, which meet it too or lose their partner
    in the middle of a sum, wait silently for torchrun, or the first of them, to end them.

    Args:
        device: of the type that ranks compute on; each rank takes a GPU of its own, see `own_gpu`.
        splits_alone: whether models are split (see `sharding`) even where there is one rank.

    Raises:
        EarlError: two ranks would compute on one GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not splits_alone:
        yield alone(device)
        return
    import torch.distributed as dist

    device = _own_device(device)
    if size == 1 and dist.is_initialized():  # vLLM, as an engine in this process, has opened one.
        yield Ranks(0, 1, device, splits_alone)
        return
    store, rank = (dist.HashStore(), 0) if size == 1 else meeting()[:2]
    own_store = dist.PrefixStore(f"ranks/{next(_numbers)}", store)
    team = Ranks(rank, size, device, splits_alone)
    if not team.first:
        logging.getLogger("earl").setLevel(logging.ERROR)  # the first says it for all
    done = False
    try:
        if device.type == "cuda":
            check_own_gpus(own_store, rank, size, gpu_uuid(device))
        dist.init_process_group(
            # Objects and barriers go by way of gloo, weights and gradients by way of NCCL.
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=own_store,
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
            timeout=_LONGEST_WAIT,
        )
        yield team
        team.of_first(None)  # none leaves while another still writes
        done = True
    except Exception:
        if not _is_first_to_fail(store):
            time.sleep(PATIENCE)
            os._exit(1)
        raise
    finally:
        # Of several, what others wait for will not come where one has failed: the processes have to end.
        if dist.is_initialized() and (done or size == 1):
            dist.destroy_process_group()


def _own_device(device: "torch.device") -> "torch.device":
    import torch

    if device.type == "cuda":
        device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    return device


def own_gpu(visible: int) -> int:
    """Return the index of this rank's GPU among the `visible` ones.

    Where all GPUs of the machine are visible to all of its ranks, that is the rank's number on the machine. Where Slurm
    binds GPUs to tasks, a rank sees its own alone, which are counted from 0 in each. Whether two ranks have taken the
    same one, `check_own_gpus` finds out.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) % visible


def gpu_uuid(device: "torch.device") -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def check_own_gpus(store: "torch.distributed.Store", rank: int, size: int, uuid: str) -> None:
    """Tell the other ranks which GPU this one has taken; all of them call this.

    Args:
        store: where ranks find each other; they must not have called this with it before.
        uuid: the same for everyone who uses that GPU.

    Raises:
        EarlError: another rank has taken it, too.
    """
    store.set(f"gpu/{rank}", uuid)
    taken = [store.get(f"gpu/{other}").decode() for other in range(size)]
    sharing = [other for other in range(size) if taken[other] == uuid]
    if len(sharing) > 1:
        raise EarlError(
            f"ranks {sharing} of {size} would compute on the same GPU ({uuid}) of {socket.gethostname()}; give the job "
            "a GPU for each of its ranks on every node (gpu in the profile, --gpus-per-node), or lower train_processes "
            "and segment_processes"
        )


def _is_first_to_fail(store: Any) -> bool:
    try:
        return store.add(_FAILURES, 1) == 1
    except Exception:  # the store is gone with the rank that kept it, whose error is the one to tell
        return False


def failed_together() -> bool:
    """Whether a rank has failed since all had joined; then one of them says so, and the others nothing."""
    return meeting()[0].add(_FAILURES, 0) > 0
