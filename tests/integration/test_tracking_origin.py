"""What a moved run folder keeps of its W&B run and its repository on the hub, and what a copied one does not."""

import json
import shutil
from types import SimpleNamespace

import pytest

from earl.files import objects
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.tracking import files, hub_push, origin, wandb_run
from tests.support.run_files import new_run, train


@pytest.fixture(autouse=True)
def no_id(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@pytest.fixture
def sent(tmp_path):
    """A run of which two iterations were sent, with a folder of `wandb offline`; its configuration; its page."""
    run, config = new_run(tmp_path / "a", wandb_mode="online")
    train(run, 1, 2)
    found = wandb_run._page(run, config, files.rows(run, config))
    known = vars(found) | {"complete": 2, "offline": {"offline-run-1-x": 2}}
    objects.write(run.path / "tracking" / "wandb.json", known)
    (run.path / "tracking" / "wandb" / "offline-run-1-x").mkdir(parents=True)
    return run, config, wandb_run.Page(**known)


def page_of(path, config):
    run = Run(path)
    return wandb_run._page(run, config, files.rows(run, config))


def copy(source, target):
    return shutil.copytree(source, target, symlinks=True)


def on_another_device(monkeypatch, path):
    """Have a folder look as if it lay on another file system, which moves it under another inode."""
    real = origin.here
    fake = {"device": 1, "inode": 1}
    monkeypatch.setattr(origin, "here", lambda run: real(run) | (fake if run.path == path else {}))


def test_the_same_folder_keeps_its_page(sent):
    run, config, before = sent
    assert page_of(run.path, config) == before


def test_a_renamed_folder_keeps_its_page(sent, tmp_path):
    run, config, before = sent
    found = page_of(run.path.rename(tmp_path / "b"), config)
    assert (found.id, found.complete) == (before.id, 2)


def test_a_folder_moved_to_another_file_system_keeps_its_page(sent, tmp_path, monkeypatch):
    run, config, before = sent
    copy(run.path, tmp_path / "b")
    shutil.rmtree(run.path)
    on_another_device(monkeypatch, tmp_path / "b")
    found = page_of(tmp_path / "b", config)
    assert (found.id, found.complete) == (before.id, 2)


def test_a_folder_that_was_put_back_from_a_copy_keeps_its_page(sent, tmp_path):
    run, config, before = sent
    copy(run.path, tmp_path / "b")
    shutil.rmtree(run.path)
    (tmp_path / "b").rename(run.path)
    assert page_of(run.path, config).id == before.id


def test_a_folder_reached_through_a_link_keeps_its_page(sent, tmp_path):
    run, config, before = sent
    (tmp_path / "link").symlink_to(run.path)
    assert page_of(tmp_path / "link", config).id == before.id


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_copy_gets_a_page_of_its_own_and_the_original_keeps_its(sent, tmp_path, monkeypatch, caplog, elsewhere):
    run, config, before = sent
    place = copy(run.path, tmp_path / "b")
    if elsewhere:
        on_another_device(monkeypatch, tmp_path / "b")
    caplog.set_level("INFO", logger="earl")
    found = page_of(place, config)
    assert found.id != before.id
    assert (found.name, found.complete, found.offline, found.policies) == (f"{config.run_name} (copy)", -1, {}, {})
    (line,) = [record.getMessage() for record in caplog.records if "is a copy of" in record.getMessage()]
    assert before.id in line
    assert found.id in line
    assert str(run.path) in line
    assert not (place / "tracking" / "wandb").exists(), "`wandb sync` would send what is the original's"
    assert (place / "tracking" / f"wandb-of-{before.id}" / "offline-run-1-x").is_dir()
    # Once decided, it stays: also when the original goes.
    shutil.rmtree(run.path)
    assert page_of(place, config).id == found.id


def test_a_copy_is_known_for_one_though_the_original_has_moved_since(sent, tmp_path):
    run, config, before = sent
    place = copy(run.path, tmp_path / "b")
    moved = run.path.rename(tmp_path / "c")
    assert page_of(place, config).id != before.id
    assert page_of(moved, config).id == before.id


def test_a_page_that_the_user_names_is_taken(sent, tmp_path, monkeypatch):
    run, config, before = sent
    monkeypatch.setenv("WANDB_RUN_ID", before.id)
    assert page_of(copy(run.path, tmp_path / "b"), config).id == before.id


def pushed(run, repository):
    entry = {"policy_digest": "f", "commit": "c", "repository": repository}
    objects.write(run.path / "tracking" / "hub.json", {"folder": origin.here(run), "pushed": {"2": entry}})


@pytest.mark.parametrize("name", ["me/policies", "policies"])
def test_a_copy_is_not_pushed_to_the_repository_of_the_original(sent, tmp_path, name):
    run, _, _ = sent
    pushed(run, "me/policies")
    state = run.path / "tracking" / "hub.json"
    wanted = SimpleNamespace(push_to_hub_repo_id=name)
    assert list(hub_push._pushed(run, wanted, state)) == ["2"]
    place = Run(copy(run.path, tmp_path / "b"))
    state = place.path / "tracking" / "hub.json"
    complaint = rf"{place.path}: is a copy of {run.path}, .*set push_to_hub_repo_id to another"
    with pytest.raises(EarlError, match=complaint):
        hub_push._pushed(place, wanted, state)
    assert hub_push._pushed(place, SimpleNamespace(push_to_hub_repo_id="me/other"), state) == {}
    assert json.loads(state.read_text())["folder"]["path"] == str(run.path)
