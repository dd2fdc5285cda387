"""Rescore: another judge over stored rollouts, in files beside them."""

import json
import shutil

import pytest

from earl import judges
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.judges import Verdict
from earl.judges.program import ProgramJudge
from earl.messages.errors import EarlError
from earl.stages import rescore


class Stricter(ProgramJudge):
    """Takes a point from edit success, where there is one, and fails on every image that comes first in its file."""

    name = "stricter"
    asked = 0

    def score(self, judgements):
        Stricter.asked += len(judgements)
        verdicts = super().score(judgements)
        return [
            Verdict("failed", "")
            if place == 0
            else Verdict(**{**vars(one), "edit_success": max(0.0, one.edit_success - 1)})
            for place, one in enumerate(verdicts)
        ]


@pytest.fixture
def run(small_run, tmp_path):
    return Run(shutil.copytree(small_run.path, tmp_path / "run", symlinks=True))


@pytest.fixture
def stricter(monkeypatch):
    monkeypatch.setattr(judges, "get", lambda config: Stricter())
    Stricter.asked = 0


def test_the_same_judge_agrees_with_itself(run):
    report = rescore.run(run.path, "same", {})
    assert list(report["parts"]) == ["iterations", "heldout", "heldout_greedy"]
    for part in report["parts"].values():
        assert part["failed_before"] == part["failed_after"] == part["failed_both"] == 0
        for values in part["measures"].values():
            assert values["mean_difference"] == 0
            assert values["pearson"] in (None, pytest.approx(1))
            assert values["pairs"]["opposite"] == values["pairs"]["tied_before"] == 0
    assert list(report["parts"]["iterations"]["by_iteration"]) == ["1", "2"]


def test_another_judge_writes_beside_and_is_compared(run, stricter):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    report = rescore.run(run.path, "strict", {"judge_samples": 2}, iterations=[1])
    assert {path: path.read_bytes() for path in before} == before, "nothing in the run changes"
    scores = run.path / "rescored" / "strict" / "iterations" / "000001" / "scores" / "0000.parquet"
    assert tables.read_metadata(scores)["rollouts_digest"] == manifest.digest_file(run.iteration(1).rollouts(0))
    part = report["parts"]["iterations"]
    assert part["episodes"] == 16
    assert part["failed_after"] == 1
    ours, theirs = (
        {row["episode_id"]: row["edit_success"] for row in tables.read_table(path, tables.SCORES).to_pylist()}
        for path in (run.iteration(1).scores(0), scores)
    )
    both = [(ours[name], theirs[name]) for name in ours if ours[name] is not None and theirs[name] is not None]
    values = part["measures"]["edit_success"]
    assert values["n"] == len(both)
    assert values["mean_difference"] == pytest.approx(sum(b - a for a, b in both) / len(both), abs=1e-5)
    assert part["measures"]["overedit"]["mean_difference"] == 0
    lines = rescore.text(report).splitlines()
    assert lines[0].startswith("iterations: ")
    assert "1 now alone" in lines[0]
    assert any(line.split()[:1] == ["edit_success"] for line in lines)


def test_what_has_been_scored_is_not_asked_again(run, stricter):
    rescore.run(run.path, "strict", {}, evaluations=["heldout"])
    asked = Stricter.asked
    files = {path: path.read_bytes() for path in (run.path / "rescored").rglob("*.*") if path.is_file()}
    rescore.run(run.path, "strict", {}, evaluations=["heldout"])
    assert Stricter.asked == asked
    assert {path: path.read_bytes() for path in files} == files
    (run.path / "rescored" / "strict" / "evaluations" / "heldout" / "000002.scores.parquet").unlink()
    rescore.run(run.path, "strict", {}, evaluations=["heldout"])
    assert asked < Stricter.asked < 2 * asked
    assert {path: path.read_bytes() for path in files} == files
    report = json.loads((run.path / "rescored" / "strict" / "agreement.json").read_text())
    assert list(report["parts"]) == ["heldout"]


def test_one_name_one_judge_and_nothing_else(run):
    rescore.run(run.path, "first", {}, iterations=[1])
    with pytest.raises(EarlError, match=r"another judge has scored: judge_samples differ; take another --name"):
        rescore.run(run.path, "first", {"judge_samples": 3}, iterations=[1])
    with pytest.raises(EarlError, match=r"--set temperature: is no field of a judge"):
        rescore.run(run.path, "other", {"temperature": 0.5})
    with pytest.raises(EarlError, match="has no scored rollouts"):
        rescore.run(run.path, "other", {}, iterations=[9])
