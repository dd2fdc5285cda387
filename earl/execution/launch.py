"""Starts the ranks of a stage: torchrun on this machine, or srun over the nodes of this Slurm allocation.

Every rank runs the same command and finds `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and
`MASTER_PORT` in its environment. Ranks end with the launching process and with each other.
"""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from earl.execution import processes, runtime
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config


def launch(config: "Config | None", arguments: Sequence[str], size: int) -> int:
    """Run `earl <arguments>` as `size` ranks and return 0, or the exit status of a rank that failed.

    In a Slurm job with several nodes every node gets the same number of ranks; elsewhere all run on this machine.

    Args:
        config: What the ranks compute on; None if that does not matter.
        arguments: The command and its options.
        size: The number of ranks.

    Raises:
        EarlError: there are too few GPUs for the ranks of this machine, or `size` is no multiple of the nodes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it, with a warning; a stage sets its own number
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if size % nodes:
        raise EarlError(f"{size} processes cannot be spread evenly over the {nodes} nodes of this Slurm job")
    if config is not None:
        _check_devices(config, size // nodes)
    return _srun(arguments, nodes, size // nodes) if nodes > 1 else _torchrun(arguments, size)


def _check_devices(config: "Config", size: int) -> None:
    """Here, and not in every rank, which would all say it."""
    import torch

    if runtime.prepare(config).type == "cuda" and torch.cuda.device_count() < size:
        raise EarlError(
            f"{size} processes of this machine need a GPU each, but {torch.cuda.device_count()} GPUs are visible here; "
            "lower train_processes or segment_processes, or ask for more GPUs"
        )


def _torchrun(arguments: Sequence[str], size: int) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what went wrong is said below
    # What follows `--` is not for torchrun, which else takes --run for an abbreviation of its own --run-path.
    options = ["--standalone", "--nproc-per-node", str(size), "-m", "--", "earl", *arguments]
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} of {size} was ended by {failure.signal_name()}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _srun(arguments: Sequence[str], nodes: int, size: int) -> int:
    """Run `size` ranks on each of `nodes` nodes as one step of this Slurm job."""
    cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", size)) // size
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * size}", f"--ntasks-per-node={size}"]
    # All GPUs of a node are visible to all of its ranks, as under torchrun. Whatever step this process itself is in
    # shares its resources with the ranks.
    command += [f"--cpus-per-task={cpus}"] if cpus else ["--cpus-per-task=1", "--overcommit"]
    command += ["--overlap", "--mpi=none", "--export=ALL", "--kill-on-bad-exit=1"]
    command += [sys.executable, "-m", "earl.execution.launch", *arguments]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": _first_node(), "MASTER_PORT": str(port)}
    # On TERM srun ends all tasks of the step.
    with subprocess.Popen(command, env=os.environ | meeting, preexec_fn=processes.end_with_parent) as step:
        status = step.wait()
    return status if status >= 0 else 128 - status


def _first_node() -> str:
    """Return the address of the node that rank 0 runs on, as Slurm knows it: names need not resolve."""
    names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", names[0]))
    return found[1] if found else names[0]


def _scontrol(*arguments: str) -> str:
    shown = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise EarlError(f"scontrol {' '.join(arguments)}: {shown.stderr.strip()}; try again when Slurm answers")
    return shown.stdout


def become_rank() -> None:
    """Tell torch.distributed which rank srun made this process."""
    slurm = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    }
    os.environ.update({ours: os.environ[theirs] for ours, theirs in slurm.items()})


if __name__ == "__main__":
    become_rank()
    os.execv(sys.executable, [sys.executable, "-m", "earl", *sys.argv[1:]])
