"""Runs sections one after another, each in a process of its own that is ended when its time is up.

The process that supervises never imports torch: what a driver or a kernel breaks, it breaks in a section's process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.results import FAILED, SKIPPED, Result

ROOT = Path(__file__).parents[2]
RESULTS = "results.jsonl"
SHORTEST = 10.0
"""Seconds: a section for which less is left is not started."""
POLL = 0.2
"""Seconds between two looks for results of a section that runs."""
PATIENCE = 10.0
"""Seconds to wait for a killed process to be gone."""
STOP = 3
"""Exit status of a section after which no other can run."""
LAST_WORDS = 300
"""Characters of a log's last line that a result quotes."""


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: What `--only` and results call it.
        function: ``module:function``, which takes a `benchmarks.gpu.context.Context`.
        seconds: The time that it may take.
    """

    name: str
    function: str
    seconds: float


def run(
    sections: Sequence[Section],
    device: str,
    out: Path,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Result]:
    """Run the sections and yield results as they come; each is in the file `RESULTS` of a folder before it is yielded.

    Args:
        sections: In the order in which they run.
        device: ``cuda``, or ``cpu`` for everything shrunk.
        out: The folder, which also gets a log of each section.
        seconds: Time for all of them.
        clock: Seconds since some moment.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / RESULTS
    reader, end, stopped = results.Reader(path), clock() + seconds, ""
    reader.new()  # those of earlier calls
    for section in sections:
        limit = min(section.seconds, end - clock())
        if stopped or limit < min(SHORTEST, section.seconds):
            reason = stopped or f"no time was left; run it by itself: --only {section.name}"
            results.append(path, Result(section.name, "section", "", reason, SKIPPED))
            yield from reader.new()
            continue
        with _started(section, device, path, limit) as process:
            over = clock() + limit
            while process.poll() is None and clock() < over:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                yield from reader.new()
            status = process.poll()
        if status == STOP:
            stopped = f"{section.name} says that nothing can be run here"
        elif status != 0:
            trouble = _trouble(status, limit, path.with_name(f"{section.name}.log"))
            results.append(path, Result(section.name, "process", "ends by itself", trouble, FAILED))
        yield from reader.new()


@contextlib.contextmanager
def _started(section: Section, device: str, path: Path, seconds: float) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a section's process, in a session of its own; at the end of the block that session is ended."""
    command = [sys.executable, "-m", "benchmarks.gpu.section", section.name, section.function]
    command += [device, str(path), str(seconds), str(os.getpid())]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(path.with_name(f"{section.name}.log"), "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that the kernel holds in a driver's call does not end; the other sections run all the same.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def _trouble(status: int | None, limit: float, log: Path) -> str:
    """Say how a section's process ended; None: it had to be ended."""
    if status is None:
        return f"did not end within {limit:.0f} s; see {log}"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how}; see {log}" + (f": {lines[-1][-LAST_WORDS:]}" if lines else "")
