"""Runs side by side: means, paired changes, failures and published rows, as a page, a table and JSON."""

import json

import pytest

from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import comparison, curves, dots, results
from earl.stages import compare
from tests.support.evaluation_files import demo_config, episode, write_evaluation
from tests.support.html_page import Page, text_of

GREEDY, SAMPLED = "heldout_greedy", "heldout"


@pytest.fixture(scope="module")
def config():
    return demo_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """Runs `a` and `b`: b gains 1 and 3 on the two prompts of one evaluation, and has a failure in the other."""
    base = tmp_path_factory.mktemp("runs")
    for name, gains in (("a", (0.0, 0.0)), ("b", (1.0, 3.0))):
        tasks = ("add", "swap")
        rows = [episode(i, 4.0 + i + gain, task=tasks[i]) for i, gain in enumerate(gains)]
        write_evaluation(base / name, GREEDY, 2, rows, config)
        rows = [episode(0, 2.0, sample=s) for s in range(2)] + [episode(1, 6.0)]
        if name == "b":
            rows[2] |= {"status": "failed", **dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts"))}
        write_evaluation(base / name, SAMPLED, 2, rows, config)
    write_evaluation(base / "b", GREEDY, 0, [episode(0, 1.0), episode(1, 1.0)], config)
    metrics = base / "b" / "iterations" / "000001" / "train" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"iteration": 1, "reward_mean": 3.0, "inputs": {"policy": "p"}}))
    return base


def entries(folder, *specs, wanted=()):
    return [results.read(str(folder / spec), wanted) for spec in specs]


def test_means_changes_and_failures_by_hand(folder):
    found = results.compare(entries(folder, "a", "b"))
    assert found["columns"] == [SAMPLED, GREEDY]
    a, b = found["entries"]
    assert [part["viescore"]["mean"] for part in a["evaluations"].values()] == [4, 4.5]
    assert a["mean"] == pytest.approx((4 + 4.5) / 2)
    assert b["mean"] == pytest.approx((2 + 6.5) / 2)
    assert (results.failures(a), results.failures(b)) == (0, 1)
    assert b["evaluations"][SAMPLED]["best_of"]["2"]["mean"] == 2
    change = found["changes"]["b"]
    assert (change[GREEDY]["all"]["mean"], change[GREEDY]["all"]["n"]) == (2.0, 2)
    assert (change[GREEDY]["all"]["low"], change[GREEDY]["all"]["high"]) == (1.0, 3.0)
    assert {task: one["mean"] for task, one in change[GREEDY]["tasks"].items()} == {"add": 1.0, "swap": 3.0}
    assert change[SAMPLED]["all"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 1}, "the failed prompt is no pair"


def test_prompts_that_only_have_one_name_are_no_pairs(tmp_path, config):
    """Two data sets made of other tasks with one seed: the same ids, one instruction in common."""
    for name, instruction in (("a", "Remove it"), ("b", "Swap them")):
        rows = [episode(0, 2.0, instruction=instruction), episode(1, 4.0)]
        write_evaluation(tmp_path / name, GREEDY, 2, rows, config)
    found = results.compare(entries(tmp_path, "a", "b"))
    assert found["changes"]["b"][GREEDY]["all"]["n"] == 1
    assert f"{GREEDY}: a and b have 1 prompt in common, of 2 and 2; the change is over these." in found["notes"]


def test_an_entry_is_the_newest_policy_that_all_its_evaluations_have(folder):
    assert [entry.iteration for entry in entries(folder, "b", "b@2")] == [2, 2]
    first = results.read(str(folder / "b@0"), [GREEDY])
    assert (first.label, first.iteration, list(first.summaries)) == ("b@0", 0, [GREEDY])
    told = rf"iteration 0 has not all evaluations \({SAMPLED} has 2; {GREEDY} has 0, 2\); --evaluation {GREEDY} shows"
    with pytest.raises(EarlError, match=told):
        results.read(str(folder / "b@0"))
    with pytest.raises(EarlError, match=rf"iteration 1 has not been evaluated \({SAMPLED} has 2; {GREEDY} has 0, 2\)"):
        results.read(str(folder / "b@1"))
    with pytest.raises(EarlError, match="has no summary of nothing"):
        results.read(str(folder / "a"), ["nothing"])
    with pytest.raises(EarlError, match="has no summary of any evaluation"):
        results.read(str(folder))
    with pytest.raises(EarlError, match="two runs have one name"):
        results.compare(entries(folder, "a", "a"))


def test_published_rows_are_marked_and_are_the_papers(folder):
    found = results.compare(entries(folder, "a"), published=True)
    rows = found["published"]["rows"]
    for row in rows:
        assert sum(row["values"]) / 6 == pytest.approx(row["mean"], abs=0.011), "as printed, to two decimals"
    assert rows[-1]["values"] == [6.39, 4.47, 4.27, 4.52, 4.93, 4.19]


def tables_of(text: str) -> list[list[str]]:
    """The Markdown tables of a text, as their lines."""
    return [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]


@pytest.mark.parametrize(("name", "apart"), [("magicbrush", False), (GREEDY, True)])
def test_published_rows_stand_in_the_table_where_they_share_a_column_with_it(tmp_path, config, name, apart):
    named = config.model_copy(update={"evaluations": {name: config.evaluations[GREEDY]}})
    write_evaluation(tmp_path / "a", name, 2, [episode(0, 4.0)], named)
    found = results.compare(entries(tmp_path, "a"), published=True)
    assert results.published_apart(found) == apart
    tables = tables_of(results.markdown(found))
    assert len(tables) == 1 + apart
    assert sum("(published, GPT-4o-mini)" in line for line in tables[-1]) == 7
    assert "magicbrush" in tables[-1][0]
    assert any(line.startswith("| a ") for line in tables[0])
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_the_change_in_training_is_from_the_runs_own_start(folder):
    """b went from 1 and 1 to 5 and 8; its other evaluation, and those of a, do not know where they started."""
    a, b = results.compare(entries(folder, "a", "b"))["entries"]
    assert b["start"][GREEDY]["mean"] == 1.0
    assert b["start"][GREEDY]["change"] == {"mean": 5.5, "low": 4.0, "high": 7.0, "n": 2}
    assert b["start"][SAMPLED] is None
    assert set(a["start"].values()) == {None}
    assert results.compare(entries(folder, "b@0", wanted=[GREEDY]))["entries"][0]["start"] == {GREEDY: None}


