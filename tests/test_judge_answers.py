"""Rubrics, prompts and answers: what a judge model is asked, and what of its words counts as scores."""

import base64
import json
from pathlib import Path

import pytest

from earl.errors import EarlError
from earl.judges import answers, chat, rubric
from earl.judges.answers import Unusable
from earl.judges.rubric import Rubric

SHIPPED = Path(rubric.__file__).parent / "rubrics"
TWO = Rubric(
    name="two", images=["original", "edited"], scores=["edit_success", "overedit"], lowest=0, highest=10, prompt="?"
)
ONE = Rubric(name="one", images=["edited"], scores=["ground_score"], lowest=0, highest=10, prompt="?")
AS_LIST = TWO.model_copy(update={"score_list": "score"})


def read(text: str, rubric: Rubric = TWO, finish_reason: str = "stop") -> list[int]:
    return list(answers.parse(text, finish_reason, rubric).values())


# Rubrics


@pytest.mark.parametrize(("part", "scores"), rubric.SCORES_OF.items())
def test_shipped_rubrics_ask_for_their_scores(part, scores):
    found = rubric.load(SHIPPED / f"{part}.jsonnet")
    assert (tuple(found.scores), found.lowest, found.highest) == (scores, 0, 10)
    assert all(name in found.prompt for name in scores)


def test_perceptual_quality_is_not_shown_the_original_nor_the_instruction():
    found = rubric.load(SHIPPED / "perceptual_quality.jsonnet")
    assert found.images == ["edited"]
    assert "{instruction}" not in found.prompt


def write(folder: Path, **changes: object) -> Path:
    (folder / "mine.jsonnet").write_text("// a comment\n" + json.dumps(TWO.model_dump(exclude_none=True) | changes))
    return folder / "mine.jsonnet"


def test_a_digest_is_of_what_a_rubric_says(tmp_path):
    assert rubric.load(write(tmp_path)).digest == TWO.digest
    assert rubric.load(write(tmp_path, prompt="??")).digest != TWO.digest


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"scores": ["beauty"]}, "scores.0"),
        ({"images": []}, "images"),
        ({"highest": 0}, "not below highest"),
        ({"highest": 100}, "highest"),
        ({"prompt": "look at {target}"}, "target, which is not in images"),
        ({"prompt": "{edited} {edited}"}, "twice"),
        ({"scores": ["overedit", "overedit"]}, "twice"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_mistake_in_a_rubric_names_file_and_field(tmp_path, changes, part):
    with pytest.raises(EarlError) as caught:
        rubric.load(write(tmp_path, **changes))
    assert "mine.jsonnet" in str(caught.value)
    assert part in str(caught.value)


def test_another_range_is_stretched_to_the_columns():
    from_one_to_five = ONE.model_copy(update={"lowest": 1, "highest": 5})
    assert [from_one_to_five.stretched(value) for value in from_one_to_five.values] == [0, 2.5, 5, 7.5, 10]


# Prompts


def test_images_stand_where_the_prompt_puts_them_and_braces_in_an_instruction_mean_nothing():
    mine = TWO.model_copy(update={"prompt": "After {edited}: {instruction}, braces {stay}."})
    ((message,),) = [chat.messages(mine, "add {original}", {"original": b"before", "edited": b"after"})]
    content = message["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url"]
    assert content[2]["text"] == ": add {original}, braces {stay}."
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [b"after", b"before"]


# Answers


def test_the_schema_wants_short_reasoning_first_and_whole_numbers_in_range():
    form = answers.schema(TWO, 300)
    assert list(form["properties"]) == form["required"] == ["reasoning", "edit_success", "overedit"]
    assert form["properties"]["reasoning"]["maxLength"] == 300
    assert form["properties"]["overedit"] == {"type": "integer", "minimum": 0, "maximum": 10}
    assert form["additionalProperties"] is False
    listed = answers.schema(AS_LIST, 300)["properties"]["score"]
    assert (listed["minItems"], listed["maxItems"]) == (2, 2)


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "done", "edit_success": 7, "overedit": 10}',
        '{"overedit":10,"edit_success":7}',
        '{"reasoning":"a\ttab and \x18","edit_success":7,"overedit":10}',
        'Here you are:\n```json\n{"edit_success": 7, "overedit": 10}\n```\nAnything else?',
        'The set {a, b} is odd. {"edit_success": 7.0, "overedit": "10"}',
        '{"note": 1} {"edit_success": 7, "overedit": 10} {"edit_success": 7, "overedit": 10}',
        '{"reasoning": "I mean {\\"edit_success\\": 3}", "edit_success": 7, "overedit": 10}',
    ],
)
def test_intact_answers_are_read(text):
    assert read(text) == [7, 10]


def test_published_prompts_answer_with_a_list():
    assert read('{"score": [7, 10], "reasoning": "x"}', AS_LIST) == [7, 10]
    single = ONE.model_copy(update={"score_list": "score"})
    assert read('{"score": [4]}', single) == read('{"score": 4}', single) == [4]
    for wrong in ('{"score": [7]}', '{"score": [7, 10, 1]}', '{"score": 7}', '{"score": [[7], 10]}'):
        with pytest.raises(Unusable):
            read(wrong, AS_LIST)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would give it a 7 and a 10.",
        '{"edit_success": 7}',
        '{"edit_success": 7, "overedit": null}',
        '{"edit_success": 7, "overedit": 11}',
        '{"edit_success": -1, "overedit": 10}',
        '{"edit_success": 7.5, "overedit": 10}',
        '{"edit_success": NaN, "overedit": 10}',
        '{"edit_success": Infinity, "overedit": 10}',
        '{"edit_success": 1e400, "overedit": 10}',
        '{"edit_success": true, "overedit": 10}',
        '{"edit_success": "7/10", "overedit": 10}',
        '{"edit_success": [7], "overedit": 10}',
        '{"edit_success": 7, "edit_success": 8, "overedit": 10}',
        '{"edit_success": 7, "overedit": 10} or rather {"edit_success": 8, "overedit": 10}',
        '{"edit_success": 7, "overedit": 10} or rather {"edit_success": 8}',
        '{"reasoning": "cut off", "edit_success": 7, "overedit": 1',
        '{"example": {"edit_success": 5, "overedit": 5}, "edit_success": 7, "ove',
        '{"edit_success": ' + "9" * 5000 + ', "overedit": 10}',
        "{" * 100_000,
        '{"a":' * 50_000,
        "<html><body>edit_success: 7, overedit: 10</body></html>",
    ],
    ids=lambda text: text[:40],
)
def test_nothing_is_guessed(text):
    with pytest.raises(Unusable):
        read(text)


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "None"])
def test_an_unfinished_answer_does_not_count(finish_reason):
    with pytest.raises(Unusable, match=finish_reason):
        read('{"edit_success": 7, "overedit": 10}', finish_reason=finish_reason)


def test_places_are_where_numbers_begin_whatever_the_reasoning_says():
    text = '{"reasoning": "\\"edit_success\\": 3", "edit_success": 7, "overedit": 10}'
    assert [text[place:][:2] for place in answers.places(text, TWO)] == ["7,", "10"]
    listed = '{"reasoning": "", "score": [10, 4]}'
    assert [listed[place:][:2] for place in answers.places(listed, AS_LIST)] == ["10", "4]"]
    with pytest.raises(Unusable):
        answers.places('{"edit_success": "7", "overedit": 10}', TWO)
