"""Selections in the workflow: a run comes before what is selected from it, and a change of it makes that again."""

import pytest

from earl.files import atomic, manifest
from tests.support.workplace import Workplace, job_counts

pytestmark = pytest.mark.slow
HELD_OUT = {"held_out": {"prompts": 4}}


def best(place: Workplace, **selection: object) -> str:
    """An experiment that fine-tunes on the best completions of the run `rl`, and evaluates."""
    return place.experiment(
        "best",
        selections={"x": {"run": str(place.path / "runs" / "rl")} | selection},
        sft={"best": {"base_model": "model", "train_paths_file": ["stage:select/x"], "steps": 1}},
        model_path="stage:sft/best",
        num_iterations=0,
        evaluations=HELD_OUT,
    )


@pytest.fixture
def both(workplace) -> str:
    return f"{best(workplace)},{workplace.experiment('rl', segment_length=2)}"


@pytest.mark.parametrize("granularity", ["segment", "stage"])
def test_in_one_plan_the_run_comes_first(workplace, both, granularity):
    workplace.run(both, granularity=granularity)
    kinds = workplace.kinds()
    assert kinds.count("select") == kinds.count("sft") == 1
    last_score = len(kinds) - 1 - kinds[::-1].index("train")
    assert last_score < kinds.index("select") < kinds.index("sft") < kinds.index("evaluate")
    assert "Nothing to be done" in workplace.run(both, "-n", granularity=granularity)


def test_only_the_iterations_that_are_named_are_waited_for(workplace):
    first = f"{best(workplace, last_iteration=2)},{workplace.experiment('rl', segment_length=2)}"
    workplace.run(first, "runs/best/iterations/000000/start.json")
    assert workplace.folder("rl").segment(2).is_file()
    assert not workplace.folder("rl").segment(3).exists()


def test_a_change_of_the_run_makes_the_selection_again(workplace, both):
    rl = workplace.experiment("rl", segment_length=2)
    workplace.run(rl)
    workplace.run(best(workplace))
    assert workplace.kinds()[:2] == ["select", "sft"]
    alone = workplace.run(best(workplace), "-n")
    assert "Nothing to be done" in alone

    scores = workplace.folder("rl").iteration(2).scores(0)
    atomic.write_text(scores, "asked again")
    for experiments in (best(workplace), both):
        counts = job_counts(workplace.run(experiments, "-n"))
        assert (counts["select"], counts["sft"]) == (1, 1)
        assert not counts.keys() & {"iterate", "generate", "score", "train"}
    workplace.run(best(workplace))
    assert "Nothing to be done" in workplace.run(best(workplace), "-n")

    counts = job_counts(workplace.run(both, "-n", set="num_iterations=4"))
    assert counts["select"] == 1


def test_a_run_that_is_not_there_is_refused(workplace):
    output = workplace.run(best(workplace), fails=True)
    assert "field selections.x.run (in best.jsonnet) is " in output
    assert "which has no complete iteration; train it first, or name its experiment beside this one" in output
    both = f"{best(workplace, last_iteration=4)},{workplace.experiment('rl')}"
    output = workplace.run(both, fails=True)
    assert "field selections.x.last_iteration (in best.jsonnet) is 4, but " in output
    assert workplace.stages() == []
    assert not list(workplace.path.glob(f"runs/shared/*/*/{manifest.NAME}"))
