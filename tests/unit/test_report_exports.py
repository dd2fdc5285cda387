"""The parts of a report that are files of their own: curves as SVG, evaluations as CSV."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest

from earl.stages import report
from tests.support.evaluation_files import demo_config, episode, write_evaluation


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    config = demo_config()
    run = tmp_path_factory.mktemp("runs") / "small"
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    for iteration, score in ((0, 3.0), (2, 5.0)):
        rows = [episode(i, score) for i in range(4)]
        write_evaluation(run, "heldout", iteration, rows, config)
    metrics = run / "iterations" / "000001" / "train" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"iteration": 1, "reward_mean": 2.0, "reward_std": 1.0, "entropy": 0.5}))
    report.run(run, run / "report.html", run / "report" / "curves.svg", run / "report" / "evaluations.csv")
    return run


def test_evaluations_are_a_row_an_iteration_with_means_and_intervals(exported):
    with (exported / "report" / "evaluations.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["evaluation"], row["iteration"], row["prompts"]) for row in rows] == [
        ("heldout", "0", "4"),
        ("heldout", "2", "4"),
    ]
    # All four sub-scores are equal, so the reward sqrt(min SC x min PQ) is, too; all prompts alike, so no interval.
    assert [float(row["reward"]) for row in rows] == [3.0, 5.0]
    assert [(float(row["reward_low"]), float(row["reward_high"])) for row in rows] == [(3.0, 3.0), (5.0, 5.0)]
    assert [row["ground_score"] for row in rows] == ["", ""]


def test_curves_are_one_picture_that_holds_its_own_style(exported):
    picture = ET.parse(exported / "report" / "curves.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert picture.tag == f"{svg}svg"
    assert ".grid" in picture.find(f"{svg}style").text
    titles = [text.text for text in picture.findall(f"{svg}text")]
    assert titles[0].startswith("Reward: ")
    assert any(title.startswith("Training reward: mean") for title in titles)
    assert len(picture.findall(f"{svg}svg")) == len(titles)


def test_rewards_of_the_table_and_the_curves_are_all_by_the_present_reward(tmp_path):
    config = demo_config()
    now = config.model_copy(update={"reward_final_reward": "ground_score"})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(now.model_dump_json())
    write_evaluation(run, "heldout", 0, [episode(i, 3.0, ground_score=8.0) for i in range(2)], config)
    write_evaluation(run, "heldout", 2, [episode(i, 3.0, ground_score=9.0) for i in range(2)], now)
    report.run(run, run / "report.html", run / "curves.svg", run / "evaluations.csv")
    with (run / "evaluations.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["reward"]) for row in rows] == [8.0, 9.0]
    assert [float(row["reward_low"]) for row in rows] == [8.0, 9.0]
    assert "8 at iteration 0, 9 at iteration 2" in (run / "curves.svg").read_text()
