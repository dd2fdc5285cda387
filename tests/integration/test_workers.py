"""Resident workers with real processes: the bytes of a cold stage, whatever is killed on the way."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import bare_loop
from earl import residents
from earl.config import freeze
from earl.execution import processes
from earl.files import manifest
from earl.run.layout import Run
from earl.workers import channel
from earl.workers.pool import VARIABLE, Pool, output_of

OWNER = """
import sys
from earl.workers.opening import open_pool
print(open_pool(float(sys.argv[1])).path, flush=True)
input()
"""


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


class Workplace:
    """A pool with its owner, a process that does nothing else; commands are clients of it."""

    def __init__(self, temporary: Path, idle_seconds: float = 60) -> None:
        without = {key: value for key, value in os.environ.items() if key not in (VARIABLE, processes.WATCHED)}
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(idle_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=without | {"TMPDIR": str(temporary)},
            text=True,
        )
        self.pool = Pool(self.owner.stdout.readline().strip())
        self.env = without | {VARIABLE: self.pool.path}

    def start(self, *arguments: object, **env: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "earl", *map(str, arguments)]
        return subprocess.Popen(command, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        started = self.start(*arguments, **env)
        out, err = started.communicate(timeout=120)
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)

    def good(self, *arguments: object, **env: str) -> str:
        done = self.run(*arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def worker(self, name: str) -> int:
        """Return the process id of a worker that is alive."""
        lock = Path(self.pool.file(f"{name}.worker"))
        assert processes.try_lock(lock) is None, f"{name} is not alive"
        return int(lock.read_text())

    def close(self) -> None:
        """Let the owner end as a workflow does."""
        self.owner.communicate("\n", timeout=60)


def cold(*arguments: object) -> subprocess.CompletedProcess:
    without = {key: value for key, value in os.environ.items() if key not in (VARIABLE, processes.WATCHED)}
    command = [sys.executable, "-m", "earl", *map(str, arguments)]
    return subprocess.run(command, env=without, capture_output=True, text=True)


@contextlib.contextmanager
def workplace(temporary: Path, idle_seconds: float = 60):
    place = Workplace(temporary, idle_seconds)
    yield place
    if place.owner.poll() is None:
        place.close()
    assert not Path(place.pool.path).exists()


@pytest.fixture
def place(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("p")) as place:
        yield place


@pytest.fixture(scope="module")
def expected(small_config) -> Run:
    """Two iterations and four evaluations that were made in one process."""
    residents.clear()
    return bare_loop.run_all(small_config("expected"))


def score(run: Run, out: Path) -> list[object]:
    return ["score", "--config", run.config, "--rollouts", run.iteration(1).rollouts(0), "--out", out]


def generate(run: Run, out: Path, policy: Path | None = None) -> list[object]:
    policy = policy or run.iteration(0).policy
    command = ["generate", "--config", run.config, "--iteration", 1, "--shard", 0]
    return [*command, "--policy", policy, "--out", out]


def copy_of_start(run: Run, folder: Path) -> Run:
    """Return a run that has the same configuration and starting policy, and nothing else yet."""
    copy = Run(folder)
    copy.iteration(0).path.mkdir(parents=True)
    shutil.copy(run.config, copy.config)
    copy.iteration(0).policy.symlink_to(run.iteration(0).policy.resolve())
    return copy


def contents(run: Run) -> dict[str, str]:
    unlike = {"start.json", "performance.json"}  # where the starting policy lies, and how long things took
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name not in unlike]
    return {path.relative_to(run.path).as_posix(): manifest.digest_file(path) for path in files}


@pytest.mark.slow
def test_all_stages_write_the_same_bytes_in_workers(place, expected, tmp_path):
    run = copy_of_start(expected, tmp_path / "run")
    config = ["--config", run.config]

    def evaluate(index: int) -> None:
        for name in ("heldout", "heldout_greedy"):
            files, policy = run.evaluation(name, index), run.iteration(index).policy
            at = ["--iteration", index]
            place.good("generate", *config, *at, "--evaluation", name, "--policy", policy, "--out", files.rollouts)
            place.good("score", *config, "--rollouts", files.rollouts, "--out", files.scores)
            made = ["--rollouts", files.rollouts, "--scores", files.scores, "--out", files.table]
            place.good("evaluate", *config, *at, "--name", name, *made)

    evaluate(0)
    for index in (1, 2):
        here, before = run.iteration(index), run.iteration(index - 1)
        given = ["--iteration", index, "--shard", 0, "--policy", before.policy]
        place.good("generate", *config, *given, "--out", here.rollouts(0))
        assert place.run("train", *config, "--iteration", index, "--run", run.path).returncode == 2, "no scores yet"
        place.good("score", *config, "--rollouts", here.rollouts(0), "--out", here.scores(0))
        said = place.good("train", *config, "--iteration", index, "--run", run.path)
        assert "going on without it" not in said
    evaluate(2)
    assert contents(run) == contents(expected)
    assert {path.stem for path in Path(place.pool.path).glob("*.json")} == {"pool", "engine-0", "judge-0", "learner-0"}


def test_learner_in_memory_is_the_one_on_disk(small_config, expected, tmp_path, caplog):
    """The second iteration finds what the first left, and another one's learner is not taken for it."""
    from earl.config.load import read
    from earl.stages import train

    run = copy_of_start(expected, tmp_path / "run")
    for index in (1, 2):
        for name in ("rollouts", "scores"):
            shutil.copytree(expected.iteration(index).path / name, run.iteration(index).path / name)
    residents.clear()
    with caplog.at_level("INFO"):
        for index in (1, 2, 2, 1):
            train.run(read(run.config), run.path, index)
    found = [record.getMessage().split(" from ")[0] for record in caplog.records if "trainer: " in record.getMessage()]
    assert found == [
        "trainer: iteration 1 starts with a fresh optimizer",
        "trainer: iteration 1 (1 optimizer steps) is in memory",
        "trainer: loaded iteration 1 (1 optimizer steps)",
        "trainer: iteration 1 starts with a fresh optimizer",
    ]
    for index in (1, 2):
        for name in ("policy", "trainer"):
            found, wanted = (getattr(r.iteration(index), name) for r in (run, expected))
            assert manifest.digest_folder(found) == manifest.digest_folder(wanted)


