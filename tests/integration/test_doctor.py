"""The doctor's findings, on this machine: alone, and as two ranks."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from earl import doctor
from earl.doctor import machine, network, together
from earl.doctor.wanted import Needs, Wanted
from earl.execution import gpus

ROOT = Path(__file__).parents[2]
NOTHING = Needs(0)
CHECKS = 10


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What the job of this test was given does not matter."""
    names = [
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "RANK",
        "MASTER_ADDR",
        network.GLOO,
        network.NCCL,
        gpus.VISIBLE,
    ]
    for name in (*names, *gpus.SLURM_LISTS, *gpus.SLURM_COUNTS):
        monkeypatch.delenv(name, raising=False)


def found(wanted: Wanted) -> dict[str, tuple[bool | None, str]]:
    return {finding.check: (finding.passed, finding.detail) for _, finding in doctor.examine(wanted)}


def test_a_sound_node_passes_and_nothing_is_left(tmp_path):
    checks = found(Wanted(tmp_path / "runs", gpus=0, disk=NOTHING))
    assert {name: passed for name, (passed, _) in checks.items()} == {
        "network": None, "all reduce": None, "versions": True, "gpus": None, "memory": True,
        "shared memory": checks["shared memory"][0], "disk": True, "clock": True, "shared files": True, "judge": None,
        "fit": None,
    }  # fmt: skip
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_missing_is_named(tmp_path):
    too_much = Needs(2**60, "a checkpoint of a very large policy")
    wanted = Wanted(tmp_path, gpus=64, judge=str(tmp_path / "judge.host"), disk=too_much, memory=too_much)
    checks = found(wanted)
    failed = {name for name, (passed, _) in checks.items() if passed is False}
    assert failed - {"shared memory"} == {"gpus", "memory", "disk", "judge"}
    assert "64 asked for" in checks["gpus"][1]
    for name in ("memory", "disk"):
        assert "GB free of 1152921505 GB needed (a checkpoint of a very large policy)" in checks[name][1]
    assert "judge.host: the file is not there yet" in checks["judge"][1]


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path):
    (tmp_path / "file").write_text("")
    checks = found(Wanted(tmp_path / "file" / "runs"))
    assert "file" in checks["disk"][1]
    assert [checks[name][0] for name in ("disk", "clock", "shared files")] == [False, False, False]


def test_gpus_that_the_job_was_given_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine.gpus(Wanted(tmp_path))[0] is None
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    passed, told = machine.gpus(Wanted(tmp_path))
    assert passed is False
    assert "SLURM_JOB_GPUS=0,1, but torch" in told
    assert machine.gpus(Wanted(tmp_path, gpus=0))[0] is None


@pytest.fixture
def two_gpus(monkeypatch):
    """Of 80 and of 40 GB; the product on the second is wrong where the test says so."""
    sizes = {0: 80e9, 1: 40e9}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (1e9, sizes[index]))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"H{sizes[index] / 1e9:.0f}")
    monkeypatch.setattr(machine, "multiplies", lambda device: True)
    return monkeypatch


def test_every_gpu_is_looked_at(two_gpus, tmp_path):
    assert machine.gpus(Wanted(tmp_path)) == (True, "2: H80 1/80 GB free, H40 1/40 GB free")
    passed, told = machine.gpus(Wanted(tmp_path, gpus=4))
    assert passed is False
    assert told.startswith("2 of 4 asked for: H80")
    two_gpus.setattr(machine, "multiplies", lambda device: device == "cuda:0")
    assert machine.gpus(Wanted(tmp_path))[0] is False


def test_stages_have_to_fit_on_the_smallest_gpu(two_gpus, tmp_path):
    asked = []

    def misfits(name: str, size: int, count: int) -> list[str]:
        asked.append((name, size, count))
        return ["iterate: train_processes = 1: needs more"] * (size < 80e9)

    wanted = Wanted(tmp_path, misfits=misfits)
    assert machine.fit(wanted) == (False, "iterate: train_processes = 1: needs more")
    assert asked == [("H40", 40e9, 2)]
    two_gpus.setattr("torch.cuda.mem_get_info", lambda index: (1e9, 81e9))
    assert machine.fit(wanted) == (True, "every stage fits on 2 times H40, 81 GB")
    assert machine.fit(Wanted(tmp_path))[0] is None
    two_gpus.setattr("torch.cuda.is_available", lambda: False)
    assert machine.fit(wanted)[0] is None


VERSIONS = {
    1: ("9:cpu:/\n4:memory:/slurm/job_1\n0::/\n", "memory", "limit_in_bytes", "usage_in_bytes", "total_"),
    2: ("0::/slurm/job_1\n", "", "max", "current", ""),
}
"""Of control groups: what a process reads of its own, their folder, and names."""


