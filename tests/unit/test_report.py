"""The report: one HTML file that needs nothing but itself, made from files alone, also when some are missing."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from earl.files import images
from earl.messages.errors import EarlError
from earl.report import charts, contents, gallery, page, reasoning
from earl.stages import report
from tests.support.evaluation_files import demo_config, episode, write_evaluation
from tests.support.html_page import Page, text_of

GREEDY, SAMPLED = "heldout_greedy", "heldout"


@pytest.fixture(scope="module")
def config():
    return demo_config()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config):
    """A run of two iterations on six prompts: greedy rewards rise by 2 each, sampled ones from 1 to 2.5."""
    run = tmp_path_factory.mktemp("runs") / "small"
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    tasks = ["add", "add", "swap", "swap", "remove", "remove"]
    for iteration, greedy, sampled in ((0, 3.0, 1.0), (2, 5.0, 2.5)):
        rows = [episode(i, greedy + i / 2, task=task) for i, task in enumerate(tasks)]
        write_evaluation(run, GREEDY, iteration, rows, config)
        rows = [episode(i, sampled, sample=s, task=task) for i, task in enumerate(tasks) for s in range(2)]
        write_evaluation(run, SAMPLED, iteration, rows, config)
    for iteration in (1, 2):
        write_metrics(run, iteration)
        for stage in ("generate", "train"):
            write_benchmark(run / "benchmarks" / stage / f"{iteration:06d}.tsv", 90.0)
    write_verification(run, [])
    return run


def write_metrics(run, iteration):
    path = run / "iterations" / f"{iteration:06d}" / "train" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"reward_mean": 2.0 + iteration, "reward_std": 1.0, "kl": None, "entropy": 0.5, "gradient_norm": 1.5}
    path.write_text(json.dumps({"iteration": iteration, **values}))


def write_benchmark(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:01:30\tNA\n")


def write_verification(run, problems, hashed=0):
    found = {"iterations": 2, "evaluations": 4, "files": 31, "hashed": hashed, "deep": bool(hashed)}
    found |= {"code_versions": 1, "problems": problems}
    (run / "verify.json").write_text(json.dumps(found))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "small")


def html_of(run):
    return page.render(contents.read(run))


def test_it_needs_nothing_from_outside(finished):
    html = html_of(finished)
    for tag, attributes in Page(html).elements:
        assert tag not in {"script", "iframe", "object", "embed"}
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\(|https?://", html)


def test_its_elements_nest_and_its_pictures_have_words(finished):
    parsed = Page(html_of(finished))
    assert parsed.open == []
    pictures = [attributes for tag, attributes in parsed.elements if tag == "img"]
    drawings = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert len(pictures) == 6 * 4
    assert all(attributes["alt"] for attributes in pictures)
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in drawings)


def test_headlines_by_hand(finished):
    """Greedy: the mean of 3, 3.5 .. 5.5 is 4.25, and every prompt gains 2, so the paired interval has no width."""
    words = text_of(html_of(finished))
    assert "Held-out reward near-greedy, T = 0.1 4.25 → 6.25 +2.00 [+2.00, +2.00]" in words
    assert "Held-out edit success near-greedy, T = 0.1 4.25 → 6.25" in words
    assert "Held-out reward sampled, T = 1 1.00 → 2.50 +1.50 [+1.50, +1.50]" in words


def test_table_by_edit_type(finished):
    words = text_of(html_of(finished))
    assert "add 2 3.25 5.25 +2.00" in words
    assert "All 6 4.25 6.25 +2.00" in words


def test_charts_say_in_words_what_they_draw(finished):
    html = html_of(finished)
    assert "Training reward. mean: 3 at iteration 1, 4 at iteration 2." in html
    assert "near-greedy, T = 0.1: 4.25 at iteration 0, 6.25 at iteration 2; sampled, T = 1: 1 at iteration 0" in html
    assert "KL to the reference" not in html  # no iteration has a value


def test_training_charts_tell_what_metrics_tell():
    parts = {"truncated_fraction": 0.25, "no_image_fraction": 0.5, "reasoning_fraction": 0.75, "viescore_mean": 3.0}
    parts |= {
        "loss": 2.5,
        "policy_loss": 1.0,
        "kl_loss": 2.0,
        "entropy_loss": -0.5,
        "kl": 0.5,
        "kl_k1": -0.5,
        "logprob_mean": -4.0,
    }
    drawn = {chart["title"]: chart for chart in page.training([{"iteration": 1, **parts}])}
    values = {title: {one["label"]: one["value"] for one in chart["legend"]} for title, chart in drawn.items()}
    assert values["Without a learning signal"] == {"cut off": 0.25, "ended without an image": 0.5}
    assert values["Reasoning"] == {"reasoning": 0.75}
    assert values["Training VIEScore"] == {"VIEScore": 3.0}
    assert values["Loss"] == {"policy": 1.0, "KL": 2.0, "sum": 2.5, "entropy": -0.5}
    assert values["KL to the reference"] == {"k3": 0.5, "k1": -0.5}
    assert "Learning rate" not in values, "it was not told"
    assert values["Log-probs of the completions"] == {"policy": -4.0}
    without = page.training([{"iteration": 1, "reasoning_fraction": 0.0}])
    assert without == [], "who never reasons need not be told so"


def test_charts_of_what_only_some_runs_do():
    plain = {"learning_rate": 1e-3, "passed_over_prompts": 0, "clip_fraction_low": None, "corrected_fraction": None}
    assert page.training([{"iteration": i, **plain} for i in (1, 2)]) == [], "a rate that stays is among the settings"
    more = {"learning_rate": 5e-4, "passed_over_prompts": 3, "clip_fraction_low": 0.25, "clip_fraction_high": 0.125}
    drawn = page.training([{"iteration": 1, **plain}, {"iteration": 2, **more, "corrected_fraction": 0.5}])
    values = {chart["title"]: {one["label"]: one["value"] for one in chart["legend"]} for chart in drawn}
    assert values["Learning rate"] == {"rate": 5e-4}
    assert values["Prompts passed over"] == {"resting": 3}
    assert values["Ratios to the sampler"] == {"clipped below": 0.25, "clipped above": 0.125, "corrected": 0.5}


def test_the_page_names_what_the_run_does_and_warns_of_few_prompts(finished, copied):
    html = html_of(finished)
    assert "2 of 20 iterations of 256 episodes," in html
    assert "One optimizer step an iteration" in html
    assert "Intervals over fewer than ten prompts are too narrow" in html, "there are two of each type"
    config = json.loads((copied / "config.json").read_text())
    config["optimizer_steps_per_iteration"], config["importance_ratio"] = 2, "behavior"
    config |= {"zero_variance_groups": "mask", "dynamic_sampling": {"usable_groups": 32, "max_rounds": 2}}
    config |= {"curriculum": {"rest_iterations": 4}}
    (copied / "config.json").write_text(json.dumps(config))
    html = html_of(copied)
    assert "2 of 20 iterations of 256 episodes or more," in html
    assert "2 optimizer steps an iteration" in html
    assert "usable_groups 32, max_rounds 2" in html
    assert "rest_iterations 4" in html


def test_a_run_without_evaluations_is_not_told_to_finish_one(copied):
    shutil.rmtree(copied / "evaluations")
    assert "Finish an evaluation" in html_of(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"evaluations": {}}))
    html = html_of(copied)
    assert "Finish an evaluation" not in html
    assert "The field evaluations is empty, so nothing is known of held-out prompts" in html


def test_equal_files_give_equal_bytes_wherever_they_lie(finished, copied, tmp_path):
    report.run(finished, tmp_path / "a.html")
    report.run(copied, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_time_of_shared_stages_counts_where_the_run_uses_them(copied, config):
    from earl.config import paths

    sft = paths.sft_folder(config, "shapes").name
    write_benchmark(copied.parent / "shared" / "benchmarks" / "sft" / f"{sft}.tsv", 180.0)
    write_benchmark(copied.parent / "shared" / "benchmarks" / "sft" / "of-another-run.tsv", 999.0)
    words = text_of(html_of(copied))
    assert "sft 1 3 min 00 s 3 min 00 s 33%" in words  # 180 of 180 + 2 * 90 + 2 * 90
    assert "generate 2 90 s 3 min 00 s 33%" in words


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["evaluations"], "No policy has been evaluated"),
        (["evaluations", "iterations", "benchmarks", "verify.json"], "No iteration has finished yet"),
        (
            [f"evaluations/{GREEDY}/000002.json", f"evaluations/{SAMPLED}/000002.json"],
            "no later one has been evaluated",
        ),
        (["iterations/000002"], "1 of 20 iterations"),
        ([f"evaluations/{SAMPLED}"], "Held-out edit success"),
        (["benchmarks"], "Training"),
    ],
)
def test_missing_pieces_leave_a_page_that_says_so(copied, missing, said):
    for name in missing:
        shutil.rmtree(copied / name) if (copied / name).is_dir() else (copied / name).unlink()
    html = html_of(copied)
    assert Page(html).open == []
    assert said in text_of(html)


def test_a_failed_judgement_and_a_missing_picture_are_shown_as_such(copied, config):
    rows = [episode(0, None, status="no_image", edited=None, target=None), episode(1, None, status="failed")]
    rows += [episode(i, 4.0) for i in range(2, 6)]
    write_evaluation(copied, GREEDY, 2, rows, config)
    html = html_of(copied)
    assert 'class="absent"' in html
    assert "All 5" in text_of(html)  # the prompt without a judgement is in no comparison


def test_texts_from_data_and_models_cannot_become_markup(copied, config):
    rows = [episode(0, 4.0, instruction="<script>alert(1)</script>", raw="</p><b>", task='"><i>')]
    for iteration in (0, 2):
        write_evaluation(copied, GREEDY, iteration, rows, config)
    html = html_of(copied)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert all(tag != "script" for tag, _ in Page(html).elements)


def test_what_iterations_warned_of_is_shown(copied):
    assert "taught less" not in page.render(contents.read(copied))
    for iteration, more in ((1, {"warnings": ["no completion holds a finished image"]}), (2, {"left_out_prompts": 3})):
        path = copied / "iterations" / f"{iteration:06d}" / "train" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    html = page.render(contents.read(copied))
    assert "1 of 2 iterations (1): no completion holds a finished image" in html
    assert "1 of 2 iterations (2): prompts that were too long have been left out" in html


def test_the_banner_says_what_was_checked_and_no_more(copied):
    words = text_of(html_of(copied))
    assert "Checked: every file is there" in words
    assert "contents were not compared" in words
    assert "31 files there" in words
    assert "Verified" not in words
    write_verification(copied, [], hashed=29)
    words = text_of(html_of(copied))
    assert "Verified: every file is there and holds what was recorded of it" in words
    assert "31 files there, 29 files with the recorded content" in words


def test_problems_of_the_verification_are_listed(copied):
    write_verification(copied, [{"file": "runs/small/x.parquet", "problem": "was changed"}])
    words = text_of(html_of(copied))
    assert "Verification found 1 problem" in words
    assert "runs/small/x.parquet: was changed" in words


def test_notes_of_the_verification_are_listed_and_are_no_problems(copied):
    written = json.loads((copied / "verify.json").read_text())
    written["notes"] = [{"file": "runs/small/metrics.json", "note": "iteration 1 was made by configuration abc"}]
    (copied / "verify.json").write_text(json.dumps(written))
    html = html_of(copied)
    assert "runs/small/metrics.json: iteration 1 was made by configuration abc" in text_of(html)
    assert "Checked: every file is there" in text_of(html)
    assert 'class="verification good"' in html


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("iterations/000002/train/metrics.json", '{"iteration": '),
        (f"evaluations/{GREEDY}/000002.json", "{}"),
        ("benchmarks/train/000001.tsv", "s\th:m:s\nsoon\t0\n"),
        (f"evaluations/{GREEDY}/000002.parquet", "PAR1"),
        (f"evaluations/{GREEDY}/000002.rollouts.parquet", "PAR1"),
    ],
)
def test_a_damaged_file_is_named_and_no_report_is_written(copied, tmp_path, name, content):
    (copied / name).write_text(content)
    with pytest.raises(EarlError, match=re.escape(name)):
        report.run(copied, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_command_line_refuses_what_is_no_run_folder(tmp_path):
    command = [sys.executable, "-m", "earl", "report", "--run", str(tmp_path), "--out", str(tmp_path / "out.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "config.json: is missing" in done.stderr
    assert list(tmp_path.iterdir()) == []


# The gallery's choice.


def tables_of(tmp_path, config, before, after):
    """Two evaluation tables of one sample a prompt: (reward, task) by prompt."""
    found = []
    for iteration, rows in ((0, before), (2, after)):
        episodes = [episode(i, reward, task=task) for i, (reward, task) in rows.items()]
        write_evaluation(tmp_path, GREEDY, iteration, episodes, config)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        series = contents.read(tmp_path).evaluations[0]
        found.append(series.table(contents.Run(tmp_path), iteration, gallery.FACTS))
    return found


def prompts(pairs):
    return [int(pair.prompt[1].removeprefix("e")) for pair in pairs]


def test_choice_by_hand(tmp_path, config):
    before = {i: (1.0, "add" if i < 6 else "swap") for i in range(12)}
    gains = [8.0, 7.0, 6.0, 5.0, 0.5, 0.4, 3.0, 2.0, -0.1, -0.2, -0.3, -0.9]
    first, last = tables_of(tmp_path, config, before, {i: (1.0 + gain, before[i][1]) for i, gain in enumerate(gains)})
    chosen = gallery.choose(first, last)
    # Best of each type, then second best of each, although four gains of "add" are larger than any of "swap".
    assert prompts(chosen["Clear improvements"]) == [0, 6, 1, 7]
    # Lowest final rewards, types in turn: 0.1 (11, swap), 1.4 (5, add), 0.7 (10, swap), 1.5 (4, add).
    assert prompts(chosen["Failures"]) == [11, 5, 10, 4]
    assert set(prompts(chosen["At random"])) == {2, 3, 8, 9}


def test_choice_does_not_depend_on_the_order_of_rows(tmp_path, config):
    before = {i: (float(i % 5), "add") for i in range(20)}
    first, last = tables_of(tmp_path, config, before, {i: (float(i % 7), "add") for i in range(20)})
    backwards = [table.take(list(range(19, -1, -1))) for table in (first, last)]
    there, here = gallery.choose(first, last), gallery.choose(*backwards)
    assert {kind: prompts(pairs) for kind, pairs in there.items()} == {kind: prompts(p) for kind, p in here.items()}


def shown(shade):
    return images.struct(images.encode(np.full((4, 4, 3), shade, np.uint8)))


def test_pictures_come_from_the_rollouts_by_episode(tmp_path, config):
    rows = [episode(i, 4.0, edited=shown(100 + i), target=shown(200)) for i in range(3)]
    write_evaluation(tmp_path, GREEDY, 0, rows, config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    series = contents.read(tmp_path).evaluations[0]
    ((_, _, cards),) = gallery.cards(contents.Run(tmp_path), series)
    assert len(cards) == 3
    for card in cards:
        number = int(card["example"].rpartition("/e")[2])
        found = [card["original"], card["target"], card["policies"][0]["picture"]]
        assert [decoded(uri)[0, 0, 0] for uri in found] == [number, 200, 100 + number]


def test_rollouts_that_are_gone_or_others_are_named(copied):
    rollouts = copied / "evaluations" / GREEDY / "000002.rollouts.parquet"
    shutil.copyfile(copied / "evaluations" / SAMPLED / "000002.rollouts.parquet", rollouts)
    with pytest.raises(EarlError, match=r"000002\.rollouts\.parquet: has changed since it was evaluated"):
        html_of(copied)
    rollouts.unlink()
    with pytest.raises(EarlError, match=r"000002\.rollouts\.parquet: cannot be read \(No such file"):
        html_of(copied)


def test_large_pictures_are_shrunk_and_small_ones_kept():
    small = np.random.default_rng(0).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    kept = gallery.data_uri(images.struct(images.encode(small)), "here")
    assert kept.startswith("data:image/png;base64,")
    assert np.array_equal(decoded(kept), small)
    large = gallery.data_uri(images.struct(images.encode(np.zeros((300, 600, 3), np.uint8))), "here")
    assert decoded(large).shape == (128, 256, 3)
    assert gallery.data_uri(None, "here") is None


def decoded(uri):
    import base64

    return images.decode(base64.b64decode(uri.partition(",")[2]), "here")


# Charts.


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (75, "75"), (4.256, "4.26"), (0.05, "0.05"), (-1.5, "−1.5"), (8.17e-7, "8.17e−7"), (12345, "12345")],  # noqa: RUF001
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


def test_only_whole_iterations_are_labelled():
    drawn = charts.line_chart("Loss", [charts.line("loss", [(0, 1.0), (1, 2.0)])])
    assert re.findall(r'middle"[^>]*>([^<]*)<', drawn) == ["0", "1"]


def test_long_series_are_averaged_in_bins():
    drawn = charts.line("long", ((i, float(i)) for i in range(3000)))
    assert len(drawn.x) <= charts.MOST_POINTS
    assert drawn.y[0] == pytest.approx(6.0)  # bins of 13: the mean of 0 .. 12
    assert drawn.x == drawn.y
    assert drawn.newest == 2999.0, "itself, not the mean of its bin"


def test_points_without_a_value_are_left_out():
    drawn = charts.line("gaps", [(1, 2.0), (2, None), (3, 4.0)])
    assert (drawn.x, drawn.y) == ([1, 3], [2.0, 4.0])
    assert charts.line("nothing", [(1, None)]) is None


def test_reasoning_is_cut_at_its_boxes():
    """In an image of 64 x 32: two places, one of them named twice; one box is too wide, one is upside down."""
    text = "scene: cat [0, 0, 16, 8], dog [10.5, 4, 64, 32], [0, 0, 65, 8] [0, 9, 16, 8] edit: [0, 0, 16, 8] goes"
    found = reasoning.pieces(f"{text}<|end thinking|><|image start|>4*8", 64, 32)
    assert "".join(piece.text for piece in found) == text
    assert [(piece.text, piece.box.colour) for piece in found if piece.box] == [
        ("[0, 0, 16, 8]", 0),
        ("[10.5, 4, 64, 32]", 1),
        ("[0, 0, 16, 8]", 0),
    ]
    assert reasoning.boxes(found) == [reasoning.Box(0, 0, 16, 8, 0), reasoning.Box(10.5, 4, 53.5, 28, 1)]
    assert reasoning.pieces("8*8", 64, 32) == reasoning.pieces("", 64, 32) == []
    cut_off = reasoning.pieces("scene: cat [0, 0, 16, 8] do", 64, 32)
    assert [piece.text for piece in cut_off] == ["scene: cat ", "[0, 0, 16, 8]", f" do {reasoning.CUT_OFF}"]


def test_the_gallery_draws_the_boxes_that_the_policy_named(config, tmp_path):
    (tmp_path / "config.json").write_text(config.model_dump_json())
    text = "<b> [1, 0, 3, 2]<|end thinking|>4*4"
    write_evaluation(tmp_path, GREEDY, 0, [episode(0, 3.0, completion_text=text)], config)
    html = html_of(tmp_path)
    assert '<rect class="c0" x="1" y="0" width="2" height="2"/>' in html
    assert '&lt;b&gt; <mark class="c0">[1, 0, 3, 2]</mark>' in html
    assert "<mark" not in html_of_plain(tmp_path / "plain", config)


def html_of_plain(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    write_evaluation(folder, GREEDY, 0, [episode(0, 3.0, completion_text="4*4")], config)
    return html_of(folder)


# A run that continued with another reward.


def continued(run, config, ground):
    """Iteration 0 evaluated by VIEScore (4), iteration 2 by the ground score (7), which is the present reward."""
    run.mkdir()
    now = config.model_copy(update={"reward_final_reward": "ground_score"})
    (run / "config.json").write_text(now.model_dump_json())
    rows = [episode(i, 4.0, ground_score=ground, sample=s) for i in range(4) for s in range(2)]
    write_evaluation(run, GREEDY, 0, rows, config)
    rows = [episode(i, 9.0, ground_score=7.0, sample=s) for i in range(4) for s in range(2)]
    write_evaluation(run, GREEDY, 2, rows, now)
    return run


def test_after_a_change_of_reward_all_points_are_by_the_present_one(tmp_path, config):
    """From ground score 6 to 7, and not from VIEScore 4 to ground score 7."""
    run = continued(tmp_path / "run", config, 6.0)
    html = html_of(run)
    words = text_of(html)
    assert "Held-out reward near-greedy, T = 0.1 6.00 → 7.00 +1.00 [+1.00, +1.00]" in words
    assert "near-greedy, T = 0.1: 6 at iteration 0, 7 at iteration 2" in html
    assert "add 4 6.00 7.00 +1.00" in words or "All 4 6.00 7.00 +1.00" in words
    assert "policy's edit, reward 6.00" in html.replace("&#39;", "'")
    assert "iteration 0: evaluated with the reward viescore; shown here by the present one, ground_score" in words
    found = contents.read(run).evaluations[0].summaries[0]
    assert [found["best_of"]["2"]["mean"], found["tasks"]["add"]["reward"]["mean"]] == [6.0, 6.0]
    assert [found["reward"]["low"], found["reward"]["std"], found["reward"]["n"]] == [6.0, 0.0, 8]
    assert "avg(reward)" not in words


def test_a_point_that_the_present_reward_lacks_scores_for_is_left_out_and_said(tmp_path, config):
    run = continued(tmp_path / "run", config, None)
    html = html_of(run)
    words = text_of(html)
    assert "Reward. near-greedy, T = 0.1: 7 at iteration 2" in html
    assert "4.00 → 7.00" not in words
    assert "heldout_greedy, iteration 0: left out where rewards are shown: score ground_score is missing" in words


def test_the_same_reward_is_shown_as_it_was_recorded(copied):
    assert "derived from the stored scores" not in text_of(html_of(copied))


def test_iterations_that_another_configuration_trained_are_named(copied):
    for iteration, digest in ((1, "of then"), (2, contents.freeze.config_digest(demo_config()))):
        path = copied / "iterations" / f"{iteration:06d}" / "train" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config_digest": digest}))
    assert "Trained with another configuration, whose change was accepted: iteration 1;" in text_of(html_of(copied))


def test_prompts_that_are_trained_on_are_not_called_held_out(copied):
    assert "held-out prompts. " in text_of(html_of(copied))
    (copied / "config.json").write_text(
        demo_config(train_paths_file=["stage:tokenise/shapes_heldout"]).model_dump_json()
    )
    words = text_of(html_of(copied))
    assert re.search(r"Measured on \d+ prompts\.", words)
    assert f"{GREEDY}: its prompts are not held out, since training draws from stage:tokenise/shapes_heldout" in words


def test_rewards_of_another_configuration_are_no_rise(copied):
    now = contents.freeze.config_digest(demo_config())
    for iteration in range(1, 21):
        write_metrics(copied, iteration)
        path = copied / "iterations" / f"{iteration:06d}" / "train" / "metrics.json"
        digest = "of then" if iteration <= 10 else now
        changed = {"reward_mean": 1.0 if iteration <= 10 else 9.0, "config_digest": digest}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    shutil.rmtree(copied / "evaluations")
    assert "Rewards of training prompts show no clear change (+0.00)" in text_of(html_of(copied))


def test_the_snippets_open_files_that_hold_what_they_look_at(copied):
    [pandas] = [part for part in html_of(copied).split("<pre>") if part.startswith("import io")]
    table, rollouts = re.findall(r'"(evaluations/.*?|iterations/.*?)"', pandas)
    assert "reward" in pq.read_schema(copied / table).names
    assert pq.read_table(copied / rollouts)["edited"][0]["bytes"].as_py()[:4] == b"\x89PNG"
