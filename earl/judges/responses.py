"""What a server answers, in the several forms that servers give to it, as `earl.judges.chat.Pass`.

No text is ever made up: where there is none, the pass says why in the server's words, and the judge asks again with
another seed.
"""

import json
import re
from typing import Any

from earl.judges.chat import Pass, Question, Token
from earl.judges.transport import PAYMENT, Faulty, Refused, failed
from earl.messages.redaction import redacted

_STOP = {
    "stop",
    "eos",
    "eos_token",
    "end_turn",
    "stop_sequence",
    "stop_token",
    "completed",
    "complete",
    "finished",
    "end",
}
_LENGTH = {"length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length"}
_PASSES_BY = re.compile(r"rate.?limit|overload|too many requests|time.?d? ?out|unavailable|try again|capacity|busy")
_BROKEN = re.compile(r"internal|server.?error|upstream|bad gateway")
_LONGEST_WORDS = 300


def passes(answer: Any, question: Question, wanted: int) -> list[Pass]:
    """Return the answers in a response, at most ``wanted``.

    Raises:
        Busy, Faulty, Refused: the response is an error that came with the status 200.
        Faulty: it is no response of the chat API, or has log-probabilities of another form.
    """
    if not isinstance(answer, dict):
        raise Faulty(f"the response is no answer: {shown(answer)}")
    if error := _error(answer):
        return [Pass("", "none", refusal=_words("an error", error))] * wanted
    if "choices" not in answer:
        raise Faulty(f"the response has no choices: {shown(answer)}")
    choices = answer["choices"]
    if not choices:
        return [Pass("", "none", refusal=_words("an answer without choices", answer))] * wanted
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Faulty(f"the choices are no list of answers: {shown(answer)}")
    for choice in choices:
        _error(choice)
    if all(type(choice.get("index")) is int for choice in choices):
        choices = sorted(choices, key=lambda choice: choice["index"])
    used = usage(answer)[1]
    ended = used is not None and len(choices) == 1 and used < question.max_tokens
    try:
        return [_pass(choice, question.logprobs, ended) for choice in choices[:wanted]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Faulty(f"the response has log-probabilities of another form: {error!r}") from error


def usage(answer: Any) -> tuple[int | None, int | None]:
    """Return the tokens of the prompt and of all answers, as far as the server says."""
    found = answer.get("usage") if isinstance(answer, dict) else None
    found = found if isinstance(found, dict) else {}
    return _count(found.get("prompt_tokens")), _count(found.get("completion_tokens"))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _error(content: dict[str, Any]) -> Any:
    """Return an error that stands in the place of an answer, None where there is none; raise as its status would.

    A key that is refused, or has no money left, is so for all; what else does not pass is this question's, and
    returned.
    """
    error = content if content.get("object") == "error" else content.get("error")
    if not error or content.get("choices"):
        return None
    words = shown(error)
    fields = error if isinstance(error, dict) else {}
    codes = [fields.get(name) for name in ("code", "status", "status_code")]
    status = next((int(code) for code in map(str, codes) if re.fullmatch(r"[45]\d\d", code)), None)
    if status is None:
        status = 503 if _PASSES_BY.search(words.lower()) else 500 if _BROKEN.search(words.lower()) else 400
    found = failed(status, words)
    if found.status in (401, PAYMENT) or not isinstance(found, Refused):
        raise found
    return error


def _pass(choice: dict[str, Any], logprobs: bool, ended: bool) -> Pass:
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text = _text(message.get("content"))
    reason = _finish_reason(choice.get("finish_reason"), text, ended)
    tokens = None
    listed = (choice.get("logprobs") or {}).get("content")
    if logprobs and listed is not None:
        tokens = [
            Token(entry["token"], [(top["token"], float(top["logprob"])) for top in entry["top_logprobs"]])
            for entry in listed
        ]
    if not text.strip():
        return Pass("", reason, tokens, refusal=_why(message, choice, reason))
    return Pass(text, reason, tokens)


def _text(content: Any) -> str:
    """The text of a message: a string, or parts of which those that are text are joined."""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text", None)]
    return "".join(text for text in texts if isinstance(text, str))


def _finish_reason(value: Any, text: str, ended: bool) -> str:
    """A server's word for the end of an answer in the words of `Pass`.

    Where there is none the answer counts as whole if it is shorter than it might be, or ends as JSON does.
    """
    if value is None or value == "":
        return "stop" if ended or text.rstrip().endswith(("}", "```")) else "none"
    word = str(value).lower().removeprefix("finishreason.")
    return "stop" if word in _STOP else "length" if word in _LENGTH else str(value)


def _why(message: dict[str, Any], choice: dict[str, Any], reason: str) -> str:
    """Why an answer has no text, in the server's words."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    refusals = [message.get("refusal"), *(part.get("refusal") for part in parts)]
    refused = next((words for words in refusals if words), None)
    if refused:
        return _words("the model refuses", refused)
    if error := choice.get("error"):
        return _words("an error", error)
    if calls := message.get("tool_calls") or message.get("function_call"):
        return _words("a call of a tool instead of an answer", calls)
    if thoughts := message.get("reasoning_content") or message.get("reasoning"):
        return _words(f"reasoning without an answer (finish_reason {reason!r})", thoughts)
    return _words(f"an answer without text (finish_reason {reason!r})", choice)


def _words(what: str, said: Any) -> str:
    return f"{what}: {shown(said)}"


def shown(said: Any) -> str:
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    text = redacted(" ".join(text.encode("utf-8", "replace").decode().split()))
    return text if len(text) <= _LONGEST_WORDS else f"{text[:_LONGEST_WORDS]}..."
