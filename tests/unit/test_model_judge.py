"""The judge that asks a model, with a model that says what a test wants: what is asked, asked again and kept."""

import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from earl import cli
from earl.config import freeze
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.judges import Judgement, model_judge, rubric
from earl.judges.cache import Cache
from earl.judges.chat import Pass, Question, Reply, Token
from earl.judges.model_judge import ModelJudge, Settings
from earl.messages.errors import EarlError
from earl.stages import score
from tests.support import judge_files

RUBRICS = {name: rubric.load(Path(rubric.__file__).parent / "rubrics" / f"{name}.jsonnet") for name in rubric.SCORES_OF}
GROUND = RUBRICS["ground_score"]


class Model:
    """A chat model that answers by a function of the question and of how often it was asked the same."""

    def __init__(self, answer: Callable[[Question, int], Reply]) -> None:
        self.answer, self.asked = answer, []

    def ask(self, questions, take):
        # In another order than asked: nothing may hang on it.
        for index in reversed(range(len(questions))):
            question = questions[index]
            before = sum(other.messages == question.messages for other in self.asked)
            self.asked.append(question)
            take(index, self.answer(question, before))


def says(*numbers: int) -> Reply:
    return Reply([Pass(json.dumps({"ground_score": n}), "stop") for n in numbers], 100, 10 * len(numbers), 0.5)


def judgement(shade: int = 1, instruction: str = "make it red") -> Judgement:
    pictures = (np.full((4, 4, 3), value, np.uint8) for value in (0, shade, 255))
    return Judgement(instruction, *pictures)


def judge_by(answer, rubrics=(GROUND,), retries=2, cache=None, **settings) -> tuple[ModelJudge, Model]:
    model = Model(answer)
    return ModelJudge("fake", model, rubrics, Settings("m", None, image_size=4, **settings), retries, cache), model


def test_a_verdict_is_the_mean_and_variance_of_the_passes():
    judge, model = judge_by(lambda question, before: says(4, 6, 8, 10), samples=4)
    (verdict,) = judge.score([judgement()])
    assert (verdict.status, verdict.ground_score) == ("ok", 7)
    assert verdict.variance == {"ground_score": 5}
    assert verdict.edit_success is None
    (question,) = model.asked
    assert question.passes == 4
    (request,) = verdict.requests
    assert [one["scores"][0]["value"] for one in request["passes"]] == [4, 6, 8, 10]
    assert (request["tokens_in"], request["tokens_out"]) == (100, 40)


def test_an_answer_without_scores_is_asked_for_again_with_a_new_seed_and_only_that():
    def answer(question, before):
        return says(4, 99) if before == 0 else says(99) if before == 1 else says(8)

    judge, model = judge_by(answer, samples=2)
    (verdict,) = judge.score([judgement()])
    assert (verdict.status, verdict.ground_score) == ("ok", 6)
    assert [question.passes for question in model.asked] == [2, 1, 1]
    assert len({question.seed for question in model.asked}) == 3
    assert [one["failure"] for request in verdict.requests for one in request["passes"]] == [
        None,
        "ground_score is 99, outside 0..10",
        "ground_score is 99, outside 0..10",
        None,
    ]


def test_an_answer_without_text_is_asked_for_again_and_reported_in_the_servers_words():
    refused = Reply([Pass("", "stop", refusal="I cannot help with that picture.")])
    judge, model = judge_by(lambda question, before: says(8) if before else refused)
    (verdict,) = judge.score([judgement()])
    assert (verdict.status, verdict.ground_score) == ("ok", 8)
    assert len({question.seed for question in model.asked}) == 2
    judge, model = judge_by(lambda question, before: refused, retries=2)
    (verdict,) = judge.score([judgement()])
    assert (verdict.status, len(model.asked)) == ("failed", 3)
    assert verdict.failure == "ground score: I cannot help with that picture."
    assert [one["failure"] for request in verdict.requests for one in request["passes"]] == [
        "I cannot help with that picture."
    ] * 3


