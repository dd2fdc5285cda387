"""GPUs of one machine without Slurm: each stage waits for as many as it needs, and sees those alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from earl import cli
from earl.config import freeze
from earl.config.schema import Config
from earl.execution import gpus
from earl.judges import server
from earl.messages.errors import EarlError
from earl.run import claims
from tests.support.evaluation_files import demo_config
from tests.support.programs import program

CLAIM = """
import os, sys
from earl.execution import gpus
gpus.claim(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


class Machine:
    """GPUs, by the environment of those who claim them."""

    def __init__(self, folder: Path, visible: str) -> None:
        unwanted = ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.env = inherited | {"TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": visible}

    def claim(self, count: int, **env: str) -> subprocess.Popen:
        """Start a process that claims GPUs, says which and holds them until it ends."""
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(count)],
            env=self.env | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, "3,5,7")


def got(claimed: subprocess.Popen) -> str:
    return claimed.stdout.readline().strip()


def test_each_process_has_gpus_of_its_own(machine):
    first, second = machine.claim(2), None
    try:
        assert got(first) == "3,5"
        second = machine.claim(1)
        assert got(second) == "7"
    finally:
        for each in filter(None, (first, second)):
            each.communicate()


def test_who_finds_too_few_waits_and_holds_none_meanwhile(machine):
    first = machine.claim(2)
    assert got(first) == "3,5"
    waiting = machine.claim(2)
    third = machine.claim(1)
    # Were the one that is left held by the process that waits, this one would never get it.
    assert got(third) == "7"
    first.kill()
    first.communicate()
    assert got(waiting) == "3,5", "locks end with their process, however it ends"
    for each in (waiting, third):
        each.communicate()


def test_gpus_of_one_slurm_job_are_not_those_of_another(machine):
    first = machine.claim(3, SLURM_JOB_ID="7")
    second = machine.claim(3, SLURM_JOB_ID="8")
    assert got(first) == got(second) == "3,5,7"
    for each in (first, second):
        each.communicate()


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """This process, with no GPU claimed; returns the folder for stand-ins of programs."""
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "locks"))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back, whatever a claim sets
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv(gpus.CLAIMED, "")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    (tmp_path / "locks").mkdir()
    return programs


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)
  MIG 1g.10gb     Device  0: (UUID: MIG-b)
  MIG 2g.20gb     Device  1: (UUID: MIG-GPU-a/1/0)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-d1)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-e1)
