"""The program that runs one section, as `supervisor` starts it."""

import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu import supervisor
from benchmarks.gpu.context import Context, SkipSection, Stop, described, lacking
from earl.execution import processes


def main(name: str, function: str, device: str, path: str, seconds: str, parent: str) -> int:
    """Run a section and return the exit status.

    Args:
        name, function, device: See `supervisor.Section` and `supervisor.run`.
        path: The results file.
        seconds: The section's time.
        parent: Process id of the supervisor, with which this process ends.
    """
    processes.end_with(int(parent))
    context = Context(name, device == "cpu", Path(path), time.monotonic() + float(seconds))
    module, _, function = function.partition(":")
    try:
        getattr(importlib.import_module(module), function)(context)
    except SkipSection as reason:
        context.skip("section", str(reason))
    except Stop as reason:
        context.require("section", False, str(reason), "runs")
        return supervisor.STOP
    except ModuleNotFoundError as error:
        context.skip("section", str(lacking(error)))
    except Exception as error:
        traceback.print_exc()
        context.require("section", False, described(error), "runs to its end")
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Python's shutdown, in which a thread of a library may abort what has done its work.
    os._exit(status)
