"""Where a stage computes: never on a CPU by accident, and on a GPU of its own."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from earl.engines.torch_engine import TorchEngine
from earl.execution import gpus, ranks, runtime
from earl.judges import server
from earl.messages.errors import EarlError
from earl.run import preflight
from tests.support.demo import ROOT
from tests.support.evaluation_files import demo_config


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a test sets is gone afterwards, and what this test's own job was given does not matter."""
    for name in (gpus.VISIBLE, gpus.CLAIMED, *gpus.SLURM_LISTS, *gpus.SLURM_COUNTS, "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpus, "_listed", dict)


@pytest.fixture
def sees_gpu(monkeypatch):
    """Return a function that says whether torch sees a GPU."""
    return lambda is_there: monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)


@pytest.mark.parametrize("given", [{"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_JOB_GPUS": "3"}, {"SLURM_GPUS_ON_NODE": "1"}])
def test_a_job_that_was_given_gpus_does_not_fall_back_to_the_cpu(monkeypatch, sees_gpu, given):
    sees_gpu(False)
    [(name, value)] = given.items()
    monkeypatch.setenv(name, value)
    with pytest.raises(
        EarlError, match=rf"device is 'auto' and the environment says {name}={value}, but torch .* sees"
    ):
        runtime.prepare(demo_config(device="auto"))
    assert runtime.prepare(demo_config(device="cpu")).type == "cpu"
    sees_gpu(True)
    assert runtime.prepare(demo_config(device="auto")).type == "cuda"


def test_without_gpus_auto_is_the_cpu_and_cuda_is_refused(sees_gpu):
    sees_gpu(False)
    assert runtime.prepare(demo_config(device="auto")).type == "cpu"
    with pytest.raises(EarlError, match=r"device is 'cuda', but torch \S+ sees no GPU here; .* set device to 'cpu'"):
        runtime.prepare(demo_config(device="cuda"))


@pytest.mark.parametrize("claimed", [False, True])
def test_a_machine_whose_gpus_torch_does_not_see_is_no_cpu_machine(sees_gpu, monkeypatch, claimed):
    sees_gpu(False)
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Gpu("GPU-a", "GPU-a")])
    if claimed:
        monkeypatch.setenv(gpus.VISIBLE, "GPU-a")
        monkeypatch.setenv(gpus.CLAIMED, "GPU-a")
    with pytest.raises(EarlError, match=r"'auto' and this machine has GPUs, but torch .* set device to 'cpu'"):
        runtime.prepare(demo_config(device="auto"))
    assert runtime.prepare(demo_config(device="cpu")).type == "cpu"


def test_looking_for_gpus_does_not_start_cuda(monkeypatch):
    """CUDA cannot be used in a process that was forked from one that has started it."""
    looked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: looked.append(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]))
    runtime.sees_gpu()
    assert looked == ["1"]


@pytest.mark.parametrize("here", [True, False])
def test_the_plan_refuses_a_gpu_only_where_stages_run_on_a_machine_without(sees_gpu, here):
    config = demo_config(device="cuda")
    sees_gpu(True)
    preflight.check(config, here=here)
    sees_gpu(False)
    if here:
        with pytest.raises(EarlError, match=r"field device is .cuda., but torch .*; .* --profile slurm"):
            preflight.check(config, here=here)
    else:
        preflight.check(config, here=here)


def test_planning_for_a_cpu_imports_no_torch():
    looks = "import sys; from earl.execution import runtime; assert not runtime.refusal('cpu'); assert not "
    looks += "runtime.refusal('auto'); assert 'torch' not in sys.modules; from earl.run import preflight"
    environment = os.environ | {gpus.VISIBLE: ""}
    command = [sys.executable, "-c", f"{looks}; assert 'torch' not in sys.modules"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_the_torch_engine_takes_a_gpu_without_a_number():
    engine = TorchEngine(torch.device("cuda"), torch.float32, batch_size=8, context=512, constrained=True)
    assert engine.device == torch.device("cuda")


@pytest.mark.parametrize(
    ("local_rank", "visible", "own"),
    [
        ("0", 8, 0),
        ("5", 8, 5),
        ("5", 1, 0),  # bound by Slurm: the rank sees its own alone
        ("3", 2, 1),  # bound, two a task
    ],
)
def test_a_rank_takes_a_gpu_that_it_sees(monkeypatch, local_rank, visible, own):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert ranks._own_device(torch.device("cuda")) == torch.device("cuda", own)
    assert taken == [torch.device("cuda", own)]


@pytest.mark.parametrize(("uuids", "sharing"), [("abcd", None), ("abca", "[0, 3]")])
def test_two_ranks_on_one_gpu_are_refused(uuids, sharing):
    store = torch.distributed.HashStore()
    for rank, uuid in enumerate(uuids):
        store.set(f"gpu/{rank}", uuid)
    ranks.check_own_gpus(store, 1, 4, "b")
    for rank in (0, 3):
        if sharing is None:
            ranks.check_own_gpus(store, rank, 4, uuids[rank])
        else:
            with pytest.raises(EarlError) as refused:
                ranks.check_own_gpus(store, rank, 4, uuids[rank])
            assert f"ranks {sharing} of 4 would compute on the same GPU (a)" in str(refused.value)


@pytest.mark.slow
def test_ranks_that_share_a_gpu_end_before_nccl_meets_it(tmp_path):
    """Two processes that stand in for ranks with CUDA: both have the GPU of the same name."""
    joins = textwrap.dedent("""
        import sys, torch
        from earl.execution import ranks
        ranks._own_device = lambda device: torch.device("cuda", 0)
        ranks.gpu_uuid = lambda device: "GPU-same"
        ranks.PATIENCE = 0.0
        with ranks.joined(torch.device("cuda")):
            print("they have met")
    """)
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", joins], cwd=ROOT, env=common | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], said
    assert "".join(said).count("EarlError: ranks [0, 1] of 2 would compute on the same GPU (GPU-same)") == 1
    assert "they have met" not in "".join(said)
