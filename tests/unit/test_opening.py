"""Before the first job: what is wrong with any experiment is said of all of them at once."""

import json
from pathlib import Path

import pytest

from earl.messages.errors import EarlError
from earl.workflow import opening
from earl.workflow.settings import Settings
from tests.support.workplace import EXPERIMENT, Workplace


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


def refusal(*experiments: str, **settings: object) -> list[str]:
    with pytest.raises(EarlError) as caught:
        opening.make_plans(Settings(experiment=list(experiments), **settings))
    return str(caught.value).split("\n\n")


def test_every_experiment_has_a_block(place: Workplace) -> None:
    """One that does not evaluate, one with changed fields, two whose data are missing; a sound one has none."""
    (place.path / "broken.jsonnet").write_text("{")
    changed = place.path / "runs" / "changed" / "config.json"
    changed.parent.mkdir(parents=True)
    changed.write_text(json.dumps(EXPERIMENT | {"run_name": "changed", "temperature": 0.5}))
    missing = [place.experiment(name, train_paths_file=["no.parquet"]) for name in ("x", "y")]
    blocks = refusal("broken.jsonnet", place.experiment("changed"), missing[0], place.experiment("sound"), missing[1])
    assert len(blocks) == 4
    assert "broken.jsonnet" in blocks[0]
    assert "the run 'changed' was made with another configuration" in blocks[1]
    for block, name in zip(blocks[2:], "xy", strict=True):
        assert block.startswith(f"the run '{name}' would fail:")
        assert "field train_paths_file (in " in block


def test_what_is_wrong_with_all_is_said_once(place: Workplace) -> None:
    names = [place.experiment(name) for name in ("x", "y")]
    assert len(refusal(*names, set={"run_name": "one"})) == 1  # Both would write to one folder.
