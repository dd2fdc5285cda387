"""The judge's client and servers of other makes: answers in other forms, answers without text, refused parameters."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from earl.judges import answers, rubric, transport
from earl.judges.chat import Question, Reply
from earl.judges.openai_model import OpenAIModel
from earl.messages.errors import EarlError
from tests.support.faulty_server import MODEL, answered, scripted, serving

RUBRIC = rubric.load(rubric.Path(rubric.__file__).parent / "rubrics" / "semantic_consistency.jsonnet")
QUESTION = Question([{"role": "user", "content": "?"}], seed=7, schema=answers.schema(RUBRIC, 300))
TEXT = '{"edit_success": 8, "overedit": 9}'


def ask(respond: Callable, *questions: Question, models: bool = True) -> list[Reply]:
    found: dict[int, Reply] = {}
    with serving(scripted(respond, models)) as url:
        model = OpenAIModel(url, MODEL, timeout=5.0, startup=5.0, pause=(0.001, 0.01))
        if hasattr(model, "patience"):
            model.patience = 0.3
        model.ask(questions or [QUESTION], found.__setitem__)
    return [found[index] for index in range(len(questions or [QUESTION]))]


def choices(*items: dict, **more) -> str:
    return json.dumps({"choices": items, **more})


def message(content, finish_reason="stop", **more) -> str:
    return choices({"index": 0, "message": {"content": content, **more}, "finish_reason": finish_reason})


@pytest.mark.parametrize(
    "text",
    [
        message([{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]),
        message([{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": TEXT}]),
        message(TEXT, refusal=None, tool_calls=None, reasoning_content="First, 3 and 4."),
        choices({"message": {"content": TEXT}, "finish_reason": "stop"}),
        choices({"index": None, "message": {"content": TEXT}, "finish_reason": "stop"}, usage=None),
        *[
            message(TEXT, reason)
            for reason in ("eos_token", "end_turn", "STOP", "FinishReason.STOP", "end", "eos", "", None)
        ],
        choices({"message": {"content": TEXT}}),
    ],
)
def test_text_in_any_form_is_read(text):
    (reply,) = ask(lambda asked: (200, text, ""))
    assert reply.error is None
    (one,) = reply.passes
    assert (one.text, one.finish_reason) == (TEXT, "stop")


@pytest.mark.parametrize(
    ("reason", "text", "expected"),
    [
        ("length", TEXT, "length"),
        ("max_tokens", TEXT, "length"),
        ("MAX_TOKENS", TEXT, "length"),
        ("content_filter", TEXT, "content_filter"),
        (None, '{"edit_success": 8, "overedit": 1', "none"),
        (None, "edit_success: 8, overedit: 1", "none"),
        ("", "edit_success: 8, overedit: 1", "none"),
    ],
)
def test_an_answer_that_may_be_cut_does_not_count_as_whole(reason, text, expected):
    (reply,) = ask(lambda asked: (200, message(text, reason), ""))
    assert reply.passes[0].finish_reason == expected


def test_an_answer_without_a_reason_that_is_shorter_than_it_might_be_is_whole():
    one = {"message": {"content": "edit_success: 8"}, "finish_reason": None}
    (short,) = ask(lambda asked: (200, choices(one, usage={"completion_tokens": 511}), ""))
    (full,) = ask(lambda asked: (200, choices(one, usage={"completion_tokens": 512}), ""))
    assert (short.passes[0].finish_reason, full.passes[0].finish_reason) == ("stop", "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"error": {"message": "blocked by policy", "code": 400}}), "blocked by policy"),
        (json.dumps({"error": "images of this kind are not judged"}), "images of this kind are not judged"),
        (json.dumps({"object": "error", "message": "prompt is empty", "code": 40001}), "prompt is empty"),
        (json.dumps({"choices": None, "promptFeedback": {"blockReason": "SAFETY"}}), "SAFETY"),
        (json.dumps({"choices": []}), "choices"),
        (message(None), "without text"),
        (message(""), "without text"),
        (message(" \n"), "without text"),
        (message([]), "without text"),
        (message(None, refusal="I cannot help with that."), "I cannot help with that."),
        (message([{"type": "refusal", "refusal": "I will not."}]), "I will not."),
        (message(None, "tool_calls", tool_calls=[{"function": {"name": "score_it"}}]), "score_it"),
        (message(None, "length", reasoning_content="I look at the cat"), "I look at the cat"),
        (message("", "length", reasoning="I look at the dog"), "I look at the dog"),
        (choices({"index": 0, "message": None, "finish_reason": "SAFETY"}), "SAFETY"),
        (choices({"message": {}, "error": {"code": 400, "message": "moderated"}}), "moderated"),
    ],
)
def test_no_text_is_said_in_the_servers_words(text, words):
    seen = []
    (reply,) = ask(lambda asked: seen.append(asked) or (200, text, ""))
    assert len(seen) == 1, "the judge asks again, with another seed"
    assert reply.error is None
    (one,) = reply.passes
    assert one.text == ""
    assert words in one.refusal


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"code": 429, "message": "slow down"}},
        {"error": {"code": "503"}},
        {"error": {"type": "server_error", "message": "?"}},
        {"error": "the model is overloaded, try again"},
        {"choices": [{"error": {"code": 502, "message": "provider gone"}, "finish_reason": "error", "message": {}}]},
    ],
)
def test_an_error_that_passes_is_tried_again_whatever_its_status(error):
    seen = []

    def respond(asked):
        seen.append(asked.body["seed"])
        return 200, json.dumps(error) if len(seen) == 1 else message(TEXT), ""

    (reply,) = ask(respond)
    assert (reply.error, reply.passes[0].text) == (None, TEXT)
    assert seen == [7, 7]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, {"message": "Insufficient credits", "code": 402}),
        (
            429,
            {"code": "insufficient_quota", "message": "You exceeded your current quota, check your billing details."},
        ),
        (200, {"code": "insufficient_quota", "message": "You exceeded your current quota."}),
        (400, {"message": "Insufficient Balance"}),
    ],
)
def test_an_account_without_money_ends_the_stage_at_once(status, error):
    seen = []
    with pytest.raises(EarlError, match="pay for more, or ask with the key of another account"):
        ask(lambda asked: seen.append(asked) or (status, json.dumps({"error": error}), ""))
    assert len(seen) == 1


def many(passes: int) -> Question:
    return replace(QUESTION, passes=passes)


@pytest.mark.parametrize("refusal", ["'n' : number must be at most 1", "Only one completion choice is allowed", None])
def test_several_answers_of_a_server_that_gives_one(refusal, caplog):
    seen = []

    def respond(asked):
        seen.append(asked.body)
        if refusal and asked.body.get("n", 1) > 1:
            return 400, json.dumps({"error": {"message": refusal, "param": None}}), ""
        return 200, answered(f"answer {asked.body['seed']}"), ""

    with caplog.at_level(logging.INFO, "earl"):
        replies = ask(respond, many(4), many(4), replace(many(3), seed=8))
    for reply, count in zip(replies, (4, 4, 3), strict=True):
        texts = [one.text for one in reply.passes]
        assert len(texts) == len(set(texts)) == count, "seeds differ"
    assert [one.text for one in replies[0].passes] == [one.text for one in replies[1].passes]
    assert replies[0].passes[0].text == "answer 7", "the first has the question's own"
    assert replies[0].tokens_out == 40, "all are paid"
    assert all(0 <= body["seed"] < 2**31 for body in seen)
    assert sum("n" in body and body["n"] > 1 for body in seen) <= 3
    assert len([one for one in caplog.records if "does not take n" in one.getMessage()]) == 1


def refusing(*names: str, status: int = 400, words: str = "Unsupported parameter: '{}' is not supported.") -> Callable:
    """A server that refuses the first of some parameters that it meets."""

    def respond(asked):
        respond.seen.append(asked.body)
        for name in names:
            if name in asked.body:
                return status, json.dumps({"error": {"message": words.format(name), "param": name}}), ""
        return 200, answered(TEXT), ""

    respond.seen = []
    return respond


@pytest.mark.parametrize(
    ("names", "status", "words", "said"),
    [
        (("max_tokens",), 400, "Unsupported parameter: '{}'. Use 'max_completion_tokens' instead.", "max_completion"),
        (("seed",), 400, 'Unknown name "{}": Cannot find field.', "reproduced"),
        (("temperature",), 400, "Unsupported value: '{}' does not support 0.5; only the default (1).", "temperature"),
        (("response_format",), 400, "{} is not available for this model", "tolerantly"),
        (("top_p",), 422, "{}: extra fields not permitted", "distribution"),
        (("max_tokens", "seed", "temperature"), 400, "Unsupported parameter: '{}'.", "reproduced"),
    ],
)
def test_a_refused_parameter_is_left_out_from_then_on_and_that_is_said_once(caplog, names, status, words, said):
    respond = refusing(*names, status=status, words=words)
    with caplog.at_level(logging.INFO, "earl"):
        replies = ask(respond, *[replace(QUESTION, seed=seed) for seed in range(100)])
    assert [(reply.error, reply.passes[0].text) for reply in replies] == [(None, TEXT)] * 100
    assert len(respond.seen) < 100 + 64 + 10
    assert not set(names) & set(respond.seen[-1])
    if "max_tokens" in names:
        assert respond.seen[-1]["max_completion_tokens"] == 512
    for name in names:
        told = [one.getMessage() for one in caplog.records if f"does not take {name}" in one.getMessage()]
        assert len(told) == (name != "response_format")
    assert said in caplog.text


def test_of_two_parameters_that_exclude_each_other_the_one_without_effect_goes():
    def respond(asked):
        if {"temperature", "top_p"} <= asked.body.keys():
            return 400, json.dumps({"error": {"message": "`temperature` and `top_p` cannot both be specified."}}), ""
        respond.last = asked.body
        return 200, answered(TEXT), ""

    ask(respond, replace(QUESTION, temperature=0.3))
    assert respond.last["temperature"] == 0.3
    assert "top_p" not in respond.last


def test_each_parameter_is_left_out_in_the_words_that_refused_it(caplog):
    respond = refusing("seed", "temperature", words="Unsupported parameter: '{}'.")
    with caplog.at_level(logging.WARNING, "earl"):
        ask(respond)
    for name in ("seed", "temperature"):
        (told,) = [one.getMessage() for one in caplog.records if f"does not take {name}" in one.getMessage()]
        assert f"'{name}'" in told


def test_a_schema_of_which_a_server_makes_no_grammar():
    def respond(asked):
        if asked.body.get("response_format", {}).get("type") == "json_schema":
            return 400, json.dumps({"error": {"message": "Failed to parse grammar"}}), ""
        return 200, answered(TEXT), ""

    (reply,) = ask(respond)
    assert reply.passes[0].text == TEXT


def test_the_names_in_a_form_of_fastapi_are_found():
    def respond(asked):
        if "seed" in asked.body:
            detail = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
            return 422, json.dumps({"detail": detail}), ""
        return 200, answered(TEXT), ""

    (reply,) = ask(respond)
    assert reply.passes[0].text == TEXT


def test_a_schema_without_bounds_then_json_then_free_text(caplog):
    forms = []

    def respond(asked):
        form = asked.body.get("response_format")
        forms.append(form and (form["type"], "maxLength" in json.dumps(form)))
        if form and "maxLength" in json.dumps(form):
            return 400, json.dumps({"error": {"message": "Invalid schema: 'maxLength' is not permitted."}}), ""
        if form and form["type"] == "json_schema":
            return 400, json.dumps({"error": {"message": "response_format.type must be json_object or text"}}), ""
        return 200, answered(TEXT), ""

    (reply,) = ask(respond)
    assert reply.passes[0].text == TEXT
    assert forms == [("json_schema", True), ("json_schema", False), ("json_object", False)]
    assert "of any form" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 4096 tokens; you requested 5000 (512 in max_tokens). Lower max_tokens.",
        "max_tokens is too large: 512. It must be at most 256.",
        "invalid image: seed point not found",
        "the request is bad",
    ],
)
def test_a_refusal_of_one_question_changes_nothing_for_others(words, caplog):
    seen = []

    def respond(asked):
        seen.append(asked.body)
        if asked.body["messages"][0]["content"] == "bad":
            return 400, json.dumps({"error": {"message": words}}), ""
        return 200, answered(TEXT), ""

    bad = replace(QUESTION, messages=[{"role": "user", "content": "bad"}])
    refused, good = ask(respond, bad, QUESTION)
    assert words in refused.error
    assert "HTTP 400" in refused.error
    assert good.passes[0].text == TEXT
    assert "does not take" not in caplog.text
    assert all({"seed", "max_tokens", "temperature"} <= set(b) for b in seen if b["messages"] == QUESTION.messages)
    assert len(seen) < 6


@pytest.mark.parametrize("refuses", [True, False])
def test_expected_scores_without_log_probabilities_are_refused(refuses):
    def respond(asked):
        if refuses and "logprobs" in asked.body:
            return 400, json.dumps({"error": {"message": "'logprobs' is not supported with this model"}}), ""
        return 200, answered(TEXT), ""

    with pytest.raises(EarlError, match=r"no log-probabilities.*judge_readout to 'sampled'"):
        ask(respond, replace(QUESTION, logprobs=True))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_is_compressed_although_it_should_not_be(encoding):
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    (reply,) = ask(lambda asked: (200, pack(message(TEXT).encode()), f"Content-Encoding: {encoding}\r\n"))
    assert reply.passes[0].text == TEXT


def test_an_answer_that_unpacks_to_more_than_is_read():
    bomb = gzip.compress(b" " * 2**27)
    (reply,) = ask(lambda asked: (200, bomb, "Content-Encoding: gzip\r\n"))
    assert "more than 8388608 bytes" in reply.error


@pytest.mark.parametrize("status", [403, 404, 405, 501])
def test_a_server_that_lists_no_models_is_asked_all_the_same(status):
    def respond(asked):
        return (status, "no", "") if asked.path.endswith("/models") else (200, answered(TEXT), "")

    (reply,) = ask(respond, models=False)
    assert reply.passes[0].text == TEXT


@pytest.mark.parametrize(
    "listing",
    [[{"id": MODEL}], {"data": [{"id": f"models/{MODEL}"}]}, {"models": [{"name": MODEL}]}],
)
def test_a_listing_in_another_form(listing):
    def respond(asked):
        return (200, json.dumps(listing) if asked.path.endswith("/models") else answered(TEXT), "")

    (reply,) = ask(respond, models=False)
    assert reply.passes[0].text == TEXT


@pytest.mark.parametrize(
    "listing",
    [
        {"data": []},
        [],
        [MODEL],
        {"data": [MODEL]},
        {"data": [{"id": f"{MODEL}:latest"}]},
        {"data": [{"id": "test/*"}]},
        {"data": [{"id": "other"}], "has_more": True},
        {"data": [{}]},
        "no listing",
    ],
)
@pytest.mark.parametrize("first_word", ["answered", "renamed", "busy"])
def test_a_model_that_is_not_listed_but_answers_is_asked(listing, first_word, caplog):
    def respond(asked):
        if asked.path.endswith("/models"):
            return 200, json.dumps(listing), ""
        assert asked.body["model"] == MODEL
        if first_word == "renamed" and "max_tokens" in asked.body:
            return 400, json.dumps({"error": {"message": "Unsupported parameter: 'max_tokens'."}}), ""
        respond.asked += 1
        if first_word == "busy" and respond.asked == 1:
            return 503, "loading the model", ""
        return 200, answered(TEXT), ""

    respond.asked = 0
    with caplog.at_level(logging.WARNING, "earl"):
        (reply,) = ask(respond, models=False)
    assert reply.passes[0].text == TEXT
    is_listed = listing in ([MODEL], {"data": [MODEL]})
    assert ("does not list" in caplog.text) == (not is_listed)
    assert respond.asked == (2 if not is_listed or first_word == "busy" else 1)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, {"error": {"message": f"The model `{MODEL}` does not exist.", "code": 404}}),
        (400, {"error": {"message": f"{MODEL} is not a valid model ID", "code": 400}}),
        (403, {"error": {"message": "no access to this model"}}),
        (422, {"detail": "unknown model"}),
        (200, {"error": {"message": "model not found", "code": 404}}),
    ],
)
def test_a_model_that_is_not_listed_and_is_refused_ends_the_stage_at_once(status, words):
    def respond(asked):
        if asked.path.endswith("/models"):
            return 200, json.dumps({"data": [{"id": "a"}, {"id": "b"}]}), ""
        seen.append(asked.body)
        return status, json.dumps(words), ""

    seen = []
    with pytest.raises(EarlError, match=rf"serves a, b, not \w+_model_name '{MODEL}'.*correct the name"):
        ask(respond, *[QUESTION] * 20, models=False)
    assert [body["messages"][0]["content"] for body in seen] == ["1"], "the smallest question, once"


@pytest.mark.parametrize("status", [500, 503, 408])
def test_a_listing_that_fails_for_good_is_not_waited_for_where_questions_are_answered(status, monkeypatch):
    async def expects_tls(url):
        return False

    monkeypatch.setattr(transport, "expects_tls", expects_tls)  # which takes seconds

    def respond(asked):
        if asked.path.endswith("/models"):
            respond.listed += 1
            return status, "broken", ""
        return 200, answered(TEXT), ""

    respond.listed = 0
    found: dict[int, Reply] = {}
    with serving(scripted(respond, models=False)) as url:
        # It would be given up after 1 s with an error.
        OpenAIModel(url, MODEL, startup=1.0, pause=(0.001, 0.01)).ask([QUESTION], found.__setitem__)
    assert found[0].passes[0].text == TEXT
    assert respond.listed < 10


@pytest.mark.parametrize("status", [500, 502])
@pytest.mark.parametrize(
    ("words", "refuses"),
    [
        ("response_format json_schema is not supported", lambda body: "response_format" in body),
        (
            "Failed to parse grammar",
            lambda body: body.get("response_format", {}).get("type") == "json_schema",
        ),
        ("generate() got an unexpected keyword argument 'seed'", lambda body: "seed" in body),
        ("Unsupported parameter: 'max_tokens'", lambda body: "max_tokens" in body),
    ],
)
def test_a_form_that_is_refused_with_a_servers_fault_is_changed(words, refuses, status, caplog):
    def respond(asked):
        seen.append(asked.body)
        if refuses(asked.body):
            return status, json.dumps({"message": words}), ""
        return 200, answered(TEXT), ""

    seen = []
    with caplog.at_level(logging.WARNING, "earl"):
        (reply,) = ask(respond)
    assert (reply.error, reply.passes[0].text) == (None, TEXT)
    assert len(seen) <= 4, "changed, not tried again"
    assert "does not take" in caplog.text


@pytest.mark.parametrize("words", ["seed node lost", "n workers are left", "schema of the database is locked", "oops"])
def test_a_servers_fault_that_names_no_refusal_changes_nothing(words, caplog):
    def respond(asked):
        seen.append(asked.body)
        return (500, words, "") if len(seen) == 1 else (200, answered(TEXT), "")

    seen = []
    (reply,) = ask(respond)
    assert reply.passes[0].text == TEXT
    assert seen[1] == seen[0]
    assert "does not take" not in caplog.text


def test_log_probabilities_that_are_refused_with_a_servers_fault_end_the_stage():
    def respond(asked):
        return 500, json.dumps({"error": {"message": "'logprobs' is not supported with this model"}}), ""

    with pytest.raises(EarlError, match=r"no log-probabilities.*judge_readout to 'sampled'"):
        ask(respond, replace(QUESTION, logprobs=True))


@pytest.mark.parametrize("status", [201, 202, 203])
def test_an_answer_with_another_status_of_success_is_one(status):
    (reply,) = ask(lambda asked: (status, message(TEXT), ""))
    assert (reply.error, reply.passes[0].text) == (None, TEXT)


@pytest.mark.parametrize("status", [202, 204])
def test_a_status_of_success_without_an_answer_is_named(status):
    (reply,) = ask(lambda asked: (status, "", ""))
    assert f"HTTP {status}" in reply.error


def test_a_question_that_is_forbidden_stops_no_others():
    def respond(asked):
        if asked.body["messages"][0]["content"] == "bad":
            return 403, "this input was flagged", ""
        return 200, answered(TEXT), ""

    bad = replace(QUESTION, messages=[{"role": "user", "content": "bad"}])
    found: dict[int, Reply] = {}
    with serving(scripted(respond)) as url:
        OpenAIModel(url, MODEL, concurrency=1, startup=5.0).ask([QUESTION, bad, QUESTION], found.__setitem__)
    assert [found[index].error for index in (0, 2)] == [None, None]
    assert "this input was flagged" in found[1].error
