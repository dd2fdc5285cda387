"""What an output may be written onto, and what a full disk leaves behind."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from earl import cli
from earl.errors import EarlError
from earl.files import atomic


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


def link_to_a_file(path: Path) -> None:
    path.with_name("notes").write_text("mine")
    path.symlink_to("notes")


def link_to_a_folder(path: Path) -> None:
    path.with_name("pictures").mkdir()
    (path.with_name("pictures") / "a").write_text("mine")
    path.symlink_to("pictures", target_is_directory=True)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


ODD = {
    "FIFO": (fifo, "is a FIFO"),
    "socket": (bound_socket, "is a socket"),
    "link to a file": (link_to_a_file, "is a symbolic link to .*notes"),
    "link to a folder": (link_to_a_folder, "is a symbolic link to .*pictures"),
    "dangling link": (link_to_nothing, "is a symbolic link to .*nothing"),
}


@pytest.fixture(params=ODD)
def odd(request, tmp_path, monkeypatch):
    """A path where something stands that no output may replace, and what the refusal says of it."""
    monkeypatch.chdir(tmp_path)
    make, words = ODD[request.param]
    make(tmp_path / "out")
    return tmp_path / "out", words


def state(folder: Path) -> dict[str, tuple[int, str | None]]:
    return {
        path.name: (path.lstat().st_mode, os.readlink(path) if path.is_symlink() else None)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("writer", [atomic.file, atomic.folder, lambda path: atomic.resumable_folder(path, "x")])
def test_only_files_and_folders_are_replaced(odd, writer):
    path, words = odd
    before = state(path.parent)
    with pytest.raises(EarlError, match=rf"{path}: {words}"), writer(path):
        pytest.fail("the writer began")
    assert state(path.parent) == before


@pytest.mark.parametrize("writer", [atomic.folder, lambda path: atomic.resumable_folder(path, "x")])
def test_a_folder_does_not_replace_a_file(tmp_path, writer):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(EarlError, match=r"out: is a file; .*folder"), writer(tmp_path / "out"):
        pytest.fail("the writer began")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(EarlError, match=r"out: is a folder; .*file"), atomic.file(tmp_path / "out"):
        pytest.fail("the writer began")
    assert os.listdir(tmp_path) == ["out"]


def test_a_device_is_refused():
    # Asked, not tried: a writer that got this wrong would take /dev/null from the whole machine.
    with pytest.raises(EarlError, match="/dev/null: is a device"):
        atomic.check_target("/dev/null")


COMMANDS = {
    "shapes raw": "shapes raw --count 1 --seed 1 --out {out}",
    "shapes policy": "shapes policy --out {out}",
    "convert model": "convert model missing --out {out}",
    "convert data": "convert data missing.json --out {out}",
    "download": "download hf://datasets/a/b/c.parquet --out {out}",
    "judge check": "judge check --config missing.json --out {out}",
    "tokenise": "tokenise --config missing.json --dataset d --raw r --out {out}",
    "sft": "sft --config missing.json --name n --out {out}",
    "generate": "generate --config missing.json --iteration 1 --policy p --shard 0 --out {out}",
    "score": "score --config missing.json --rollouts r --out {out}",
    "evaluate": "evaluate --config missing.json --name n --iteration 1 --rollouts r --scores s --out {out}",
    "compare": "compare --run a --out {out}",
    "report": "report --run a --out {out}",
    "replay": "replay --run a --out {out}",
    "track": "track --run a --out {out}",
    "push": "push --run a --out {out}",
    "verify": "verify --run a --out {out}",
    "judge serve": "judge serve --host-file {out}",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_before_it_works(command, tmp_path, capsys):
    """The refusal comes before any complaint about the inputs, which do not exist."""
    fifo(tmp_path / "out")
    assert cli.call(command.format(out=tmp_path / "out").split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: is a FIFO")
    assert (tmp_path / "out").is_fifo()


def test_every_option_that_names_an_output_is_covered():
    import typer

    def options(group, prefix=""):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from options(command, f"{prefix}{name} ")
            elif any({"--out", "--host-file"} & set(parameter.opts) for parameter in command.params):
                yield f"{prefix}{name}"

    assert set(options(typer.main.get_command(cli.app))) == set(COMMANDS)
