"""Sections for the tests of the GPU check's supervisor, which say what they were meant to say and then go wrong."""

import os
import signal
import subprocess
import sys

from benchmarks.gpu.context import Context, SkipSection, Stop
from benchmarks.gpu.results import Range

FOREVER = [sys.executable, "-c", "import signal; signal.pause()"]


def fine(context: Context) -> None:
    context.measure("rate", 12.5, "GB/s", Range(low=10))
    context.require("sum", True, "right", "right")


def hangs(context: Context) -> None:
    child = subprocess.Popen(FOREVER)
    context.note("child", str(child.pid))
    signal.pause()


def crashes(context: Context) -> None:
    context.note("before", "said")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(context: Context) -> None:
    context.note("before", "said")
    with context.attempt("first"):
        raise RuntimeError("kernel refused\nand more")
    raise ValueError("nothing left")


def skips(context: Context) -> None:
    with context.attempt("part"):
        raise SkipSection("no such kernel here")
    raise SkipSection("not on this card")


def lacks(context: Context) -> None:
    import a_package_that_nobody_has  # noqa: F401


def stops(context: Context) -> None:
    raise Stop("no GPU is visible")
