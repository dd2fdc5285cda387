"""The Hugging Face hub: each policy once, under its tag, whatever happens to the process that pushes it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from earl import tracking
from earl.config.load import read
from earl.files import manifest
from earl.messages.errors import EarlError
from earl.run import state
from earl.stages import export
from earl.tracking import hub_push
from tests.support.hub_server import HubServer
from tests.support.run_files import new_run, train

PUSHED = {
    "push_to_hub": True,
    "push_to_hub_every_n_iterations": 2,
    "push_to_hub_repo_id": "tester/policies",
    "keep_checkpoints_every_n_iterations": 2,
    "num_iterations": 5,
}


@pytest.fixture
def server(monkeypatch):
    with HubServer() as started:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield started


def push(run):
    return hub_push.push(run, read(run.config)).iterations


def titles(server):
    return [commit.title.partition(",")[0] for commit in server.repositories["tester/policies"].commits]


def test_every_nth_and_the_last_policy_once_each(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2, 3, 4)
    assert push(run) == [2, 4]
    train(run, 5)
    assert push(run) == [5]
    calls = len(server.calls)
    assert push(run) == []
    assert len(server.calls) == calls, "what was pushed is known without asking"
    repository = server.repositories["tester/policies"]
    assert repository.private
    assert titles(server) == ["initial commit", "Iteration 2", "Iteration 4", "Iteration 5"]
    assert sorted(repository.tags) == ["iteration-000002", "iteration-000004", "iteration-000005"]
    pushed = repository.at("iteration-000004")
    assert pushed["model.safetensors"] == b"weights 4 "
    digest = manifest.digest_folder(run.iteration(4).policy)
    assert repository.commits[2].title == f"Iteration 4, policy {digest[:16]}"
    assert json.loads((run.path / "tracking" / "hub.json").read_text())["pushed"]["4"]["policy_digest"] == digest


def test_the_base_of_adapters_is_pushed_before_them(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED, lora={"rank": 4})
    (run.iteration(0).policy / "model.safetensors").write_bytes(b"base")
    assert push(run) == []
    train(run, 1, 2)
    assert push(run) == [0, 2]
    train(run, 3, 4)
    assert push(run) == [4]
    assert sorted(server.repositories["tester/policies"].tags) == [
        *("iteration-000000", "iteration-000002", "iteration-000004"),
    ]


def test_exported_adapters_need_no_base(tmp_path):
    run, config = new_run(tmp_path / "a", **PUSHED, lora={"rank": 4}, push_to_hub_exports=True)
    train(run, 1, 2)
    assert hub_push.due(run, config) == [2]


def test_a_policy_that_is_not_on_disk_is_named_with_what_brings_it_back(tmp_path, server, caplog):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2, 3, 4, 5)
    for index in (2, 5):
        shutil.rmtree(run.iteration(index).policy)
    assert push(run) == [4]
    for index in (2, 5):
        assert f"{run.iteration(index).policy}: is not on disk, so it is not pushed" in caplog.text
        assert f"earl restore --run {run.path} --iteration {index}" in caplog.text
    caplog.clear()
    shutil.rmtree(run.iteration(4).policy)
    push(run)
    assert "000004" not in caplog.text, "what has been pushed is not missed"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["/repos/create", "/lfs/", "/commit/", "/tag/"])
def test_broken_off_before_or_after_any_call_and_pushed_again(tmp_path, server, call, after):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2, 3, 4)
    server.fail_at, server.fail_after = call, after
    with pytest.raises(EarlError, match=r"^hub, repository tester/policies: .*check the network"):
        push(run)
    push(run)
    assert titles(server) == ["initial commit", "Iteration 2", "Iteration 4"]
    assert len(server.repositories["tester/policies"].tags) == 2


def test_what_is_known_was_lost_and_nothing_is_doubled(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2)
    push(run)
    (run.path / "tracking" / "hub.json").unlink()
    push(run)
    assert titles(server) == ["initial commit", "Iteration 2"]


def test_exports_are_pushed_where_they_are_asked_for(tmp_path, server, policy_folder):
    run, _ = new_run(tmp_path / "a", **PUSHED, push_to_hub_exports=True)
    train(run, 1, 2)
    folder, metrics = run.iteration(2).policy, run.iteration(2).metrics
    shutil.rmtree(folder)
    shutil.copytree(policy_folder, folder)
    digest = manifest.digest_folder(folder) if (folder / manifest.NAME).is_file() else manifest.seal(folder)
    trained = json.loads(metrics.read_text()) | {"policy_digest": digest, "inputs": {"policy": "0"}}
    metrics.write_text(json.dumps(trained))
    assert push(run) == [2]
    pushed = server.repositories["tester/policies"].at("iteration-000002")
    alone = tmp_path / "alone"
    export.of_run(run.path, 2, alone)
    files = {path.relative_to(alone).as_posix(): path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    assert {name: pushed[name] for name in files} == files
    assert pushed.keys() - files.keys() == {".gitattributes"}
    assert not (run.path / "tracking" / "export").exists(), "nothing of it stays"
    assert push(run) == []


def test_files_that_another_policy_had_go(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2, 3, 4)
    folder = run.iteration(2).policy
    (folder / "extra.json").write_text("{}")
    manifest.seal(folder)
    push(run)
    repository = server.repositories["tester/policies"]
    assert "extra.json" in repository.at("iteration-000002")
    own = {"config.json", "model.safetensors", "manifest.json", ".gitattributes"}
    assert repository.at("iteration-000004").keys() == own


def test_trained_again_is_not_pushed_over_what_is_there(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2)
    push(run)
    state.rewind(run, 2)
    train(run, 2, variant="again")
    with pytest.raises(EarlError, match="tag iteration-000002 is another policy"):
        push(run)


def test_the_command_line(tmp_path, server):
    run, _ = new_run(tmp_path / "a", **PUSHED)
    train(run, 1, 2)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    clean |= {"HOME": str(tmp_path), "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "earl", "push", "--run", str(run.path), "--out", str(tmp_path / "sent.json")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert "sent iterations 2 to tester/policies on the hub" in done.stderr
    assert json.loads((tmp_path / "sent.json").read_text())["iterations"] == [2]


def test_off_by_default_and_what_is_missing_is_said_before_the_run(tmp_path, monkeypatch):
    run, config = new_run(tmp_path / "a")
    train(run, 1)
    assert hub_push.push(run, config).iterations == []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    tracking.check_hub(config)
    _, config = new_run(tmp_path / "b", **PUSHED)
    with pytest.raises(EarlError, match="there is no token"):
        tracking.check_hub(config)


def test_best_effort_warns_and_records_the_problem(tmp_path, caplog):
    def fails():
        raise EarlError("no network")

    tracking.attempt(fails, best_effort=True, out=tmp_path / "sent.json")
    assert "warning: no network" in caplog.text
    assert json.loads((tmp_path / "sent.json").read_text()) == {"problem": "no network"}
    with pytest.raises(EarlError):
        tracking.attempt(fails, best_effort=False, out=tmp_path / "strict.json")
    assert not (tmp_path / "strict.json").exists()