def test_a_refusal_outweighs_scores_beside_it():
    both = Reply([Pass('{"ground_score": 8}', "stop", refusal="no")])
    judge, _ = judge_by(lambda question, before: both, retries=0)
    assert judge.score([judgement()])[0].failure == "ground score: no"


def test_asking_again_is_bounded_and_ends_in_a_failure_with_the_words():
    judge, model = judge_by(lambda question, before: says(11), retries=2)
    (verdict,) = judge.score([judgement()])
    assert len(model.asked) == 3
    assert (verdict.status, verdict.ground_score, verdict.raw) == ("failed", None, '{"ground_score": 11}')
    assert verdict.failure == "ground score: ground_score is 11, outside 0..10"


def test_one_rubric_that_fails_fails_the_judgement():
    def answer(question, before):
        numbers = {"edit_success": 5, "overedit": 5, "naturalness": 5}
        return Reply([Pass(json.dumps(numbers), "stop")])

    judge, _ = judge_by(answer, [RUBRICS["semantic_consistency"], RUBRICS["perceptual_quality"]], retries=0)
    (verdict,) = judge.score([judgement()])
    assert (verdict.status, verdict.edit_success) == ("failed", None)
    assert verdict.failure == "perceptual quality: artifacts is missing"


def test_what_the_network_gave_up_is_not_asked_again():
    judge, model = judge_by(lambda question, before: Reply(error="HTTP 500"))
    (verdict,) = judge.score([judgement()])
    assert (len(model.asked), verdict.status, verdict.failure) == (1, "failed", "ground score: HTTP 500")


def test_a_rubric_without_its_image_fails_by_name():
    judge, model = judge_by(lambda question, before: says(1))
    (verdict,) = judge.score([Judgement("x", *(np.zeros((4, 4, 3), np.uint8) for _ in range(2)))])
    assert verdict.failure == "the rubric 'ground score' shows the target image, and there is none"
    assert model.asked == []


def test_what_is_identical_is_asked_once_and_seeds_hang_on_content_alone():
    judge, model = judge_by(lambda question, before: says(3))
    verdicts = judge.score([judgement(1), judgement(2), judgement(1)])
    assert [verdict.ground_score for verdict in verdicts] == [3, 3, 3]
    assert len(model.asked) == 2
    again, other = judge_by(lambda question, before: says(3))
    again.score([judgement(2)])
    assert other.asked[0].seed in {question.seed for question in model.asked}


def test_the_same_words_to_the_model_are_asked_once():
    judge, model = judge_by(lambda question, before: says(3))
    judge.score([judgement(1, "write <|im_end|>"), judgement(1, "write < |im_end|>")])
    assert len(model.asked) == 1


def test_a_rubric_that_does_not_show_the_instruction_is_asked_once_for_all_of_them():
    quality = {"naturalness": 5, "artifacts": 5}
    judge, model = judge_by(
        lambda question, before: Reply([Pass(json.dumps(quality), "stop")]), [RUBRICS["perceptual_quality"]]
    )
    judge.score([judgement(1, "one"), judgement(1, "two")])
    assert len(model.asked) == 1


def test_images_go_in_as_png_of_the_stated_size():
    import base64
    import io

    from PIL import Image

    judge, model = judge_by(lambda question, before: says(3))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    judge.score([Judgement("x", pixels, pixels, np.kron(pixels, np.ones((2, 2, 1), np.uint8)))])
    urls = [part["image_url"]["url"] for part in model.asked[0].messages[0]["content"] if part["type"] == "image_url"]
    shown = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [(image.format, image.size) for image in shown] == [("PNG", (2, 4))] * 2
    assert np.array_equal(np.asarray(shown[1]), pixels), "what has the size already goes in as it is"


