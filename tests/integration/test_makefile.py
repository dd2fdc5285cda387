"""What `make` says where it cannot go on, and what it installs into: with a stand-in for Python and pip, no network."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `make` reads."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def python(path: Path, version: tuple[int, int, int]) -> Path:
    """Write a stand-in for a Python of another version: it tells it, makes environments, and writes down the rest."""
    pretended = f"import sys; sys.version_info = ({version[0]}, {version[1]}, {version[2]}, 'final', 0); "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then exec {shlex.quote(sys.executable)} -c "{pretended}$2"; fi\n'
        f'echo "$(basename "$0") $*" >> {shlex.quote(str(path.parent.parent / "asked"))}\n'
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"; fi\n'
    )
    path.chmod(0o755)
    return path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True)


def refusal(done: subprocess.CompletedProcess) -> str:
    """Return the one line that was said."""
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("target", ["demo", "matrix", "test", "lint", "venv"])
@pytest.mark.parametrize("version", [(3, 10, 13), (2, 7, 18)])
def test_an_old_python_is_refused_in_one_line(checkout, tmp_path, target, version) -> None:
    old = python(tmp_path / "bin" / "python-old", version)
    line = refusal(make(checkout, target, f"PYTHON={old}"))
    assert ".".join(map(str, version)) in line
    assert "3.11 or newer" in line
    assert f"make {target} PYTHON=" in line
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("installed", [False, True])
def test_an_environment_of_an_old_python_is_refused_in_one_line(checkout, tmp_path, installed) -> None:
    python(checkout / ".venv" / "bin" / "python", (3, 10, 13))
    (checkout / ".venv" / "pyvenv.cfg").touch()
    if installed:
        (checkout / ".venv" / ".installed").touch()
    line = refusal(make(checkout, "demo"))
    assert ".venv" in line
    assert "3.10.13" in line
    assert "rm -r .venv" in line
    assert (checkout / ".venv" / "bin" / "python").exists()


def test_what_does_not_start_is_told(checkout, tmp_path) -> None:
    assert "no-such-python does not start" in refusal(make(checkout, "demo", "PYTHON=no-such-python"))
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "pyvenv.cfg").touch()
    (checkout / ".venv" / "bin" / "python").symlink_to("/no/such/python")
    line = refusal(make(checkout, "demo"))
    assert "does not start" in line
    assert "rm -r .venv" in line


def test_an_environment_that_is_there_is_used_whatever_python3_is(checkout, tmp_path) -> None:
    """A changed pyproject.toml is installed into it; no second environment is laid over it."""
    python(checkout / ".venv" / "bin" / "python", (3, 13, 0))
    (checkout / ".venv" / "pyvenv.cfg").touch()
    old = python(tmp_path / "bin" / "python-old", (3, 10, 13))
    assert make(checkout, "venv", f"PYTHON={old}").returncode == 0
    asked = (checkout / ".venv" / "asked").read_text()
    assert "pip install" in asked
    assert "-m venv" not in asked
    assert not (tmp_path / "asked").exists()


def test_a_new_environment_is_made_once(checkout, tmp_path) -> None:
    new = python(tmp_path / "bin" / "python-new", (3, 12, 1))
    assert make(checkout, "venv", f"PYTHON={new}").returncode == 0
    assert make(checkout, "venv", f"PYTHON={new}").returncode == 0
    first, *rest = (tmp_path / "asked").read_text().splitlines()
    assert first == "python-new -m venv .venv"
    assert sum("pip install" in line for line in rest) == len(rest) == 1
