"""Rubrics, prompts and answers: what a judge model is asked, and what of its words counts as scores."""

import base64
import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from earl.judges import answers, chat, rubric, thinking
from earl.judges.answers import Unusable
from earl.judges.rubric import Rubric
from earl.messages.errors import EarlError

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
    urls = {"original": chat.data_url(b"before"), "edited": chat.data_url(b"after")}
    (message,) = chat.messages(mine, "add {original}", urls)
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


FINAL = '{"reasoning": "done", "edit_success": 8, "overedit": 9}'
DRAFT = '{"reasoning": "at first", "edit_success": 2, "overedit": 2}'
FORM = '{"reasoning": "...", "edit_success": number, "overedit": number}'
THINKING = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<THINK>", "</THINK>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start thinking|>", "<|end thinking|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("begin", "end"), THINKING)
def test_thinking_goes_before_the_answer_is_read(begin, end):
    for thought in (DRAFT, f"The form is {FORM}.", 'edit_success: 3/10, or { "a', ""):
        assert read(f"{begin}{thought}{end}\n\n{FINAL}\n") == [8, 9]
        assert read(f"{begin}\n{thought}\n{end}```json\n{FINAL}\n```") == [8, 9]


@pytest.mark.parametrize(("begin", "end"), THINKING[:-1])
def test_thinking_whose_beginning_the_prompt_holds_goes_too(begin, end):
    assert read(f"First guess: {DRAFT}. That is too harsh.{end}{FINAL}") == [8, 9]
    with pytest.raises(Unusable):
        read(f"{DRAFT}\n{end}")


@pytest.mark.parametrize(("begin", "end"), THINKING)
def test_thinking_that_does_not_end_is_no_answer(begin, end):
    for text in (f"{begin}First guess: {DRAFT}", f"{begin}a{end}{begin}{FINAL}", f"{FINAL}{begin}b{end}"):
        with pytest.raises(Unusable):
            read(text)
    assert read(f"{begin}a {begin} b{end} c {end}{FINAL}") == [8, 9]
    with pytest.raises(Unusable):
        read(f"{begin}a {begin} b{end}{FINAL}")


def test_thinking_of_one_kind_does_not_end_that_of_another():
    assert read(f"<think><reasoning>{DRAFT}</reasoning>{DRAFT}</think>{FINAL}") == [8, 9]
    with pytest.raises(Unusable):
        read(f"<think><reasoning>{DRAFT}</reasoning>{FINAL}")


def test_a_mark_of_thinking_inside_the_answers_own_text_is_text():
    assert read('{"reasoning": "<think>the </think> edit", "edit_success": 8, "overedit": 9}') == [8, 9]