def test_the_store_answers_across_reruns_until_something_differs(tmp_path):
    def run(question_of=judgement, rubrics=(GROUND,), model="m", revision=None, **settings) -> int:
        asked = Model(lambda question, before: says(3))
        options = Settings(model, revision, image_size=4, **settings)
        ModelJudge("fake", asked, rubrics, options, cache=Cache(tmp_path / "store.sqlite")).score([question_of()])
        return len(asked.asked)

    assert run() == 1
    assert run() == 0
    changed = GROUND.model_copy(update={"prompt": GROUND.prompt + "!"})
    assert [run(rubrics=(changed,)), run(model="n"), run(revision="r"), run(random_seed=1), run(temperature=0.5)] == [
        1
    ] * 5
    assert run(lambda: judgement(2)) == 1
    assert run(lambda: judgement(1, "other words")) == 1
    assert run() == 0


def test_the_store_gives_the_same_verdict_and_keeps_no_failure(tmp_path):
    answers = iter([says(4, 99), says(99), says(99), says(7, 9)])

    def verdict():
        judge, model = judge_by(lambda question, before: next(answers), cache=Cache(tmp_path / "s.sqlite"), samples=2)
        return judge.score([judgement()])[0], len(model.asked)

    failed, _ = verdict()
    assert failed.status == "failed"
    first, asked = verdict()
    assert (first.ground_score, asked) == (8, 1)
    assert verdict() == (first, 0)


def test_a_store_that_is_none_is_named(tmp_path):
    (tmp_path / "s.sqlite").write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(EarlError, match=r"s\.sqlite: the store of judgements cannot be used"):
        Cache(tmp_path / "s.sqlite")


def test_stages_side_by_side_share_the_store(tmp_path):
    one, other = Cache(tmp_path / "s.sqlite"), Cache(tmp_path / "s.sqlite")
    one.put("a", [1])
    other.put("a", [2])
    other.put("b", [3])
    one.flush()
    other.flush()
    assert (Cache(tmp_path / "s.sqlite").get("a"), one.get("b")) == ([1], [3]), "what is there already stays"


def test_answers_before_an_interruption_are_kept(tmp_path):
    class Breaks(Model):
        def ask(self, questions, take):
            super().ask(questions[:1], take)
            raise EarlError("the server is gone")

    settings, cache = Settings("m", None, image_size=4), Cache(tmp_path / "s.sqlite")
    broken = ModelJudge("fake", Breaks(lambda question, before: says(3)), [GROUND], settings, cache=cache)
    with pytest.raises(EarlError, match="gone"):
        broken.score([judgement(1), judgement(2)])
    judge, model = judge_by(lambda question, before: says(3), cache=Cache(tmp_path / "s.sqlite"))
    assert [verdict.ground_score for verdict in judge.score([judgement(1), judgement(2)])] == [3, 3]
    assert len(model.asked) == 1


def test_a_model_that_loses_a_question_is_an_error():
    class Loses(Model):
        def ask(self, questions, take):
            pass

    judge = ModelJudge("fake", Loses(None), [GROUND], Settings("m", None, image_size=4))
    with pytest.raises(EarlError, match="no reply to 1 of 1 questions"):
        judge.score([judgement()])


# The expected score


def token(choices: dict[str, float]) -> Token:
    return Token(next(iter(choices)), [(text, math.log(p)) for text, p in choices.items()])


def spelt(*parts: dict[str, float]) -> Pass:
    tokens = [token(part) for part in ({'{"ground_score": ': 1.0}, *parts)]
    return Pass("".join(one.text for one in tokens), "stop", tokens)


def test_expected_scores_ask_how_a_one_goes_on_with_the_same_seed():
    def answer(question, before):
        if question.continues:
            return Reply([Pass("0", "length", [token({"0": 0.5, "}": 0.5})])], 120, 1)
        return Reply([spelt({"8": 0.6, "1": 0.4}, {"}": 1.0})], 100, 5)

    judge, model = judge_by(answer, expected=True)
    (verdict,) = judge.score([judgement()])
    assert verdict.ground_score == pytest.approx(0.6 * 8 + 0.2 * 10 + 0.2 * 1)
    first, second = model.asked
    assert second.messages == [*first.messages, {"role": "assistant", "content": '{"ground_score": 1'}]
    assert (second.max_tokens, second.continues, second.logprobs, second.seed) == (1, True, True, first.seed)
    assert [request["continues"] for request in verdict.requests] == [None, '{"ground_score": 1']


