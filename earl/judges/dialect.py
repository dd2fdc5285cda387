"""How requests are put to a server: the chat API as vLLM and OpenAI have it, less what a server does not take.

A server that refuses a request and names what it refuses is asked again without that. Where this goes well the change
stays, and is logged with what it means for what is measured.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from earl.judges import server
from earl.judges.chat import Question
from earl.statistics import seeds

BARE, OBJECT, FREE = "a schema with bounds", "a schema", "JSON output"
ONE, RENAMED = "n", "max_tokens"
MEANING = {
    RENAMED: "it is asked with max_completion_tokens",
    ONE: "several answers are asked for one by one, with seeds of their own",
    "seed": "its answers cannot be reproduced",
    "temperature": "it samples at a temperature of its own, not at judge_temperature",
    "top_p": "it cuts the distribution as it likes",
    "top_k": "it cuts the distribution as it likes",
    "repetition_penalty": "it weighs repetitions as it likes",
    "structured_outputs": "what it goes on with is free text",
    BARE: "reasoning may be of any length",
    OBJECT: "answers are JSON, but of any form",
    FREE: "answers are free text, which is read tolerantly",
}
"""What can be left out, and what that means."""
_BOUNDS = ("maxLength", "minimum", "maximum", "minItems", "maxItems")
_UNKNOWN = re.compile(r"max_completion_tokens|un(known|supported|recognized|expected)|extra|not (supported|permitted)")
_REFUSES = re.compile(
    r"un(known|supported|recogni[sz]ed|expected)|(not|n't) (support(ed)?|permitted|allowed|available|implemented)"
    r"|invalid (json[ _])?(schema|grammar|response_format)|extra (fields|inputs)"
    r"|(fail(ed|ure)|unable|cannot|could not|error)[a-z ]{0,20} (pars|compil|convert)[a-z]*[a-z ]{1,20}(grammar|schema)"
)
"""A fault that says these words of a parameter is a refusal of it."""
_ONLY_ONE = re.compile(r"\b(?:only (?:one|1|a single)|multiple) (?:\w+ )?(?:choice|completion|candidate|response)s?\b")
_TOO_LONG = re.compile(r"context (length|window|size)|too (long|many tokens)|maximum (number of )?tokens")


@dataclass(frozen=True)
class Dialect:
    """What a server does not take: keys of `MEANING`."""

    without: frozenset[str] = frozenset()
    is_vllm: bool = False

    def body(self, question: Question, model: str, passes: int, seed: int) -> dict[str, Any]:
        """Return the request for so many answers to a question."""
        body: dict[str, Any] = {
            "model": model,
            "messages": question.messages,
            "n": passes,
            "seed": seed,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "top_p": 1.0,
        }
        if question.regex is not None:
            body["structured_outputs"] = {"regex": question.regex}
        elif question.schema is not None and FREE not in self.without:
            body["response_format"] = self._form(question.schema)
        if question.logprobs:
            body |= {"logprobs": True, "top_logprobs": server.TOP_LOGPROBS}
        if question.continues:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.is_vllm:
            # Some checkpoints bring defaults that would make every pass the same.
            body |= {"top_k": -1, "repetition_penalty": 1.0}
        if RENAMED in self.without:
            body["max_completion_tokens"] = body["max_tokens"]
        return {name: value for name, value in body.items() if name not in self.without}

    def _form(self, schema: Any) -> dict[str, Any]:
        if OBJECT in self.without:
            return {"type": "json_object"}
        shown = _unbounded(schema) if BARE in self.without else schema
        return {"type": "json_schema", "json_schema": {"name": "judgement", "schema": shown, "strict": True}}

    def changes(self, said: str, body: dict[str, Any]) -> Iterator[str]:
        """Yield what a refusal of ``body`` may be about, keys of `MEANING`, what it names first coming first."""
        words = " ".join(_texts(said))
        if _TOO_LONG.search(words.lower()):
            return
        found = {name: at for name in MEANING if name in body and (at := _named(name, words)) is not None}
        if RENAMED in found and not _UNKNOWN.search(words.lower()):
            del found[RENAMED]  # a value that is too large
        if body.get(ONE, 1) > 1 and (about := _ONLY_ONE.search(words.lower())):
            found.setdefault(ONE, about.start())
        if {"temperature", "top_p"} <= found.keys():
            found["top_p"] = -1  # where one of them has to go: it is 1, which changes nothing
        if "response_format" in body:
            places = [_named(name, words) for name in _BOUNDS]
            if bounds := [at for at in places if at is not None]:
                found[BARE] = min(bounds)
            if about := re.search(r"response_format|schema|structured|grammar|guided", words, re.IGNORECASE):
                # In this order, and after a refusal of the bounds alone.
                found |= {OBJECT: max([about.start(), *bounds]) + 0.1, FREE: max([about.start(), *bounds]) + 0.2}
        yield from sorted(found, key=lambda name: found[name])


def refuses_form(said: str, body: dict[str, Any]) -> bool:
    """Return whether the words of a server's fault say that it does not take something that ``body`` has."""
    if not _REFUSES.search(" ".join(_texts(said)).lower()):
        return False
    return any(Dialect().changes(said, body)) or ("logprobs" in body and refuses_logprobs(said))


def refuses_logprobs(said: str) -> bool:
    """Return whether a refusal is about log-probabilities."""
    words = " ".join(_texts(said))
    return _named("logprobs", words) is not None or _named("top_logprobs", words) is not None


def pass_seed(question: Question, index: int) -> int:
    """Return the seed of answer ``index`` to a question whose answers are asked for one by one."""
    return question.seed if index == 0 else seeds.seed("judge pass", question.seed, index) % 2**31


def _texts(said: str) -> Iterator[str]:
    """Yield all texts of an error response, or the response itself where it is no JSON."""
    try:
        content = json.loads(said)
    except (ValueError, RecursionError):
        yield said
        return
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | list):
            stack += reversed(list(item.values()) if isinstance(item, dict) else item)


def _named(name: str, words: str) -> int | None:
    found = re.search(rf"(?<![\w\\-]){name}(?![\w-])", words)
    return found and found.start()


def _unbounded(schema: Any) -> Any:
    """A schema without what some servers do not know: bounds."""
    if isinstance(schema, dict):
        return {name: _unbounded(value) for name, value in schema.items() if name not in _BOUNDS}
    return [_unbounded(item) for item in schema] if isinstance(schema, list) else schema
