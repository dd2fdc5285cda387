"""Weights & Biases: each iteration once on one page, whatever happens to the process that sends it."""

import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from earl.config import paths
from earl.files import atomic
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import state
from earl.tracking import files
from tests.support.forked import ROOT, Forked
from tests.support.run_files import evaluate, new_run, train
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow
if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed (pip install -e '.[tracking]')", allow_module_level=True)


@pytest.fixture
def server():
    with WandbServer() as started:
        yield started


def start(run: Run, server: WandbServer | None = None, *options: str, **environment: str) -> Forked:
    """Start `earl track` without an account, a home folder or a terminal."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    clean |= {"HOME": str(run.path.parent)}
    if server is not None:
        clean |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    return Forked("earl", ["track", "--run", str(run.path), *options], ROOT, clean | environment)


def track(run: Run, server: WandbServer | None = None, *options: str, fails: bool = False, **environment: str) -> str:
    process = start(run, server, *options, **environment)
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert (process.returncode != 0) == fails, output
    return output


def offline_steps(run: Run) -> list[int]:
    """Return the steps of the run's offline folders, in the order of time, as wandb's own records say."""
    all_records = (
        record for file in sorted(run.path.glob("tracking/wandb/offline-run-*/*.wandb")) for record in records(file)
    )
    return [record.history.step.num for record in all_records if record.WhichOneof("record_type") == "history"]


def records(file: Path):
    """Yield the records of a .wandb file: a log in LevelDB's format, after a header of its own of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # Whole records and the last parts of others end one.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_rows_hold_figures_and_wait_for_evaluations(tmp_path):
    evaluations = {"heldout": {"prompts": 4, "every_n_iterations": 2}}
    run, config = new_run(tmp_path / "a", evaluations=evaluations)
    train(run, 1, 2, 3)
    (run.iteration(1).path / "train" / "performance.json").write_text('{"seconds": {"backward": 2.0}, "host": "x"}')
    assert files.rows(run, config) == [], "the starting policy is still to be evaluated"
    evaluate(run, "heldout", 0)
    assert [row.iteration for row in files.rows(run, config)] == [0, 1]
    evaluate(run, "heldout", 2)
    rows = files.rows(run, config)
    assert [row.iteration for row in rows] == [0, 1, 2, 3]
    assert rows[0].figures == {"evaluation/heldout/reward/mean": 4.0, "evaluation/heldout/reward/n": 2}
    assert rows[1].figures == {"train/reward_mean": 1.5, "performance/seconds/backward": 2.0}


def test_an_evaluation_that_can_no_longer_be_made_is_not_waited_for(tmp_path):
    evaluations = {"heldout": {"prompts": 4, "every_n_iterations": 2}}
    run, config = new_run(tmp_path / "a", evaluations=evaluations)
    train(run, 1, 2, 3, 4)
    for index in (0, 4):
        evaluate(run, "heldout", index)
    assert [row.iteration for row in files.rows(run, config)] == [0, 1]
    state.prune(run, state.Retention(None, None, 4))
    assert [row.iteration for row in files.rows(run, config)] == [0, 1, 2, 3, 4]


def test_the_policy_that_a_segment_has_in_memory_is_still_to_be_evaluated(tmp_path):
    run, config = new_run(tmp_path / "a", evaluations={"heldout": {"prompts": 4, "every_n_iterations": 1}})
    train(run, 1, 2)
    evaluate(run, "heldout", 0)
    for index in (1, 2):
        shutil.rmtree(run.iteration(index).policy)
    assert [row.iteration for row in files.rows(run, config)] == [0, 1], "1 has been passed, 2 has not"
    evaluate(run, "heldout", 2)
    assert [row.iteration for row in files.rows(run, config)] == [0, 1, 2]