def test_the_page_shows_all_of_it_and_needs_nothing_else(folder, tmp_path):
    out = tmp_path / "c.html"
    text = compare.run([str(folder / "a"), str(folder / "b")], out, published=True)
    assert "| b " in text
    html = out.read_text()
    parsed = Page(html)
    assert parsed.open == []
    assert all(
        tag not in {"script", "iframe", "link"} or attributes.get("rel") == "icon"
        for tag, attributes in parsed.elements
    )
    words = text_of(html)
    figures = ("4.50 ± 0.50", "+2.00 [+1.00, +3.00]", "+5.50 [+4.00, +7.00]")
    for part in (*figures, "published", "GPT-4o-mini", "Best of 2", "swap", "Training"):
        assert part in words, part
    again = out.read_bytes()
    compare.run([str(folder / "a"), str(folder / "b")], out, published=True)
    assert out.read_bytes() == again
    assert json.loads(out.with_suffix(".json").read_text())["baseline"] == "a"


def test_the_legend_of_many_runs_stands_once_above_their_charts():
    runs = [curves.Curves(f"run{place}", [{"iteration": 1, "loss": place, "kl": 0.1}]) for place in range(5)]
    few, many = comparison.training(runs[:4]), comparison.training(runs)
    assert few["legend"] == []
    names = [run.label for run in runs]
    assert [[item["label"] for item in chart["legend"]] for chart in few["training"]] == [names[:4], names[:4]]
    assert [chart["legend"] for chart in many["training"]] == [[], []]
    assert [item["label"] for item in many["legend"]] == names
    assert [item["colour"] for item in many["legend"]] == [0, 1, 2, 3, 4]


def test_what_differs_in_sampling_or_judge_is_said(folder):
    a, b = entries(folder, "a", "b", wanted=[GREEDY])
    changed = b.summaries[GREEDY] | {"temperature": 0.7, "judge": "openai some-model"}
    found = results.compare([a, results.Entry("b", Run(folder / "b"), 2, {GREEDY: changed})])
    assert found["notes"] == [
        f"{GREEDY}: the entries differ in sampling: 0.1, 1.0, -1, 1 (a); 0.7, 1.0, -1, 1 (b).",
        f"{GREEDY}: the entries differ in judge: program (a); openai some-model (b).",
    ]


def test_a_dot_stands_where_its_value_is():
    """The axis runs from 2 to 6 over 300 - 16 - left pixels, left = 12 + 6.3 x 2 letters."""
    drawn = dots.dot_chart("t", [dots.Dot("ab", 3.0, 2.0, 6.0), dots.Dot("c", 6.0, other=True)], width=300)
    left = 12 + 2 * dots.LETTER
    assert f'cx="{round(left + (284 - left) / 4, 1)}"' in drawn
    assert f'd="M{left:.1f} 15.0H284.0"' in drawn
    assert 'class="ring c5" cx="284.0"' in drawn


def test_a_dot_shows_where_it_came_from():
    """The axis runs from 1 to 3, so the ring of 1 stands at its left end, and a line leads from there to 3."""
    drawn = dots.dot_chart("t", [dots.Dot("ab", 3.0, before=1.0)], width=300)
    left = 12 + 2 * dots.LETTER
    assert f'class="way" d="M{round(left, 1)} 15.0H284.0"' in drawn
    assert f'class="ring c5" cx="{round(left, 1)}"' in drawn
    assert "before 1" in drawn


def test_the_best_of_several_samples_is_by_the_runs_present_reward(tmp_path, config):
    """Evaluated by VIEScore (4), continued with the ground score (6); the other run still has VIEScore."""
    for name, which in (("a", "ground_score"), ("b", "viescore")):
        write_evaluation(tmp_path / name, GREEDY, 0, [episode(0, 4.0, s, ground_score=6.0) for s in range(2)], config)
        now = config.model_copy(update={"reward_final_reward": which})
        (tmp_path / name / "config.json").write_text(now.model_dump_json())
    found = results.compare(entries(tmp_path, "a", "b"))
    a, b = (entry["evaluations"][GREEDY] for entry in found["entries"])
    assert (a["best_of"]["2"]["mean"], b["best_of"]["2"]["mean"]) == (6.0, 4.0)
    assert a["tasks"]["add"]["best_of"]["2"]["mean"] == 6.0
    assert (a["viescore"]["mean"], b["viescore"]["mean"]) == (4.0, 4.0)
    assert any(
        "the reward that the best of several samples is by: ground_score (a); viescore (b)" in note
        for note in found["notes"]
    )


def test_evaluations_without_an_iteration_in_common_are_told_with_those_they_have(tmp_path, config):
    write_evaluation(tmp_path / "a", GREEDY, 0, [episode(0, 4.0)], config)
    write_evaluation(tmp_path / "a", SAMPLED, 2, [episode(0, 4.0)], config)
    told = rf"no iteration has all evaluations \({SAMPLED} has 2; {GREEDY} has 0\); name some with --evaluation"
    with pytest.raises(EarlError, match=told):
        results.read(str(tmp_path / "a"))