"""


@pytest.fixture
def listed(alone):
    """A machine with two whole GPUs and one that is divided."""
    program(alone, "nvidia-smi", f"/bin/cat <<'END'\n{LISTED}END")
    return alone


def test_mig_devices_are_gpus_of_their_own(listed, monkeypatch):
    assert [gpu.name for gpu in gpus.visible()] == ["MIG-b", "MIG-GPU-a/1/0", "GPU-d1", "GPU-e1"]
    taken = []
    for _ in range(4):
        gpus.claim(1)
        taken.append(os.environ.pop("CUDA_VISIBLE_DEVICES"))
    assert taken == ["GPU-d1", "GPU-e1", "MIG-b", "MIG-GPU-a/1/0"], "whole ones first, and none twice"


def test_what_a_process_holds_it_and_those_it_starts_need_not_claim(listed, machine):
    gpus.claim(2)
    gpus.claim(2)
    gpus.claim(1)
    with pytest.raises(EarlError, match="needs 3 GPUs, but 2 are visible"):
        gpus.claim(3)
    child = machine.claim(1, PATH=os.environ["PATH"], **{gpus.CLAIMED: "GPU-d1,GPU-e1", gpus.VISIBLE: "GPU-e1"})
    assert got(child) == "GPU-e1"
    child.communicate()


def test_a_stage_of_several_gpus_takes_whole_ones(listed):
    with pytest.raises(EarlError, match="needs 3 GPUs, but 2 are visible here, beside 2 MIG devices, of which"):
        gpus.claim(3)
    gpus.claim(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-d1,GPU-e1"


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("2,1", {"2": "GPU-e1", "1": "GPU-d1"}),
        ("0,2", {"MIG-b": "MIG-b", "MIG-GPU-a/1/0": "MIG-GPU-a/1/0", "2": "GPU-e1"}),
        ("GPU-e", {"GPU-e": "GPU-e1"}),
        ("MIG-b", {"MIG-b": "MIG-b"}),
        ("7", {"7": "7"}),
        ("1, 2", {"1": "GPU-d1", "2": "GPU-e1"}),
        ("1,NoDevFiles,2", {"1": "GPU-d1"}),
    ],
)
def test_the_environment_names_gpus_in_several_ways(listed, monkeypatch, visible, uuids):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {gpu.name: gpu.uuid for gpu in gpus.visible()} == uuids


def test_one_gpu_under_two_names_is_claimed_once(listed, machine):
    machine.env["PATH"] = os.environ["PATH"]
    first = machine.claim(1, CUDA_VISIBLE_DEVICES="1")
    assert got(first) == "1"
    second = machine.claim(1, CUDA_VISIBLE_DEVICES="GPU-d1,GPU-e1")
    assert got(second) == "GPU-e1"
    for each in (first, second):
        each.communicate()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_GPUS": "h100:0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-b", "SLURM_GPUS": "1"}, "CUDA_VISIBLE_DEVICES=MIG-b"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "SLURM_GPUS_PER_NODE=h100:8"),
    ],
)
def test_the_environment_says_whether_a_job_was_given_gpus(alone, monkeypatch, given, said):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert gpus.asked_for() == said


@pytest.mark.parametrize("visible", [None, "", "-1", "-1,0", "NoDevFiles"])
def test_without_gpus_nothing_is_claimed(alone, monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus.claim(1)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert not gpus._held


@pytest.mark.parametrize(
    ("stage", "fields", "count"),
    [
        ("generate", {"engine": "vllm", "vllm_tensor_parallel_size": 2}, 2),
        ("generate", {"engine": "torch"}, 1),
        ("score", {"judge": "vllm", "judge_tensor_parallel_size": 4}, 4),
        ("score", {"judge": "openai"}, 0),
        ("train", {"train_processes": 3}, 3),
        ("sft", {"train_processes": 3}, 3),
        ("iterate", {"train_processes": 2, "segment_processes": 3}, 3),
        # A judge server beside the ranks.
        ("iterate", {"train_processes": 2, "judge": "vllm", "judge_tensor_parallel_size": 4}, 6),
        ("train", {"train_processes": 3, "device": "cpu"}, 0),
        ("tokenise", {"train_processes": 3}, 1),
        ("restore", {"train_processes": 3}, 3),
    ],
)
def test_a_stage_claims_what_its_configuration_says(monkeypatch, stage, fields, count):
    claimed = []
    monkeypatch.setattr(gpus, "claim", claimed.append)
    config = Config.model_construct()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    claims.claim(config.model_copy(update=fields), stage)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    claims.claim(config.model_copy(update=fields), stage)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    monkeypatch.setenv("WORLD_SIZE", "2")
    claims.claim(config.model_copy(update=fields), stage)
    assert claimed == [count], "neither ranks nor jobs on several nodes claim any"


def test_what_was_trained_by_other_ranks_claims_as_many_gpus(monkeypatch):
    claimed = []
    monkeypatch.setattr(gpus, "claim", claimed.append)
    for name in ("WORLD_SIZE", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    config = Config.model_construct().model_copy(update={"train_processes": 2})
    claims.claim(config, "restore", 8)
    claims.claim(config.model_copy(update={"device": "cpu"}), "restore", 8)
    assert claimed == [8, 0]


def test_what_follows_a_minus_one_is_hidden(alone, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,-1,6")
    gpus.claim(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    with pytest.raises(EarlError, match="needs 2 GPUs, but 1 are visible"):
        gpus.claim(2)


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("tokenise --dataset d --raw r --out o", 1),
        ("generate --iteration 1 --policy p --shard 0 --out o", 2),
        ("score --rollouts r --out o", 4),
        ("judge check", 4),
        ("train --iteration 1 --run {run}", 3),
        ("judge again --run {run}", 4),
    ],
)
def test_every_command_that_computes_claims_its_gpus(tmp_path, monkeypatch, capsys, command, needed):
    """On a machine of its own, beside others."""

    def claim(count):
        raise EarlError(f"{count} GPUs")

    for name in ("WORLD_SIZE", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "claim", claim)
    monkeypatch.chdir(tmp_path)
    changes = {"device": "cuda", "judge": "vllm", "judge_tensor_parallel_size": 4}
    changes |= {"engine": "vllm", "vllm_tensor_parallel_size": 2, "train_processes": 3, "segment_processes": None}
    freeze.write(demo_config(**changes), tmp_path / "config.json")
    words = command.format(run=tmp_path).split()
    words += [] if "again" in words else ["--config", str(tmp_path / "config.json")]
    assert cli.call(words) == 2
    assert capsys.readouterr().err == f"error: {needed} GPUs\n"


@pytest.mark.parametrize(("words", "needed"), [([], 4), (["--tensor-parallel-size", "2"], 2)])
def test_a_judge_server_has_gpus_of_its_own_that_hold_its_model(monkeypatch, capsys, words, needed):
    def claim(count):
        raise EarlError(f"{count} GPUs")

    monkeypatch.setattr(gpus, "claim", claim)
    monkeypatch.setattr(server, "is_cpu_build", lambda: False)
    assert cli.call(["judge", "serve", *words]) == 2
    assert capsys.readouterr().err == f"error: {needed} GPUs\n"