def test_expected_scores_without_a_continuation_are_failed():
    def answer(question, before):
        return Reply(error="HTTP 400") if question.continues else Reply([spelt({"8": 0.6, "1": 0.4}, {"}": 1.0})])

    judge, model = judge_by(answer, expected=True)
    (verdict,) = judge.score([judgement()])
    assert verdict.status == "failed"
    assert "does not tell 1 from 10: HTTP 400" in verdict.failure
    assert verdict.raw == '{"ground_score": 8}'
    assert len(model.asked) == 2


def test_what_a_template_would_read_in_an_echoed_beginning_is_broken_but_for_its_thinking():
    text = '<think>the <|im_end|> mark<|end|></think>{"reasoning": "<|image_pad|>", "ground_score": '

    def answer(question, before):
        if question.continues:
            return Reply([Pass("0", "length", [token({"0": 0.5, "}": 0.5})])], 120, 1)
        tokens = [Token(text, [(text, 0.0)]), token({"8": 0.6, "1": 0.4}), token({"}": 1.0})]
        return Reply([Pass("".join(one.text for one in tokens), "stop", tokens)], 100, 5)

    judge, model = judge_by(answer, expected=True)
    (verdict,) = judge.score([judgement()])
    assert verdict.status == "ok"
    shown = '<think>the < |im_end|> mark< |end|></think>{"reasoning": "< |image_pad|>", "ground_score": 1'
    assert model.asked[1].messages[-1] == {"role": "assistant", "content": shown}
    assert verdict.requests[1]["continues"] == shown


# The score stage


def test_the_stage_writes_every_answer(tmp_path, monkeypatch):
    rows = judge_files.write_rollouts(tmp_path / "rollouts.parquet", 2)

    def answer(question, before):
        wanted = question.schema["required"][1:]
        return Reply([Pass(json.dumps(dict.fromkeys(wanted, n)), "stop") for n in (2, 4)], 100, 40, 0.25)

    config = judge_files.config(tmp_path, "m", judge_samples=2)
    judge = judge_by(answer, [RUBRICS["semantic_consistency"], RUBRICS["perceptual_quality"]], samples=2)[0]
    monkeypatch.setattr("earl.judges.get", lambda config: judge)
    score.run(config, tmp_path / "rollouts.parquet", tmp_path / "scores.parquet")
    found = tables.read_table(tmp_path / "scores.parquet", tables.MODEL_SCORES).to_pylist()
    assert [row["episode_id"] for row in found] == [row["episode_id"] for row in rows]
    assert [row["status"] for row in found] == ["ok"] * 8 + ["no_image"]
    assert {(row["edit_success"], row["edit_success_variance"]) for row in found[:8]} == {(3, 1)}
    assert {(row["judge_model"], row["tokens_in"], row["tokens_out"], row["seconds"]) for row in found[:8]} == {
        ("m", 200, 80, 0.5)
    }
    first = found[0]["requests"][0]
    assert first["rubric_digest"] == RUBRICS["semantic_consistency"].digest
    assert [one["finish_reason"] for one in first["passes"]] == ["stop", "stop"]
    assert found[8]["requests"] == []
    metadata = pq.read_schema(tmp_path / "scores.parquet").metadata
    assert metadata[b"earl_table"] == b"scores"
    assert metadata[b"rubrics_digest"].decode() == judge.rubrics_digest
    tables.read_table(tmp_path / "scores.parquet", tables.SCORES)