@pytest.mark.parametrize(
    "text",
    [
        f"<think>First guess: {DRAFT}</think> edit_success: 8/10 and overedit: 9/10",
        f"An answer such as {DRAFT} would be too harsh. I give 8 and 9",
        f"An answer such as {DRAFT} would be too harsh. I give eight and nine.",
        f"I give 8 and 9. An answer such as {DRAFT} would be too harsh.",
        f"I give 8 and 9.\n{DRAFT}",
        f"{DRAFT}\nOn second thought: 8.5",
        f"{DRAFT}\n**Edit Success**: eight",
        f"{DRAFT}\nedit-success is eight",
        f"edit_success=8, overedit=9\n{DRAFT}",
        f"Overedit: nine\n{DRAFT}",
        f"{DRAFT} {{'edit_success': 8, 'overedit': 9}}",
        f"{DRAFT} {{edit_success: 8, overedit: 9}}",
        f"{DRAFT}\n[8, 9]",
        f"8 out of 10, 9/10\n{DRAFT}",
        f"from 0 to 8\n{DRAFT}",
        f"{DRAFT}\nCorrected:\n8. It is better than I thought.",
        f"{DRAFT}\nCorrected:\n1. It is worse than I thought.",
        f"{DRAFT}\nCorrected:\n1. 8\n2. 9",
        f"{DRAFT}\nCorrected:\n1.  The cat is gone.\n8. So this.",
        f"{DRAFT}\nThe answer for image 1, 8",
        f"{DRAFT}\nImages 1 and 8.5",
        f"{DRAFT}\nFor image 1, 8 points",
        f"{DRAFT}\nImage 8, image 9",
        f"{DRAFT}\nbetween 0 and 8",
        f"{DRAFT}\n[0, 8]",
        f"{DRAFT}\nOver-edit: nine",
        f"{DRAFT}\nOver edit: nine",
        f"{DRAFT}\n8pts and 9pts",
        f"{DRAFT}\n```json\n{FINAL}\n```",
        f"{FORM}\n{FINAL}",
        '{"draft": {"edit_success": 2, "overedit": 2}, "edit_success": 8, "overedit": 9}',
        '{"edit_success": 2, "overedit": 2, "final": {"edit_success": 8, "overedit": 9}}',
        f'{{"edit_success": 8, "overedit": 9}} {{"earlier": [{DRAFT}]}}',
        '{"edit_success": 2, "overedit": 2, "final_edit_success": 8}',
        '{"edit_success": 2, "overedit": 2, "edit_success_revised": 8}',
        '{"edit_success": 2, "overedit": 2, "Edit Success (revised)": "eight"}',
        '{"edit_success": 2, "overedit": 2, "over-edit": null}',
        '{"edit_success": 2, "overedit": 2, "corrected": [8, 9]}',
        '{"edit_success": 2, "overedit": 2, "corrected": "8"}',
        '{"edit_success": 2, "overedit": 2, "corrected": ["8/10", "90%"]}',
        '{"edit_success": 2, "overedit": 2, "confidence": 0.5}',
        '{"edit_success": 2, "overedit": 2, "final": {"values": [{"first": 8}]}}',
        '{"edit_success": 2, "overedit": 2, "final": {"edit_success is": "eight"}}',
        '{"reasoning": {"final": 8}, "edit_success": 2, "overedit": 2}',
        f"<!-- {DRAFT} -->",
        f"<!--\n```json\n{DRAFT}\n```\n-->\nNothing to see.",
        f"<!-- {DRAFT}",
        f"~~{DRAFT}~~",
        f"~~At first: {DRAFT}~~ It is better than that.",
        f"<draft>{DRAFT}</draft>",
        f"<Draft n='a'>\n{DRAFT}\n</Draft>\nI withdraw that.",
        f"<del>{DRAFT}</del>",
        f"<draft>{DRAFT}",
        f"{DRAFT}\nOn second thought 80% and 90%.",
        f"80 % for both\n{DRAFT}",
        f"{DRAFT}\nCorrected: 85/100",
        f"{DRAFT}\nCorrected: 85 out of 100",
        f"85 percent\n{DRAFT}",
        f"17/20\n{DRAFT}",
        f"{DRAFT}\nIt is 80% after all.",
    ],
)
def test_a_draft_is_no_answer(text):
    with pytest.raises(Unusable):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        FINAL,
        f"\n {FINAL}\n\n",
        f"```json\n{FINAL}\n```",
        f"```\n{FINAL}\n```\n",
        f"Here is my verdict:\n\n{FINAL}",
        f"Here are the scores, from 0 to 10: {FINAL}",
        f"On a scale of 0-10:\n{FINAL}\nLet me know if you need anything else!",
        f"The 2nd picture is at x4, in 256 colours. My answer is {FINAL}.",
        f"<answer>{FINAL}</answer>",
        f"Final answer: `{FINAL}`",
        f"I would give 8 and 9.\n{FINAL}",
        f"[{FINAL}]",
        f"Scores out of 10, for Image 1 and image 2:\n{FINAL}",
        f"1. The cat is gone.\n2. **The sky** is the same.\n3) So is the grass.\n\n```json\n{FINAL}\n```",
        f"{FINAL}\n\nWhy:\n 1. The cat is gone.\n 2. The sky is the same.",
        f"**Step 1:** Compare.\n**Step 2:** Judge by criterion 1 and criterion 2.\n{FINAL}",
        f"Images 1 and 2 are alike; Picture #1 is [Image-1], photo 2 is Figure 2.\n{FINAL}",
        f"From 0 (nothing) to 10 (all), so between 0 and 10, in [0, 10], on a 10-point scale:\n{FINAL}",
        FINAL.replace("8", '"8.0"').replace("9", '"9"'),
        FINAL.replace("done", "edit_success could be 3, overedit 4 of 10, were it not for <image>"),
        FINAL.replace("done", 'the form is {\\"edit_success\\": 3, \\"overedit\\": 3}'),
        '{"image": {"size": [4, 4]}, "edit_success": 8, "overedit": 9}',
        '{"explanation": "8 of 10", "edit_success": 8, "overedit": 9, "notes": {"first": ["Step 1 is done"], "a": ""}}',
        '{"edit_success": 8, "overedit": 9, "is_final": true, "problem": null, "naturalness": 3}',
        f"<!-- an answer -->\n{FINAL}\n<!-- the end -->",
        f"~~no~~ {FINAL} ~~yes~~",
        f"~~~json\n{FINAL}\n~~~",
        f"<draft>It is red.</draft>{FINAL}",
        FINAL.replace("done", "<!-- ~~ <draft>"),
        f"So 80% and 90/100:\n{FINAL}",
    ],
)
def test_what_is_clear_is_read(text):
    assert read(text) == [8, 9]