def test_failed_stage_says_what_it_says_cold_and_the_worker_goes_on(place, expected, tmp_path):
    out = tmp_path / "scores.parquet"
    wrong = ["score", "--config", "no.json", "--rollouts", "r.parquet", "--out", out]
    for arguments in (wrong, [*wrong, "--shrad", 3], ["score", "--config"]):
        warm, plain = place.run(*arguments), cold(*arguments)
        assert (warm.returncode, warm.stdout, warm.stderr) == (2, plain.stdout, plain.stderr)
    worker = place.worker("judge-0")
    place.good(*score(expected, out))
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
    assert place.worker("judge-0") == worker


def test_runs_share_a_worker(place, expected, small_config, tmp_path):
    other = copy_of_start(expected, tmp_path / "other")
    freeze.write(small_config("other", max_failed_fraction=0.5), other.config, accept_changes=True)
    shutil.copytree(expected.iteration(1).path / "rollouts", other.iteration(1).path / "rollouts")
    workers = set()
    for run in (expected, other, expected):
        place.good(*score(run, tmp_path / "scores.parquet"))
        workers.add(place.worker("judge-0"))
        assert (tmp_path / "scores.parquet").read_bytes() == expected.iteration(1).scores(0).read_bytes()
    assert len(workers) == 1


@pytest.mark.slow
def test_policy_that_changed_under_its_path_is_loaded_again(place, expected, tmp_path):
    policy, out = tmp_path / "policy", tmp_path / "rollouts.parquet"
    for index in (0, 1, 0):
        shutil.rmtree(policy, ignore_errors=True)
        shutil.copytree(expected.iteration(index).policy, policy)
        place.good(*generate(expected, out, policy))
        if index == 0:
            assert out.read_bytes() == expected.iteration(1).rollouts(0).read_bytes()
        else:
            plain = tmp_path / "plain.parquet"
            assert cold(*generate(expected, plain, policy)).returncode == 0
            assert out.read_bytes() == plain.read_bytes()


@contextlib.contextmanager
def asked(place: Workplace, arguments: list[object]):
    """Start a client whose worker has its command, and cannot go on before the block ends: its output is taken."""
    with place.pool.writing([str(word) for word in arguments]):
        client = place.start(*arguments)
        wait_until(lambda: processes.try_lock(place.pool.file("judge-0.worker")) is None)
        wait_until(lambda: Path(place.pool.file("judge-0.json")).exists())
        wait_until(lambda: any("-> POSIX" in line and str(place.worker("judge-0")) in line.split() for line in locks()))
        yield client


def locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


def test_killed_worker_leaves_the_stage_to_its_client(place, expected, tmp_path):
    out = tmp_path / "scores.parquet"
    with asked(place, score(expected, out)) as client:
        os.kill(place.worker("judge-0"), signal.SIGKILL)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 0, said
    assert "judge-0: the other side closed the connection; going on without it" in said
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()


