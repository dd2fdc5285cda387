"""`make` as a person calls it: nothing of a `make` that runs the tests is passed on."""

import os
import subprocess
from pathlib import Path

from earl.execution import processes


def make(folder: Path, *arguments: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess:
    """Run `make` in `folder`; a program in `first_on_path` goes before others of its name."""
    # Variables, flags and level of the `make` around; and whose process this one would end with.
    given_to_it = {word.partition("=")[0] for word in os.environ.get("MAKEFLAGS", "").split() if "=" in word}
    left_out = {name for name in os.environ if name.startswith("MAKE")} | given_to_it | {processes.WATCHED}
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    if first_on_path is not None:
        env["PATH"] = f"{first_on_path}:{env['PATH']}"
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