# What answers are made of, and what they may be wrapped in.
NUMBERS = st.integers(0, 10)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Nd"]), max_size=30)


def answer_of(success: int, overedit: int, reasoning: str) -> str:
    return json.dumps({"reasoning": reasoning, "edit_success": success, "overedit": overedit}, ensure_ascii=False)


# A reasoning that is a number alone may be a score, and is refused.
REASONING = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(
    lambda text: not re.fullmatch(r"[\s\d./%-]*\d[\s\d./%-]*", text)
)
ANSWERS = st.builds(answer_of, NUMBERS, NUMBERS, REASONING)
BEFORE = st.sampled_from(["", "\n", "```json\n", "Here you are:\n", "The cat is gone. Answer: ", "Scores (0 to 10): "])
AFTER = st.sampled_from(["", "\n", "\n```\n", "\nIs there anything else?", ".", "<|im_end|>", " Done."])
DRAFTS = st.one_of(
    ANSWERS,
    st.just(FORM),
    st.builds("edit_success: {}/10".format, NUMBERS),
    st.builds("I give {} and {}".format, NUMBERS, NUMBERS),
    st.just("I'm sorry, I cannot judge that. {"),
    WORDS,
)


@st.composite
def thoughts(draw) -> str:
    begin, end = draw(st.sampled_from(THINKING[:-1]))
    inside = " ".join(draw(st.lists(DRAFTS, max_size=3)))
    return draw(st.sampled_from(["", begin])) + inside + end if not thinking.MARK.search(inside) else ""


@settings(deadline=None)
@given(ANSWERS, BEFORE, AFTER, thoughts())
def test_a_valid_answer_in_harmless_prose_reads_the_same(answer, before, after, thought):
    assume(not thinking.MARK.search(answer))
    wanted = [json.loads(answer)[name] for name in TWO.scores]
    text = f"{thought}{before}{answer}{after}"
    assert read(text) == wanted
    assert [int(re.match(r"\d+", text[place:])[0]) for place in answers.places(text, TWO)] == wanted
    assert all(place > text.rindex(answer) for place in answers.places(text, TWO))


@settings(deadline=None)
@given(st.lists(st.one_of(DRAFTS, thoughts(), BEFORE, AFTER), max_size=6), st.sampled_from(["", " ", "\n"]))
def test_scores_are_those_of_the_last_object_or_none(parts, between):
    text = between.join(parts)
    try:
        scores = read(text)
    except Unusable:
        return
    last = text.rindex('"edit_success"')
    assert re.match(r'"edit_success": (\d+), "overedit": (\d+)\}', text[last:]).groups() == tuple(map(str, scores))
    after = text[text.rindex("}") :].replace("0 to 10", "")
    assert "edit_success" not in after
    assert set(map(int, re.findall(r"\d+", after))) <= set(scores)


@settings(deadline=None)
@given(ANSWERS, ANSWERS, BEFORE, AFTER)
def test_two_readings_are_none(one, other, before, after):
    assume([json.loads(one)[name] for name in TWO.scores] != [json.loads(other)[name] for name in TWO.scores])
    with pytest.raises(Unusable):
        read(f"{before}{one}{after}{other}")


def test_a_list_beside_scores_by_name_has_two_readings():
    with pytest.raises(Unusable):
        read('{"score": [7, 10], "edit_success": 8}', AS_LIST)


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


@pytest.mark.parametrize("before", [f"<think>{DRAFT}</think>", f"{DRAFT}</think>\n```json\n", FINAL + "\n"])
def test_places_are_those_of_the_object_that_was_read(before):
    text = before + FINAL
    assert answers.places(text, TWO) == [len(before) + FINAL.index("8"), len(before) + FINAL.index("9}")]