def test_worker_ends_with_a_client_that_is_killed(place, expected, tmp_path):
    out = tmp_path / "scores.parquet"
    with asked(place, score(expected, out)) as client:
        worker = place.worker("judge-0")
        client.kill()
        client.communicate()
        wait_until(lambda: not processes.is_alive(worker))
    assert not out.exists()
    place.good(*score(expected, out))
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_two_clients_write_one_after_the_other(place, expected, tmp_path):
    out = tmp_path / "scores.parquet"
    with asked(place, score(expected, out)) as first:
        second = place.start(*score(expected, out))
        wait_until(lambda: Path(place.pool.file("judge-1.json")).exists())
        assert (first.poll(), second.poll(), out.exists()) == (None, None, False)
    for client in (first, second):
        _, said = client.communicate(timeout=60)
        assert client.returncode == 0, said
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()


def test_worker_ends_with_the_process_that_opened_the_pool(place, expected, tmp_path):
    place.good(*score(expected, tmp_path / "a.parquet"))
    idle = place.worker("judge-0")
    with asked(place, score(expected, tmp_path / "b.parquet")) as client:
        place.owner.kill()
        place.owner.communicate()
        wait_until(lambda: not processes.is_alive(idle))
        # One that was started by a workflow would end with it, too; this one is on its own now.
        assert client.wait(timeout=60) == 0
        assert not Path(place.pool.path).exists()
    client.communicate()


def test_idle_worker_ends_and_comes_back(expected, tmp_path, tmp_path_factory):
    out = tmp_path / "scores.parquet"
    with workplace(tmp_path_factory.mktemp("p"), idle_seconds=0.2) as place:
        for _ in range(2):
            out.unlink(missing_ok=True)
            assert "going on" not in place.good(*score(expected, out))
            assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
            wait_until(lambda: processes.try_lock(place.pool.file("judge-0.worker")) is not None)


def test_worker_of_another_environment_is_replaced(place, expected, tmp_path):
    place.good(*score(expected, tmp_path / "a.parquet"))
    first = place.worker("judge-0")
    place.good(*score(expected, tmp_path / "b.parquet"), CUDA_VISIBLE_DEVICES="3")
    second = place.worker("judge-0")
    assert not processes.is_alive(first)
    place.good(*score(expected, tmp_path / "c.parquet"), CUDA_VISIBLE_DEVICES="3")
    assert place.worker("judge-0") == second