class Again:
    """A score stage whose judge can be exchanged; counts what is asked."""

    def __init__(self, folder: Path, monkeypatch, samples=2, retries=1) -> None:
        changes = [{"episode_id": f"p-{name}", "instruction": name} for name in ("bad", "worse", "lost")]
        self.rows = judge_files.write_rollouts(folder / "rollouts.parquet", 1, *changes)
        self.config = judge_files.config(folder, "m", judge_samples=samples, judge_retries=retries)
        self.rollouts, self.scores = folder / "rollouts.parquet", folder / "scores.parquet"
        self.monkeypatch, self.samples, self.retries = monkeypatch, samples, retries

    def judge(self, answer, **settings) -> Model:
        settings = {"samples": self.samples} | settings
        judge, model = judge_by(answer, retries=self.retries, **settings)
        self.judges_made = 0

        def get(config):
            self.judges_made += 1
            return judge

        self.monkeypatch.setattr("earl.judges.get", get)
        return model

    def read(self) -> list[dict]:
        return tables.read_table(self.scores, tables.MODEL_SCORES).to_pylist()


def about(question: Question, *words: str) -> bool:
    return any(f"instruction was: {word}\n" in json.dumps(question.messages).replace("\\n", "\n") for word in words)


def first_answers(question: Question, before: int) -> Reply:
    if about(question, "lost"):
        return Reply(error="no connection")
    if about(question, "bad", "worse"):
        return says(4, 99) if before == 0 else says(99)
    return says(*[3] * question.passes)


def test_failed_judgements_alone_are_asked_again_with_new_seeds(tmp_path, monkeypatch):
    stage = Again(tmp_path, monkeypatch)
    first_model = stage.judge(first_answers)
    score.run(stage.config, stage.rollouts, stage.scores)
    first, digest = stage.read(), manifest.digest_file(stage.scores)
    assert [row["status"] for row in first] == ["ok"] * 4 + ["no_image"] + ["failed"] * 3

    model = stage.judge(lambda question, before: says(99) if about(question, "worse") else says(*[8] * question.passes))
    assert score.run_again(stage.config, stage.rollouts, stage.scores) == (3, 1)
    second = stage.read()
    assert second[:5] == first[:5]
    assert [row["episode_id"] for row in second] == [row["episode_id"] for row in stage.rows]
    assert [(row["status"], row["ground_score"]) for row in second[5:]] == [("ok", 6), ("failed", None), ("ok", 8)]
    assert second[6]["failure"] == "ground score: ground_score is 99, outside 0..10"
    # What was answered is kept, and only what was missing asked, with seeds that follow those of the first time.
    assert sorted(question.passes for question in model.asked) == [1, 1, 1, 2]
    asked = [request for row in second[5:] for request in row["requests"]]
    assert len({request["seed"] for request in asked}) == len(asked)
    assert [request["attempt"] for request in second[5]["requests"]] == [0, 1, 2]
    assert [request["attempt"] for request in second[6]["requests"]] == [0, 1, 2, 3]
    assert second[5]["requests"][:2] == first[5]["requests"]
    assert len(first_model.asked) == 4 + 2 + 2 + 1
    told = tables.read_metadata(stage.scores)
    assert told["asked_again"] == digest
    assert told["rollouts_digest"] == manifest.digest_file(stage.rollouts)


def test_asking_again_is_a_function_of_the_files(tmp_path, monkeypatch):
    stage = Again(tmp_path, monkeypatch)
    stage.judge(first_answers)
    score.run(stage.config, stage.rollouts, stage.scores)
    before, found = stage.scores.read_bytes(), []
    for _ in range(2):
        stage.scores.write_bytes(before)
        stage.judge(lambda question, before: says(*[question.seed % 11] * question.passes))
        score.run_again(stage.config, stage.rollouts, stage.scores)
        found.append(stage.scores.read_bytes())
    assert found[0] == found[1] != before
    model = stage.judge(None)
    assert score.run_again(stage.config, stage.rollouts, stage.scores) == (0, 0)
    assert (stage.scores.read_bytes(), model.asked) == (found[0], []), "nothing failed, so nothing is written"


