"""The judge server that a segment starts for itself: beside its ranks, on GPUs of its own, and gone when they are.

A stage with `judge: vllm` takes the model into its own process. A segment has no room for it there, and its ranks share
one judge: rank 0 runs `earl judge serve`, and all ranks ask it as they would any other server.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config import address
from earl.execution import gpus, processes
from earl.files import manifest
from earl.judges import server, vllm_model
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.execution.ranks import Ranks

_OF_A_RANK = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"}
_OF_A_RANK |= {f"{kind}{name}" for kind in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")}
"""Environment variables that make a process one of several ranks, which the server is not."""
_OF_THE_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"}
"""Variables that `earl.engines.vllm_process.prepare_process` sets for the rollout engine in this process."""


@contextmanager
def serving(config: "Config", team: "Ranks") -> Iterator[str]:
    """Start a server of the configured judge on rank 0, yield its URL on every rank, and end it.

    All ranks of ``team`` enter and leave together. The server also ends when rank 0 is killed. Enter this in the main
    thread: on Linux a child's parent is the thread that started it.

    Raises:
        EarlError: vLLM is not installed, there are too few GPUs, or the server does not answer in time.
    """
    vllm_model.check_installed()
    hosts = team.gather(socket.gethostname())
    if not team.first:
        yield team.of_first("")
        team.of_first(None)
        return
    here = hosts.count(hosts[0])
    with tempfile.TemporaryDirectory(prefix="earl-judge-") as folder:
        host_file = Path(folder) / "host"
        host = "127.0.0.1" if here == len(hosts) else "0.0.0.0"
        environment = _environment(_gpus(config, here) if team.device.type == "cuda" else None)
        child = _start(command(config, host, host_file), environment)
        try:
            with manifest.reading(config.reward_function_api_model_name):
                url = _wait(child, host_file, config.judge_startup_seconds)
            yield team.of_first(url)
            team.of_first(None)  # No rank asks any more.
        finally:
            server.stop(child, patience=60.0)  # longer than the child itself gives what it has started


def command(config: "Config", host: str, host_file: Path) -> list[str]:
    """Return the command of the server; it holds the model as the judge `vllm` of a stage does."""
    options: dict[str, object] = {
        "model": config.reward_function_api_model_name,
        "host": host,
        "port": 0,
        "host-file": host_file,
        "tensor-parallel-size": config.judge_tensor_parallel_size,
        "context-size": config.judge_context_size,
        "dtype": config.dtype,
        "startup": config.judge_startup_seconds,
    }
    if config.reward_function_api_model_revision is not None:
        options["revision"] = config.reward_function_api_model_revision
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--", "--seed", "0", "--max-num-seqs", str(vllm_model.MAX_SEQUENCES)]
    if not server.is_cpu_build():
        words += ["--gpu-memory-utilization", str(config.judge_gpu_memory_utilization)]
    return [sys.executable, "-m", "earl", "judge", "serve", *words]


def _gpus(config: "Config", ranks: int) -> str:
    """Return the GPUs of this machine that the server gets, as `CUDA_VISIBLE_DEVICES`: the ones after the ranks'.

    Raises:
        EarlError: there are too few.
    """
    import torch

    visible = [gpu.name for gpu in gpus.visible()] or [str(index) for index in range(torch.cuda.device_count())]
    wanted = config.judge_tensor_parallel_size
    if len(visible) < ranks + wanted:
        raise EarlError(
            f"judge is 'vllm', whose server needs judge_tensor_parallel_size ({wanted}) GPUs beside those of the "
            f"{ranks} ranks on its machine, but {len(visible)} are visible there; ask for {ranks + wanted}, lower "
            "segment_processes or judge_tensor_parallel_size, or set judge to 'openai' and start a server elsewhere"
        )
    return ",".join(visible[ranks : ranks + wanted])


def _environment(named: str | None) -> Mapping[str, str]:
    # Without the workflow's process id: the server ends with this process, and needs a moment for what it has started.
    dropped = _OF_A_RANK | _OF_THE_ENGINE | {processes.WATCHED}
    kept = {name: os.environ[name] for name in os.environ if name not in dropped and "TORCHELASTIC" not in name}
    return kept if named is None else kept | {gpus.VISIBLE: named}


def _start(words: list[str], environment: Mapping[str, str]) -> subprocess.Popen:
    parent = os.getpid()
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: processes.end_with_parent(parent=parent),
    )


def _wait(child: subprocess.Popen, host_file: Path, patience: float) -> str:
    """Return the URL that the server writes once it answers."""
    deadline = time.monotonic() + patience
    while (url := address.resolve(str(host_file))) is None:
        if child.poll() is not None:
            raise EarlError(
                f"the judge server of this segment ended with status {child.returncode} before it answered; see above"
            )
        if time.monotonic() > deadline:
            raise EarlError(
                f"the judge server of this segment did not answer within judge_startup_seconds ({patience:g}); raise it"
            )
        time.sleep(0.1)
    return url