def test_worker_at_a_port(place, expected, tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-m", "earl", "worker", "--pool", place.pool.path, "--name", "judge-0", "--host", "127.0.0.1"],
        env=place.env | {"OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
    )
    assert worker.stdout.readline() == b"listening\n"
    out = tmp_path / "scores.parquet"
    place.good(*score(expected, out))
    assert place.worker("judge-0") == worker.pid
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
    place.close()
    worker.communicate(timeout=60)


def test_without_a_pool_that_is_alive_a_stage_runs_cold(place, expected, tmp_path):
    place.owner.kill()
    place.owner.communicate()
    out = tmp_path / "scores.parquet"
    place.good(*score(expected, out))
    assert out.read_bytes() == expected.iteration(1).scores(0).read_bytes()
    assert not list(Path(place.pool.path).glob("judge*"))
    # It had no worker that could take it along; the next pool does, and leaves alone what is just being opened.
    folder = Path(place.pool.path).parent
    half_removed, being_opened = folder / "earl-workers-old", folder / "earl-workers-new"
    for path in (half_removed, being_opened):
        path.mkdir()
        (path / "engine-0.sock").touch()
    os.utime(half_removed, (0, 0))
    with workplace(folder) as other:
        assert set(folder.iterdir()) == {Path(other.pool.path), being_opened}


@pytest.fixture(scope="module")
def shared(expected, tmp_path_factory):
    """A pool whose judge is up."""
    with workplace(tmp_path_factory.mktemp("p")) as place:
        place.good(*score(expected, tmp_path_factory.mktemp("first") / "scores.parquet"))
        yield place


@pytest.fixture
def address(shared) -> str:
    return f"unix:{shared.pool.file('judge-0.sock')}"


class TestStrangers:
    """Who does not know the secret, or speaks no protocol, gets nothing, and is in nobody's way."""

    def test_wrong_secret(self, shared, address, expected, tmp_path):
        with pytest.raises(channel.ProtocolError, match=r"closed the connection|broke off"):
            channel.connect(address, b"x" * 32)
        shared.good(*score(expected, tmp_path / "again.parquet"))

    def test_worker_that_does_not_know_the_secret(self):
        ours, theirs = socket.socketpair()
        impostor = channel.Channel(theirs)
        impostor.send({"challenge": "0" * 64})
        impostor.send({"answer": "0" * 64})
        with pytest.raises(channel.ProtocolError, match="the worker does not know the secret"):
            channel._proved(ours, b"secret", mine="client", other="worker")

    def test_answer_sent_back_is_no_answer(self):
        """Someone who sends a side's own challenge and answer back to it has proved nothing."""
        ours, theirs = socket.socketpair()
        mirror = channel.Channel(theirs)
        mirror.send({"challenge": "0" * 64})

        def reflect() -> None:
            mirror.receive()
            mirror.send(mirror.receive())

        thread = threading.Thread(target=reflect)
        thread.start()
        with pytest.raises(channel.ProtocolError, match="the worker does not know the secret"):
            channel._proved(ours, b"secret", mine="client", other="worker")
        thread.join()

    @pytest.mark.parametrize(
        "sent",
        [b"", b"GET / HTTP/1.0\r\n\r\n", struct.pack("!I", 3) + b"[1]", struct.pack("!I", 2**31), b"\0\0\0\2\x80\x04"],
    )
    def test_no_protocol(self, shared, address, sent, expected, tmp_path):
        worker = shared.worker("judge-0")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(address.removeprefix("unix:"))
            stranger.sendall(sent)
        shared.good(*score(expected, tmp_path / "again.parquet"))
        assert shared.worker("judge-0") == worker

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            ({}, "argv"),
            ({"argv": "score"}, "argv"),
            ({"argv": ["score", 3]}, "argv"),
            ({"argv": []}, "holds the judge"),
            ({"argv": ["train"]}, "holds the judge"),
            ({"argv": ["judge", "serve"]}, "holds the judge"),
        ],
    )
    def test_no_request(self, shared, address, request_, reason):
        known = channel.connect(address, shared.pool.secret)
        known.send(request_)
        assert reason in known.receive()["refused"]

    def test_files_are_for_their_user_alone(self, shared):
        assert Path(shared.pool.path).stat().st_mode & 0o777 == 0o700
        assert Path(shared.pool.file("secret")).stat().st_mode & 0o777 == 0o600


def test_what_a_command_writes():
    assert output_of(["score", "--config", "c", "--out", "/a/b"]) == "/a/b"
    assert output_of(["score", "--out=/a/../b"]) == "/b"
    train = ["train", "--run", "/r", "--iteration"]
    assert output_of([*train, "1"]) == output_of(["train", "--iteration", "1", "--run=/r/"])
    assert len({output_of([*train, "1"]), output_of([*train, "2"]), output_of(["prune", "--run", "/r"])}) == 3


def test_client_imports_nothing_heavy():
    code = "import sys; from earl.workers import client; client.run(['score']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pydantic", "typer", "pyarrow", "jinja2", "earl.cli", "earl.config", "earl.residents"}
    assert not heavy & set(done.stdout.split())


class TestResidents:
    @pytest.fixture(autouse=True)
    def nothing_kept(self):
        residents.clear()
        yield
        residents.clear()

    def test_one_value_of_a_kind_and_the_old_one_goes_before_the_new_one_is_made(self):
        class Value:
            alive = 0

            def __init__(self) -> None:
                assert Value.alive == 0
                Value.alive += 1

            def __del__(self) -> None:
                Value.alive -= 1

        for key in (1, 1, 2, 1):
            residents.get("kind", key, Value)
        assert Value.alive == 1
        residents.clear()
        assert Value.alive == 0

    def test_what_is_let_go_of_is_closed(self):
        closed = []

        class Value:
            def __init__(self, name: str) -> None:
                self.close = lambda: closed.append(name)

        residents.get("kind", 1, lambda: Value("first"))
        residents.get("kind", 2, lambda: Value("second"))
        assert closed == ["first"]
        residents.put("kind", 3, residents.take("kind", 2))
        assert closed == ["first"], "its user has it"
        residents.clear()
        assert closed == ["first", "second"]

    def test_taken_is_gone(self):
        residents.put("kind", 1, "value")
        assert residents.take("kind", 1) == "value"
        assert residents.take("kind", 1) is None

    def test_another_key_finds_nothing_and_leaves_nothing(self):
        residents.put("kind", 1, "value")
        residents.put("other", 1, "other value")
        assert residents.take("kind", 2) is None
        assert residents.take("kind", 1) is None
        assert residents.get("other", 1, lambda: "made") == "other value"
