"""What is asked of a chat model and what it answers: the one form for every way of reaching it, and the prompt builder.

A model is asked for many things at once and answers in any order, so that a batch engine can batch and a client can
keep a server busy.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from earl.judges import marks
from earl.judges.rubric import Rubric
from earl.messages.text import encodable

Messages = list[dict[str, Any]]
"""Messages of the OpenAI chat API: plain dicts, images as data URLs."""

_PLACE = re.compile(r"\{(original|target|edited)\}")


@dataclass(frozen=True)
class Question:
    """One request to a chat model."""

    messages: Messages
    seed: int
    """0..2**31 - 1; with several passes, each pass draws from a seed of its own that follows from this one."""
    passes: int = 1
    """Answers wanted; the prompt is read once for all of them."""
    max_tokens: int = 512
    temperature: float = 1.0
    schema: Mapping[str, Any] | None = None
    """JSON schema that answers must follow, where the model can be held to one."""
    regex: str | None = None
    """Regular expression that the answer must begin to match; takes the place of `schema`."""
    logprobs: bool = False
    """Whether the likeliest tokens at each place are wanted, too."""
    continues: bool = False
    """Whether the last message is the beginning of the answer, which the model is to go on with."""


@dataclass(frozen=True)
class Token:
    """One token of an answer and what could have stood in its place."""

    text: str
    choices: Sequence[tuple[str, float]]
    """Text and log-probability (natural) of the likeliest tokens at this place, in the model's own spelling."""


@dataclass(frozen=True)
class Pass:
    """One answer."""

    text: str
    finish_reason: str
    """``stop`` where the model ended by itself; anything else means that the text is cut off."""
    tokens: Sequence[Token] | None = None
    """Only where log-probabilities were asked for."""
    refusal: str | None = None
    """Why there is no text, in the server's words."""


@dataclass(frozen=True)
class Reply:
    """What came back for a question: its passes, or why there are none."""

    passes: Sequence[Pass] = ()
    tokens_in: int | None = None
    """Tokens of the prompt, images included; None where the server does not say."""
    tokens_out: int | None = None
    """Tokens of all passes together."""
    seconds: float = 0.0
    """How long the request took; in a batch, the batch's time divided by its questions."""
    error: str | None = None
    """Why there is no answer, after everything that can be tried again has been."""


def storable(reply: Reply) -> Reply:
    """Return a reply whose texts can be written to files, whatever JSON they came in."""
    passes = [
        replace(
            one,
            text=encodable(one.text),
            finish_reason=encodable(one.finish_reason),
            refusal=one.refusal and encodable(one.refusal),
        )
        for one in reply.passes
    ]
    return replace(reply, passes=passes, error=reply.error and encodable(reply.error))


class ChatModel(Protocol):
    """A chat model that sees images, wherever it runs."""

    def ask(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        """Call ``take(index, reply)`` exactly once for every question, in any order.

        Raises:
            EarlError: when the model cannot be reached or asked at all.
        """
        ...


def messages(rubric: Rubric, instruction: str, urls: Mapping[str, str]) -> Messages:
    """Return the one user message that puts a rubric's question.

    Args:
        rubric: Its prompt is split where images go; images it does not place follow in the rubric's order.
        instruction: Braces in it mean nothing, and marks of the model's template are broken: see `marks.plain`.
        urls: The data URL of every image that the rubric names.
    """
    shown = marks.plain(instruction)
    pieces = _PLACE.split(rubric.prompt)  # text, name, text, name, ..., text
    unplaced = [name for name in rubric.images if name not in pieces[1::2]]
    content: list[dict[str, Any]] = []
    for text, name in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        if text.strip():
            content.append({"type": "text", "text": text.replace("{instruction}", shown)})
        if name is not None:
            content.append(_image(urls[name]))
    return [{"role": "user", "content": content + [_image(urls[name]) for name in unplaced]}]


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(png: bytes) -> str:
    """Return a PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