@pytest.mark.parametrize("what", ["configuration", "rollouts", "rubrics"])
def test_what_another_judge_scored_is_not_mixed(tmp_path, monkeypatch, what):
    stage = Again(tmp_path, monkeypatch)
    stage.judge(first_answers)
    score.run(stage.config, stage.rollouts, stage.scores)
    before = stage.scores.read_bytes()
    if what == "configuration":
        stage.config = judge_files.config(tmp_path, "m", judge_samples=2, judge_retries=1, judge_temperature=0.5)
    elif what == "rollouts":
        judge_files.write_rollouts(stage.rollouts, 1, {"episode_id": "other"})
    else:
        judge, _ = judge_by(None, [RUBRICS["perceptual_quality"]])
        monkeypatch.setattr("earl.judges.get", lambda config: judge)
    key = {"configuration": "config_digest", "rollouts": "rollouts_digest", "rubrics": "rubrics_digest"}[what]
    with pytest.raises(EarlError, match=rf"scores\.parquet: .*{key}"):
        score.run_again(stage.config, stage.rollouts, stage.scores)
    assert stage.scores.read_bytes() == before


def test_the_score_command_asks_a_file_again(tmp_path, monkeypatch):
    stage = Again(tmp_path, monkeypatch)
    freeze.write(stage.config, tmp_path / "config.json")
    stage.judge(first_answers)
    score.run(stage.config, stage.rollouts, stage.scores)
    stage.judge(lambda question, before: says(*[8] * question.passes))
    words = ["score", "--again-failed", "--config", tmp_path / "config.json", "--rollouts", stage.rollouts]
    told = CliRunner().invoke(cli.app, [*map(str, words), "--out", str(stage.scores)])
    assert told.output == f"{stage.scores}: 3 judgements had failed, 0 still have\n"
    assert [row["status"] for row in stage.read()] == ["ok"] * 4 + ["no_image"] + ["ok"] * 3


def test_the_failed_judgements_of_a_run_are_one_command(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    stage = Again(tmp_path, monkeypatch)
    freeze.write(stage.config, run.config)
    for rollouts, scores in (
        (run.iteration(1).rollouts(0), run.iteration(1).scores(0)),
        (run.iteration(2).rollouts(0), run.iteration(2).scores(0)),
        (run.evaluation("heldout", 1).rollouts, run.evaluation("heldout", 1).scores),
    ):
        rollouts.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stage.rollouts, rollouts)
        stage.judge(first_answers)
        score.run(stage.config, rollouts, scores)
    stage.judge(lambda question, before: says(*[8] * question.passes))
    told = CliRunner().invoke(cli.app, ["judge", "again", "--run", str(run.path), "--iteration", "2"])
    line = "{}: 3 judgements had failed, 0 still have\n"
    assert told.output == line.format(run.iteration(2).scores(0))
    told = CliRunner().invoke(cli.app, ["judge", "again", "--run", str(run.path)])
    assert told.output == "".join(map(line.format, (run.iteration(1).scores(0), run.evaluation("heldout", 1).scores)))
    assert stage.judges_made == 2, "one for each command: the judge `vllm` holds a model"
    told = CliRunner().invoke(cli.app, ["judge", "again", "--run", str(run.path)])
    assert told.output == f"{run.path}: no judgement has failed\n"


HALF = "\ud83d"


def answers_with_halves(question, before):
    text = json.dumps({"reasoning": "a smile ", "ground_score": 3}).replace("smile ", f"smile {HALF}")
    bad = Reply([Pass(f"no {HALF}", f"stop{HALF}", refusal=HALF)], error=None)
    if "instruction was: bad" in json.dumps(question.messages):
        return bad
    if "instruction was: gone" in json.dumps(question.messages):
        return Reply(error=f"HTTP 500 {HALF}")
    return Reply([Pass(text, "stop")], 100, 10, 0.5)