def test_online_each_step_once_on_one_page(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online", log_episodes_every_n_iterations=2)
    train(run, 1, 2)
    assert "sent iterations 1, 2" in track(run, server)
    assert "nothing new" in track(run, server)
    train(run, 3)
    assert "sent iterations 3" in track(run, server)
    ((_, page),) = server.pages.items()
    assert (page.steps(), page.name, page.project) == ([1, 2, 3], "a", "earl")
    assert [line["train/reward_mean"] for line in page.history] == [1.5, 2.5, 3.5]
    assert [line["_step"] for line in page.history if "episodes" in line] == [2]


def fine_tune(config, steps: int = 3) -> str:
    """Write the curves of the fine-tuning that a run starts from; return the name of its folder."""
    folder = paths.resolve(config, config.model_path)
    curve = {"loss": [3.0, 2.0, 1.0], "gradient_norm": [6.0, 5.0, 4.0], "learning_rate": [1e-4, 2e-4, 3e-4]}
    curve |= {"validation": {"step": [2, 3], "loss": [2.5, 1.5]}, "left_out_examples": 4}
    atomic.write_text(folder / "sft.json", json.dumps(curve))
    return folder.name


def test_a_fine_tuning_is_a_page_of_its_own_sent_once(tmp_path, server):
    run, config = new_run(tmp_path / "a", wandb_mode="online")
    name = fine_tune(config)
    assert f"sent the fine-tuning {name}" in track(run, server), "before there is any iteration"
    train(run, 1)
    assert "fine-tuning" not in track(run, server)
    assert sorted(page.name for page in server.pages.values()) == ["a", name]
    page = server.pages[name]
    assert (page.steps(), page.project) == ([1, 2, 3], "earl")
    assert [line["sft/loss"] for line in page.history] == [3.0, 2.0, 1.0]
    assert [line["sft/gradient_norm"] for line in page.history] == [6.0, 5.0, 4.0]
    assert [line["sft/learning_rate"] for line in page.history] == [1e-4, 2e-4, 3e-4]
    assert [line.get("sft/validation_loss") for line in page.history] == [None, 2.5, 1.5]
    other, _ = new_run(tmp_path / "b", wandb_mode="online")
    track(other, server)
    assert page.steps() == [1, 2, 3], "runs that start from the same one do not send it twice"


def test_a_fine_tuning_of_an_offline_run_is_written_once(tmp_path):
    run, config = new_run(tmp_path / "a", wandb_mode="offline")
    fine_tune(config)
    for _ in range(2):
        track(run)
    assert offline_steps(run) == [1, 2, 3]


def test_episodes_come_with_pictures_scores_and_words(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online", log_episodes_every_n_iterations=1)
    train(run, 1)
    track(run, server)
    (artifact,) = server.artifacts
    assert artifact.complete
    first, second = episodes(artifact)
    expected = {"instruction": "Instruction 1", "raw": "judged 1.0", "reward": 3.0, "advantage": -1.0, "overedit": 3.0}
    assert {name: first[name] for name in expected} == expected
    assert second["edited"] is None, "no picture was decoded"
    assert first["original"]["path"] == second["original"]["path"], "a group's original is stored once"
    assert Image.open(io.BytesIO(artifact.files[first["edited"]["path"]])).getpixel((0, 0)) == (1, 1, 1)


def episodes(artifact) -> list[dict]:
    table = json.loads(artifact.files["episodes.table.json"])
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_killed_between_sending_and_recording(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online", log_episodes_every_n_iterations=1)
    train(run, 1, 2)
    state = run.path / "tracking" / "wandb.json"
    process = start(run, server)
    wait_until(lambda: server.pages and next(iter(server.pages.values())).steps() == [1, 2])
    process.kill()
    process.communicate(timeout=60)
    if json.loads(state.read_text())["complete"] == 2:
        state.write_text(json.dumps(json.loads(state.read_text()) | {"complete": -1}))
    (page,) = server.pages.values()
    page.files.clear()
    server.artifacts.clear()
    track(run, server)
    assert page.steps() == [1, 2]
    assert len(server.pages) == 1
    # What the rows refer to may not have arrived: it is there now, as the page's newest table.
    (artifact,) = server.artifacts
    assert [episode["iteration"] for episode in episodes(artifact)] == [1, 1, 2, 2]
    assert json.loads(page.summary)["episodes"]["nrows"] == 4
    state.write_text(json.dumps(json.loads(state.read_text()) | {"complete": 1}))
    train(run, 3)
    track(run, server)
    assert page.steps() == [1, 2, 3]
    assert [episode["iteration"] for episode in episodes(server.artifacts[-1])] == [2, 2, 3, 3]


@pytest.mark.parametrize("query", ["UpsertBucket", "CreateArtifact"])
def test_killed_at_any_moment(tmp_path, server, query):
    run, _ = new_run(tmp_path / "a", wandb_mode="online", log_episodes_every_n_iterations=2)
    train(run, *range(1, 6))
    process = start(run, server)
    wait_until(lambda: query in server.queries)
    process.kill()
    process.communicate(timeout=60)
    track(run, server)
    (page,) = server.pages.values()
    assert page.steps() == [1, 2, 3, 4, 5]


def test_trained_again_means_a_new_page(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online")
    train(run, 1, 2, 3)
    track(run, server)
    state.rewind(run, 2)
    train(run, 2, variant="again")
    assert "new page, a (2)" in track(run, server)
    assert [(page.name, page.steps()) for page in server.pages.values()] == [("a", [1, 2, 3]), ("a (2)", [1, 2])]


def test_offline_each_step_once_also_after_a_kill(tmp_path):
    run, _ = new_run(tmp_path / "a", wandb_mode="offline", log_episodes_every_n_iterations=2)
    train(run, 1, 2)
    process = start(run)
    wait_until(lambda: list(run.path.glob("tracking/wandb/offline-run-*/*.wandb")))
    process.kill()
    process.communicate(timeout=60)
    (run.path / "tracking" / "wandb.json").unlink(missing_ok=True)
    time.sleep(1)  # names of folders tell seconds
    track(run)
    assert offline_steps(run) == [1, 2]
    assert "nothing new" in track(run)
    train(run, 3)
    assert "wandb sync" in track(run)
    assert offline_steps(run) == [1, 2, 3]


def test_offline_folders_sync_to_one_page(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="offline", log_episodes_every_n_iterations=2)
    for last in (2, 4):
        train(run, last - 1, last)
        track(run)
        sync(run, server)
        assert [page.steps() for page in server.pages.values()] == [list(range(1, last + 1))]
    assert [episodes(artifact)[0]["iteration"] for artifact in server.artifacts] == [2, 4]
    train(run, 5)
    track(run, server, "--online")
    assert [page.steps() for page in server.pages.values()] == [[1, 2, 3, 4, 5]]


def sync(run: Run, server: WandbServer) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    clean |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "HOME": str(run.path.parent)}
    command = [sys.executable, "-m", "wandb", "sync", str((run.path / "tracking" / "wandb").resolve())]
    done = subprocess.run(
        command, cwd=run.path, env=clean, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL
    )
    assert "Finished syncing" in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_server_that_is_away_is_an_error_that_names_the_remedy_and_is_made_up_for(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online")
    train(run, 1)
    server.down = True
    output = track(run, server, fails=True, WANDB_INIT_TIMEOUT="2")
    assert output.count("error: Weights & Biases, page a-") == 1
    assert "WANDB_API_KEY" in output
    server.down = False
    track(run, server)
    assert [page.steps() for page in server.pages.values()] == [[1]]


def test_no_package_is_said_before_the_run_and_an_error_only_where_it_is_wanted(tmp_path, monkeypatch):
    from earl import tracking

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, config = new_run(tmp_path / "a")
    assert tracking.missing(config) is None
    _, config = new_run(tmp_path / "b", wandb_mode="offline")
    assert "pip install -e '.[tracking]'" in tracking.missing(config)
    with pytest.raises(EarlError, match=r"wandb is not installed; .*pip install -e '\.\[tracking\]'"):
        tracking.check_wandb(config)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_a_copied_run_folder_sends_to_a_page_of_its_own(tmp_path, server):
    run, _ = new_run(tmp_path / "a", wandb_mode="online")
    train(run, 1)
    track(run, server)
    copied = Run(Path(shutil.copytree(run.path, tmp_path / "b", symlinks=True)))
    train(copied, 2, variant="of the copy")
    assert "is a copy of" in track(copied, server)
    train(run, 2)
    track(run, server)
    first, second = server.pages.values()
    assert (first.steps(), second.steps()) == ([1, 2], [1, 2])
    assert (first.name, second.name) == ("a", "a (copy)")
