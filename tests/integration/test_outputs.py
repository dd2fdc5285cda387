"""What an output may be written onto, and what a full disk leaves behind."""

import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from earl import cli
from earl.execution import processes
from earl.files import atomic, manifest
from earl.messages.errors import EarlError
from earl.run import state as progress
from tests.support import run_files


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
    "data fetch": "data fetch omniedit --out {out}",
    "import-config": "import-config missing.jsonnet --out {out}",
    "convert model": "convert model missing --out {out}",
    "convert data": "convert data missing.json --out {out}",
    "download": "download hf://datasets/a/b/c.parquet --out {out}",
    "judge check": "judge check --config missing.json --out {out}",
    "tokenise": "tokenise --config missing.json --dataset d --raw r --out {out}",
    "select": "select --config missing.json --name n --out {out}",
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
    "export": "export --policy missing --config missing.json --out {out}",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_before_it_works(command, tmp_path, capsys):
    """The refusal comes before any complaint about the inputs, which do not exist."""
    fifo(tmp_path / "out")
    assert cli.call(command.format(out=tmp_path / "out").split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: is a FIFO")
    assert (tmp_path / "out").is_fifo()


REPLACING = {name: command for name, command in COMMANDS.items() if name != "replay"}
"""`earl replay` fills a folder."""


@pytest.mark.parametrize("command", REPLACING.values(), ids=REPLACING)
def test_every_command_refuses_a_folder_of_other_files(command, tmp_path, capsys):
    (tmp_path / "out" / "holiday").mkdir(parents=True)
    (tmp_path / "out" / "holiday" / "beach.jpg").write_text("mine")
    assert cli.call(command.format(out=tmp_path / "out").split()) == 2
    assert f"error: {tmp_path / 'out'}: would be replaced as a whole, but holiday/beach.jpg" in capsys.readouterr().err
    assert (tmp_path / "out" / "holiday" / "beach.jpg").read_text() == "mine"


def test_a_folder_is_replaced_where_it_holds_what_a_stage_wrote_and_nothing_else(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    made = ["shapes", "policy", "--out", str(out)]
    assert cli.call(made) == 0  # an empty one is as good as none
    assert cli.call([*made, "--seed", "1"]) == 0
    digest = manifest.digest_folder(out)
    (out / "notes").symlink_to(tmp_path / "nothing")
    assert cli.call(made) == 2
    assert "but notes in it is not from the stage" in capsys.readouterr().err
    (out / "notes").unlink()
    (out / "manifest.json").write_text("{}")
    assert cli.call(made) == 2
    assert f"{out / 'manifest.json'}: is damaged" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    assert cli.call(made) == 2
    assert manifest.seal(out) == digest
    # A workflow's own folder, of which Snakemake has removed the manifest; it stays until the new one is whole.
    (out / "manifest.json").unlink()
    monkeypatch.setenv(processes.WATCHED, "elsewhere::1")
    assert cli.call(made) == 0
    assert manifest.check(out)
    assert manifest.digest_folder(out) != digest


def test_every_option_that_names_an_output_is_covered():
    import typer

    def options(group, prefix=""):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from options(command, f"{prefix}{name} ")
            elif any({"--out", "--host-file"} & set(parameter.opts) for parameter in command.params):
                yield f"{prefix}{name}"

    assert set(options(typer.main.get_command(cli.app))) == set(COMMANDS)


# A full disk

WRITERS = {
    "policy": """
import torch
from earl.emu3 import checkpoint, saving
base = Path(checkpoint.__file__).parent.parent / "shapes" / "base_policy"
model = checkpoint.load_policy(base, torch.float32, "cpu")
with atomic.folder(place / "out") as temporary:
    saving.save_policy(model, temporary, saving.companions(base))
""",
    "trainer": """
import torch
from earl.learner import grpo, trainer_state
from earl.execution import ranks
model = torch.nn.Linear(512, 512)
team, state = ranks.alone(torch.device("cpu")), trainer_state.TrainerState(1, 0, "p", "c", "v")
with atomic.folder(place / "out") as temporary:
    trainer_state.save(temporary, model, grpo.new_optimizer(model, 1e-3), state, team)
""",
    "table": """
import numpy, pyarrow
from earl.files import tables
schema = pyarrow.schema([pyarrow.field("x", pyarrow.float64())])
tables.write_table(place / "out", schema, {"x": numpy.random.default_rng(0).random(200_000)}, {})
""",
    "text": "atomic.write_text(place / 'out', 'x' * 2_000_000)",
    "JSON": "objects.write(place / 'out', {'x': 'x' * 2_000_000})",
    "picture": """
import numpy
from earl.files import images
with atomic.file(place / "out") as temporary:
    temporary.write_bytes(images.encode(numpy.random.default_rng(0).integers(0, 256, (512, 512, 3), numpy.uint8)))
""",
    "cache of answers": """
from earl.judges.cache import Cache
cache = Cache(place / "answers.sqlite")
for number in range(100):
    cache.put(str(number), "x" * 20_000)
""",
}
FRAME = """
import os, sys
from pathlib import Path
from earl.messages.errors import EarlError
from earl.files import atomic, objects
place = Path(sys.argv[1])
try:
    exec(sys.argv[2])
except EarlError as error:
    print("said:", error)
print("left:", [name for name in os.listdir(place) if not name.startswith("answers.sqlite")])
"""
SMALL = 400_000
"""Bytes: enough for what a writer begins with, too little for its end."""


def with_little_space(place: Path, code: str) -> str:
    """Run code where only SMALL bytes can be written: on a file system of that size, or where none may be mounted, in a
    process that may write no larger file. Return what it printed."""
    command = [sys.executable, "-c", FRAME, str(place), code]
    mounted = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
    tiny = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounted, str(SMALL), str(place)]
    done = subprocess.run([*tiny, *command], capture_output=True, text=True, check=False)
    if "said:" not in done.stdout and "left:" not in done.stdout and not done.stderr.startswith("Traceback"):
        limit = (resource.RLIMIT_FSIZE, (SMALL, SMALL))
        done = subprocess.run(
            command, preexec_fn=lambda: resource.setrlimit(*limit), capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, writer):
    said, left = with_little_space(tmp_path, writer).splitlines()
    assert said.startswith(f"said: {tmp_path}/")
    assert "No space left on device" in said or "File too large" in said or "disk is full" in said or "disk I/O" in said
    assert "ree space" in said
    assert "remove" not in said
    assert left == "left: []"


def test_what_waits_for_its_next_writer_is_not_said_to_be_gone(tmp_path):
    code = """
with atomic.resumable_folder(place / "out", "x") as unfinished:
    atomic.write_text(unfinished / "0000", "done")
    (unfinished / "0001").write_text("x" * 2_000_000)
"""
    said, left = with_little_space(tmp_path, code).splitlines()
    assert f"what is done waits in {tmp_path / '.out.unfinished'}. Free space" in said
    assert ".out.unfinished" in left


def test_a_refusal_of_the_system_that_nobody_foresaw_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(progress, "status", full)
    assert cli.call(["status", "--run", str(run_files.new_run(tmp_path / "run")[0].path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'x'}: No space left on device; free space or check permissions, then try again\n"
    )