def test_half_a_surrogate_pair_ends_no_stage_neither_new_nor_kept(tmp_path, monkeypatch):
    changes = ({"episode_id": "p-bad", "instruction": "bad"}, {"episode_id": "p-gone", "instruction": "gone"})
    judge_files.write_rollouts(tmp_path / "rollouts.parquet", 1, *changes)

    def stage(answer) -> list[dict]:
        judge, _ = judge_by(answer, cache=Cache(tmp_path / "s.sqlite"), retries=1)
        monkeypatch.setattr("earl.judges.get", lambda config: judge)
        score.run(judge_files.config(tmp_path, "m"), tmp_path / "rollouts.parquet", tmp_path / "scores.parquet")
        return tables.read_table(tmp_path / "scores.parquet", tables.MODEL_SCORES).to_pylist()

    first = stage(answers_with_halves)
    assert [row["status"] for row in first] == ["ok"] * 4 + ["no_image", "failed", "failed"]
    assert first[0]["raw"] == '{"reasoning": "a smile \ufffd", "ground_score": 3}'
    assert [row["failure"] for row in first[5:]] == ["ground score: \ufffd", "ground score: HTTP 500 \ufffd"]
    # As an earlier version kept it.
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        assert database.execute("SELECT count(*) FROM answers WHERE value LIKE '%ufffd%'").fetchone() == (4,)
        database.execute(r"UPDATE answers SET value = replace(value, '\ufffd', '\ud83d')")
    assert stage(answers_with_halves) == first


def test_whole_pairs_stay(tmp_path):
    smile = json.dumps({"reasoning": "\U0001f600", "ground_score": 3}, ensure_ascii=False)
    asked = judge_by(lambda question, before: Reply([Pass(smile, "stop")]), cache=Cache(tmp_path / "s.sqlite"))[0]
    assert asked.score([judgement()])[0].raw == smile
    asked = judge_by(None, cache=Cache(tmp_path / "s.sqlite"))[0]
    assert asked.score([judgement()])[0].raw == smile


@pytest.mark.parametrize("draft", ["9", "4"])
def test_what_was_once_read_from_a_draft_is_not_taken_from_the_store(tmp_path, draft):
    # As an earlier version kept it: a score that the answer, as it is read now, does not give.
    said = '<think>{"ground_score": 9}</think>{"ground_score": 4}' if draft == "9" else 'not {"ground_score": 4} but 9'
    judge_by(lambda question, before: says(3), cache=Cache(tmp_path / "s.sqlite"))[0].score([judgement()])
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        kept = json.loads(database.execute("SELECT value FROM answers").fetchone()[0])
        kept[0]["passes"][0] |= {"raw": said, "scores": [{"name": "ground_score", "value": float(draft)}]}
        database.execute("UPDATE answers SET value = ?", (json.dumps(kept),))
    judge, model = judge_by(lambda question, before: says(6), cache=Cache(tmp_path / "s.sqlite"))
    assert (judge.score([judgement()])[0].ground_score, len(model.asked)) == (6, 1)
    judge, model = judge_by(None, cache=Cache(tmp_path / "s.sqlite"))
    assert (judge.score([judgement()])[0].ground_score, len(model.asked)) == (6, 0)


def test_a_stage_run_again_writes_the_same_bytes_from_the_store(tmp_path, monkeypatch):
    judge_files.write_rollouts(tmp_path / "rollouts.parquet", 1)
    asked = []

    def stage(out: str) -> bytes:
        judge, model = judge_by(lambda question, before: says(3), cache=Cache(tmp_path / "s.sqlite"))
        monkeypatch.setattr("earl.judges.get", lambda config: judge)
        score.run(judge_files.config(tmp_path, "m"), tmp_path / "rollouts.parquet", tmp_path / out)
        asked.append(len(model.asked))
        return (tmp_path / out).read_bytes()

    assert stage("one.parquet") == stage("two.parquet")
    assert asked == [4, 0]


def test_a_rubric_that_gives_other_scores_than_its_place_is_named(tmp_path):
    config = judge_files.config(
        tmp_path, "m", judge_rubric_perceptual_quality="package:judges/rubrics/ground_score.jsonnet"
    )
    with pytest.raises(
        EarlError, match=r"ground_score\.jsonnet: scores: has ground_score, but judge_rubric_perceptual"
    ):
        model_judge.rubrics_of(config)
    config = judge_files.config(tmp_path, "m", reward_compute_ground_score=True)
    assert [one.name for one in model_judge.rubrics_of(config)][-1] == "ground score"
