"""Fields of a run that its iterations do not reach: refused where iterations would learn nothing, else told."""

import pytest

from earl.config import load
from earl.config.schema import Config
from earl.messages.errors import EarlError
from earl.run import preflight
from earl.run.unreached import unreached
from earl.workflow import opening
from earl.workflow.settings import Settings
from tests.support.demo import DEMO

FALLS = {"learning_rate_schedule": "linear", "schedule_iterations": 10}


def config(**fields: object) -> Config:
    return load.load(DEMO, fields).config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"warmup_iterations": 10}, []),
        ({"warmup_iterations": 11}, ["warmup_iterations is 11, but num_iterations is 10: the learning rate does not"]),
        (FALLS, []),
        (FALLS | {"schedule_iterations": 11}, ["schedule_iterations is 11, but num_iterations is 10"]),
        (FALLS | {"schedule_iterations": 30, "warmup_iterations": 20}, ["warmup_iterations is 20", "schedule_iter"]),
        ({"reference_refresh_iterations": 9}, []),
        ({"reference_refresh_iterations": 10}, ["reference_refresh_iterations is 10, but num_iterations is 10"]),
        ({"curriculum": {"rest_iterations": 8}}, []),  # what rests from 2 to 9 may come in 10
        ({"curriculum": {"rest_iterations": 9}}, ["curriculum.rest_iterations is 9, but num_iterations is 10"]),
        ({"warmup_iterations": 11, "num_iterations": 0}, []),
    ],
)
def test_what_is_beyond_the_last_iteration_is_told(fields, said):
    found = [f"{field} {message}" for field, message in unreached(config(**{"num_iterations": 10} | fields))]
    assert len(found) == len(said)
    assert all(map(str.startswith, found, said)), found


def test_iterations_after_a_rate_of_zero_are_refused():
    preflight.check(config(num_iterations=10, **FALLS))
    preflight.check(config(num_iterations=20, final_learning_rate=1e-6, **FALLS))
    with pytest.raises(EarlError, match=r"field num_iterations is 20, but .*rate is 0 from iteration 11 on.*lower it"):
        preflight.check(config(num_iterations=20, **FALLS))


def test_the_plan_tells_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    opening.make_plans(Settings(experiment=[str(DEMO)], set={"warmup_iterations": 30, "segment_processes": 3}))
    said = capfd.readouterr().err
    assert "runs/demo: field warmup_iterations is 30, but num_iterations is 20" in said
    assert "runs/demo: 1 of 3 ranks never sample, since rollout_shards is 2" in said
    opening.make_plans(Settings(experiment=[str(DEMO)], granularity="stage", set={"segment_processes": 3}))
    assert "ranks never sample" not in capfd.readouterr().err


def test_the_plan_tells_what_is_not_held_out(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    opening.make_plans(Settings(experiment=[str(DEMO)]))
    assert "not held out" not in capfd.readouterr().err
    for field in ("train_paths_file", "sft.shapes.train_paths_file"):
        opening.make_plans(Settings(experiment=[str(DEMO)], set={field: ["stage:tokenise/shapes_heldout"]}))
        said = "evaluations.heldout is of stage:tokenise/shapes_heldout, which is trained on, too: not held out"
        assert said in capfd.readouterr().err


def test_a_curriculum_that_has_no_other_prompts_is_refused():
    """The demo draws 32 prompts an iteration, and up to 40 with a further round."""
    rests = {"curriculum": {"rest_iterations": 4}, "num_iterations": 20}
    preflight.check(config(**rests | {"raw_datasets.shapes_rl.count": 33}))
    said = (
        r"field curriculum .*passes over prompts, but train_paths_file gives {0} different rows and an iteration .*{0}"
    )
    with pytest.raises(EarlError, match=said.format(32)):
        preflight.check(config(**rests | {"raw_datasets.shapes_rl.count": 32}))
    filled = {"usable_groups": 32, "max_rounds": 1, "prompts_per_round": 8}
    rests |= {"zero_variance_groups": "mask", "dynamic_sampling": filled}
    preflight.check(config(**rests | {"raw_datasets.shapes_rl.count": 41}))
    with pytest.raises(EarlError, match=said.format(40)):
        preflight.check(config(**rests | {"raw_datasets.shapes_rl.count": 40}))
