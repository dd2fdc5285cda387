"""The expected score against distributions worked out by hand, for tokenizers that spell 10 in one token and in two."""

import math

import pytest

from earl.judges import answers, readout
from earl.judges.answers import Unusable
from earl.judges.chat import Pass, Token
from earl.judges.rubric import Rubric

ONE = Rubric(name="one", images=["edited"], scores=["ground_score"], lowest=0, highest=10, prompt="?")
TWO = Rubric(name="two", images=["edited"], scores=["edit_success", "overedit"], lowest=0, highest=10, prompt="?")


def token(text: str, **choices: float) -> Token:
    """A token with the probabilities of what could stand there, `_7` for "7"."""
    listed = [(name.removeprefix("_"), math.log(p)) for name, p in choices.items()] or [(text, 0.0)]
    return Token(text, listed)


def of(text: str, choices: dict[str, float]) -> Token:
    return Token(text, [(name, math.log(p)) for name, p in choices.items()])


def answer(*tokens: Token | str) -> Pass:
    parts = [one if isinstance(one, Token) else of(one, {one: 1.0}) for one in tokens]
    return Pass("".join(part.text for part in parts), "stop", parts)


def expected(rubric: Rubric, *tokens: Token | str, **continued: Token) -> dict[str, float]:
    scores, unclear = readout.expected(answer(*tokens), rubric, {int(k[1:]): v for k, v in continued.items()} or None)
    assert not unclear
    return scores


START = ('{"', "reason", 'ing": "so', '", "ground_score"', ": ")


def test_digits_alone():
    # 0.5 * 7 + 0.3 * 8 + 0.2 * 3
    assert expected(ONE, *START, token("7", _7=0.5, _8=0.3, _3=0.2), "}") == {"ground_score": pytest.approx(6.5)}


def test_only_numbers_count_and_their_probabilities_are_scaled_to_one():
    choices = {"7": 0.6, "8": 0.2, " ": 0.1, '"': 0.05, "x": 0.05}
    # (0.6 * 7 + 0.2 * 8) / 0.8
    assert expected(ONE, *START, of("7", choices), "}") == {"ground_score": pytest.approx(7.25)}


def test_ten_as_one_token():
    # The token "10" needs nothing more; "1" hardly counts, so it is taken for 1.
    choices = {"10": 0.4, "9": 0.5995, "1": 0.0005}
    assert expected(ONE, *START, of("10", choices), "}") == {"ground_score": pytest.approx(4 + 5.3955 + 0.0005)}


def test_ten_in_two_tokens_where_the_model_wrote_ten():
    first, second = of("1", {"1": 0.8, "9": 0.2}), of("0", {"0": 0.75, "}": 0.25})
    # p(10) = 0.8 * 0.75, p(1) = 0.8 * 0.25, p(9) = 0.2
    expectation = 0.6 * 10 + 0.2 * 1 + 0.2 * 9
    assert expected(ONE, *START, first, second, "}") == {"ground_score": pytest.approx(expectation)}


def test_where_the_model_wrote_one_the_end_tells_them_apart_too():
    first, second = of("1", {"1": 0.5, "2": 0.5}), of("}", {"}": 0.9, "0": 0.1})
    assert expected(ONE, *START, first, second) == {"ground_score": pytest.approx(0.05 * 10 + 0.45 * 1 + 0.5 * 2)}


def test_where_the_model_wrote_another_digit_the_beginning_up_to_one_is_to_be_continued():
    given = (*START, of("8", {"8": 0.5, "1": 0.3, "9": 0.2}), "}")
    scores, (unclear,) = readout.expected(answer(*given), ONE)
    assert scores == {}
    assert unclear == readout.Unclear(0, '{"reasoning": "so", "ground_score": 1')
    # p(10) = 0.3 * 0.8, p(1) = 0.3 * 0.2
    after = of("0", {"0": 0.8, "}": 0.2})
    assert expected(ONE, *given, _0=after) == {"ground_score": pytest.approx(4 + 1.8 + 0.24 * 10 + 0.06 * 1)}