@pytest.mark.parametrize("version", [1, 2])
def test_memory_ends_where_a_control_group_does(tmp_path, version):
    """A job of 1,000 bytes that uses 500, of which 150 hold files, in a group of 4,000 that uses 1,100."""
    said, controller, limit, usage, prefix = VERSIONS[version]
    top = tmp_path / "cgroup" / controller

    def group(path: str, most: str, used: int, files: tuple[int, int] = (0, 0)) -> None:
        (top / path).mkdir(parents=True, exist_ok=True)
        (top / path / f"memory.{limit}").write_text(f"{most}\n")
        (top / path / f"memory.{usage}").write_text(f"{used}\n")
        active, inactive = files
        stat = f"anon 7\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\nother_active_file 9\n"
        (top / path / "memory.stat").write_text(stat)

    def left() -> list[int]:
        return list(machine._left_in_groups(tmp_path / "cgroup", tmp_path / "own"))

    (tmp_path / "own").write_text(said)
    group("slurm", "4000", 1100)
    group("slurm/job_1", "1000", 500, (100, 50))
    assert left() == [650, 2900]
    group("slurm/job_1", "max" if version == 2 else "9223372036854771712", 500)
    assert min(left()) == 2900


def test_little_shared_memory_fails_where_gpus_work_together(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LEAST_SHARED", 2**60)
    assert machine.shared_memory(Wanted(tmp_path))[0] is None
    passed, told = machine.shared_memory(Wanted(tmp_path, splits_gpus=True))
    assert passed is False
    assert "--shm-size" in told
    monkeypatch.setattr(machine, "LEAST_SHARED", 0)
    assert machine.shared_memory(Wanted(tmp_path, splits_gpus=True))[0] is True


@pytest.fixture
def node(monkeypatch):
    """One of two nodes of a job, with three interfaces; its name has the address of the second."""
    there = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "ib0": "10.1.0.2"}
    monkeypatch.setattr(network, "interfaces", lambda: there)
    monkeypatch.setattr(network, "_own_address", lambda: "10.0.0.2")
    monkeypatch.setattr(network, "_towards_first", lambda interfaces: "eth0")
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_interfaces_that_ranks_meet_by_are_said(node):
    passed, told = network.check()
    assert passed is True
    assert told == "lo 127.0.0.1, eth0 10.0.0.2, ib0 10.1.0.2; gloo takes eth0, NCCL ib0"


def test_a_node_whose_name_is_the_loopback_is_not_reached_by_gloo(node):
    node.setattr(network, "_own_address", lambda: "127.0.1.1")
    passed, told = network.check()
    assert passed is False
    assert "has the address 127.0.1.1, which other nodes cannot reach; export GLOO_SOCKET_IFNAME=eth0" in told
    node.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert network.check()[0] is True
    node.delenv("GLOO_SOCKET_IFNAME")
    node.setenv("LOCAL_WORLD_SIZE", "4")
    assert network.check()[0] is None, "of one node, the loopback is enough"


@pytest.mark.parametrize(
    ("variable", "value", "passed"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth1,ib0", True),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "eno,bond", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
    ],
)
def test_an_interface_that_the_environment_names_has_to_be_there(node, variable, value, passed):
    node.setenv(variable, value)
    is_right, told = network.check()
    assert is_right is passed
    assert f"{variable}={value}" in told
    assert (f"{variable}={value} names none that has an address here" in told) is not passed


def test_this_machine_has_a_loopback():
    assert network.interfaces()["lo"] == "127.0.0.1"


class TwoRanks:
    """Ranks whose clocks are so many seconds apart."""

    rank, count, connected = 0, 2, True

    def __init__(self, apart: float) -> None:
        self.apart = apart

    def gather(self, value):
        return [value, value + self.apart if isinstance(value, float) else value]


@pytest.mark.parametrize(("apart", "passed"), [(0.5, True), (-3.0, False), (90.0, False)])
def test_clocks_of_ranks_are_compared(tmp_path, apart, passed):
    is_right, told = together.clock(Wanted(tmp_path), TwoRanks(apart))
    assert is_right is passed
    assert f"{abs(apart):.1f} s between ranks" in told


class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 200 if self.headers.get("Authorization") == "Bearer secret" else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "a-judge"}]}).encode())

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("key", "finding"), [("secret", (True, "a-judge")), ("", (False, "HTTP 401"))])
def test_the_judge_is_asked_what_it_serves(tmp_path, monkeypatch, key, finding):
    monkeypatch.setenv("EARL_JUDGE_API_KEY", key)
    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        passed, detail = doctor.judge.check(Wanted(tmp_path, judge=f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
    assert passed == finding[0]
    assert finding[1] in detail


@pytest.mark.slow
def test_ranks_are_checked_together(tmp_path):
    command = [sys.executable, "-m", "earl", "doctor", "--path", tmp_path, "--minimum-free", "0", "--gpus", "0"]
    command += ["--processes", "2"]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert ["rank 0" in line for line in lines] == [True] * CHECKS + [False] * CHECKS
    assert sum("2 ranks at" in line and "gloo" in line for line in lines) == 2
    assert "FAILED" not in ended.stdout