def test_where_no_number_is_ten_one_is_one():
    small = ONE.model_copy(update={"lowest": 1, "highest": 5})
    assert expected(small, *START, of("4", {"4": 0.5, "1": 0.5}), "}") == {"ground_score": pytest.approx(2.5)}


def test_tokens_that_hold_more_than_a_digit():
    tokens = ('{"edit_success"', of(": 7,", {": 7,": 0.5, ": 10,": 0.25, ": 1,": 0.25}), ' "overedit":', " ")
    scores = expected(TWO, *tokens, of("3}", {"3}": 0.5, "4": 0.5}), "<|im_end|>")
    assert scores == {"edit_success": pytest.approx(3.5 + 2.5 + 0.25), "overedit": pytest.approx(3.5)}


def test_two_scores_are_told_apart():
    tokens = ('{"edit_success": ', of("2", {"2": 0.5, "4": 0.5}), ', "overedit": ', of("9", {"9": 0.5, "7": 0.5}), "}")
    assert expected(TWO, *tokens) == {"edit_success": pytest.approx(3), "overedit": pytest.approx(8)}


def test_reasoning_whose_tokens_are_parts_of_characters_does_not_shift_the_place():
    tokens = [of(text, {text: 1.0}) for text in ('{"reasoning": "caf', "�", "�", '", "ground_score": ')]
    seven = of("7", {"7": 0.5, "5": 0.5})
    given = Pass('{"reasoning": "café", "ground_score": 7}', "stop", [*tokens, seven, of("}", {"}": 1.0})])
    assert readout.expected(given, ONE) == ({"ground_score": pytest.approx(6)}, [])


def test_the_token_that_ends_the_answer_may_be_listed():
    assert expected(ONE, *START, token("7", _7=1.0), "}", "") == {"ground_score": 7}
    ended = answer(*START, token("7", _7=1.0), "}")
    ended = Pass(ended.text, "stop", [*ended.tokens, of("<|im_end|>", {"<|im_end|>": 1.0})])
    assert readout.expected(ended, ONE)[0] == {"ground_score": 7}


def test_a_draft_in_thinking_does_not_count():
    draft = ("<think>", *START, token("2", _2=0.5, _4=0.5), "}", "</think>", "\n")
    assert expected(ONE, *draft, *START, token("7", _7=0.5, _8=0.5), "}") == {"ground_score": pytest.approx(7.5)}
    with pytest.raises(Unusable, match="does not end"):
        expected(ONE, *draft[:-2], *START, token("7", _7=1.0), "}")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"7": 0.5, "8": 0.2}, "30.0% of the distribution"),
        ({"x": 1.0}, "no number in range"),
        ({"7": 20.0}, "no log-probability"),
        ({"7": math.nan}, "no log-probability"),
    ],
)
def test_what_is_not_known_is_not_guessed(choices, message):
    with pytest.raises(Unusable, match=message):
        expected(ONE, *START, of("7", choices), "}")


def test_an_unseen_rest_of_one_percent_is_let_pass():
    assert expected(ONE, *START, token("7", _7=0.991), "}") == {"ground_score": 7}


def test_tokens_of_another_text_or_none_at_all():
    with pytest.raises(Unusable, match="do not spell"):
        readout.expected(Pass('{"ground_score": 7}', "stop", [of("no", {"no": 1.0})]), ONE)
    with pytest.raises(Unusable, match="without log-probabilities"):
        readout.expected(Pass('{"ground_score": 7}', "stop"), ONE)


@pytest.mark.parametrize("rest", ["0}", "}", '0, "overedit": 10}', ',"overedit":3}'])
def test_what_may_follow_a_one(rest):
    import re

    rubric = TWO if "overedit" in rest else ONE
    assert re.fullmatch(answers.rest_pattern(rubric, 0), rest)
    assert not re.fullmatch(answers.rest_pattern(rubric, 0), "5" + rest)
