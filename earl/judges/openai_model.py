"""A chat model behind any OpenAI-compatible server.

What a network does is met here: the server may not be up yet, answers come late, cut off or as something else. What
may pass is tried again with growing pauses, a bounded number of times; what does not pass becomes a reply with an
error. Sizes and times are bounded, so that no server can make a run hang or fill its memory.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from earl.errors import EarlError
from earl.judges import server
from earl.judges.chat import Pass, Question, Reply, Token

if TYPE_CHECKING:
    import httpx2
    import tenacity

log = logging.getLogger(__name__)

LARGEST = 8 * 2**20
"""Bytes of a response that are read at most; a response with log-probabilities has up to 1 MiB."""
OUTAGES = 3
"""Times that a question may find no server at all, the server being back each time."""
_AGAIN = {408, 409, 425, 429}
"""HTTP statuses below 500 that may pass by themselves."""
_REFUSED = {401, 403, 404, 405}
"""HTTP statuses that every question would meet."""


class _MayPass(Exception):
    """Something that may go well when it is tried again; ``pause`` is the server's wish, in seconds."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class _Unreachable(_MayPass):
    """No response at all."""


class _Fails(Exception):
    """The server refuses this one question."""


@dataclass
class OpenAIModel:
    """Asks a server, up to ``concurrency`` questions at a time."""

    api_base: str
    """URL, or a file that holds it: see `earl.judges.server.address`."""
    model: str
    concurrency: int = 64
    timeout: float = 120.0
    """Seconds that one try may take from connecting to the last byte."""
    startup: float = 1800.0
    """Seconds to wait for the server to come up."""
    tries: int = 6
    """Of one question, before it is given up."""
    pause: tuple[float, float] = (0.5, 30.0)
    """Seconds of the first pause between tries, and of the longest."""
    _url: str = field(default="", init=False)
    _is_vllm: bool = field(default=False, init=False)

    def ask(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        """See `earl.judges.chat.ChatModel`.

        Raises:
            EarlError: the server does not come up in time, or goes away for longer than that; it has no such model;
                it refuses the key.
        """
        asyncio.run(self._ask_all(questions, take))

    async def _ask_all(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        async with self._client() as client:
            await self._find(client)
            queue = iter(enumerate(questions))

            async def work() -> None:
                for index, question in queue:
                    take(index, await self._ask(client, question))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(questions))):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    def _client(self) -> "httpx2.AsyncClient":
        import httpx2

        key = os.environ.get(server.KEY)
        return httpx2.AsyncClient(
            # Uncompressed, so that what is read is no larger than what was sent.
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            limits=httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            # The whole try is timed, in `_fetch`: these would start anew with every byte.
            timeout=None,
            follow_redirects=False,
        )

    async def _find(self, client: "httpx2.AsyncClient") -> None:
        """Wait for the server and see that it has the model."""
        deadline, told = time.monotonic() + self.startup, False
        while True:
            try:
                url = server.address(self.api_base)
                if url is None:
                    raise _MayPass(f"the file {self.api_base} is not there yet")
                listing = await self._fetch(client, "GET", f"{url}/models")
                break
            except _MayPass as error:
                if time.monotonic() > deadline:
                    raise EarlError(
                        f"reward_function_api_base {self.api_base}: no judge server within {self.startup:g} s "
                        f"(judge_startup_seconds): {error}. Start one with `earl judge serve`"
                    ) from error
                if not told:
                    log.info("judge: waiting for the server at %s: %s", self.api_base, error)
                    told = True
                await asyncio.sleep(min(1.0, self.pause[0]))
            except _Fails as error:
                raise EarlError(f"{url}/models: {error}; check reward_function_api_base") from error
        self._url = url
        self._check_model(listing)

    def _check_model(self, listing: Any) -> None:
        entries = listing.get("data") if isinstance(listing, dict) else None
        entries = [entry for entry in entries or [] if isinstance(entry, dict)]
        names = [str(entry.get("id")) for entry in entries]
        if self.model not in names:
            raise EarlError(
                f"{self._url}: serves {', '.join(names[:10]) or 'no model'}, not "
                f"reward_function_api_model_name {self.model!r}; ask another server, or correct the name"
            )
        self._is_vllm = any(entry.get("owned_by") == "vllm" for entry in entries)

    async def _ask(self, client: "httpx2.AsyncClient", question: Question) -> Reply:
        start, error = time.monotonic(), ""
        for _ in range(OUTAGES):
            try:
                answer = await self._retrying()(self._complete, client, question)
                return replace(answer, seconds=time.monotonic() - start)
            except _Unreachable as outage:
                # One lost question, or no server any more? The second ends the stage: what was answered is kept.
                await self._find(client)
                error = f"no connection, {OUTAGES} times: {outage}"
            except _MayPass as last:
                error = f"after {self.tries} tries: {last}"
                break
            except _Fails as refusal:
                error = str(refusal)
                break
        return Reply(seconds=time.monotonic() - start, error=error)

    async def _complete(self, client: "httpx2.AsyncClient", question: Question) -> Reply:
        answer = await self._fetch(client, "POST", f"{self._url}/chat/completions", self._body(question))
        return _reply(answer, question)

    def _retrying(self) -> "tenacity.AsyncRetrying":
        import tenacity

        first, longest = self.pause
        backoff = tenacity.wait_random_exponential(multiplier=first, max=longest)

        def wait(state: "tenacity.RetryCallState") -> float:
            error = state.outcome.exception()
            asked_for = error.pause if isinstance(error, _MayPass) else None
            return min(longest, max(asked_for or 0.0, backoff(state)))

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_MayPass),
            stop=tenacity.stop_after_attempt(self.tries),
            wait=wait,
            reraise=True,
        )

    async def _fetch(self, client: "httpx2.AsyncClient", method: str, url: str, body: dict | None = None) -> Any:
        """Return the JSON of a response, in bounded time and space."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout), client.stream(method, url, json=body) as response:
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > LARGEST:
                        raise _MayPass(f"the response has more than {LARGEST} bytes")
        except TimeoutError as error:
            raise _MayPass(f"no whole response within {self.timeout:g} s") from error
        except httpx2.ConnectError as error:
            raise _Unreachable(f"no connection: {error}") from error
        except httpx2.TransportError as error:
            raise _MayPass(f"broken connection: {type(error).__name__}: {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Fails(f"{type(error).__name__}: {error}") from error
        return _content(response, bytes(data), url)

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": question.messages,
            "n": question.passes,
            "seed": question.seed,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "top_p": 1.0,
        }
        if question.regex is not None:
            body["structured_outputs"] = {"regex": question.regex}
        elif question.schema is not None:
            form = {"name": "judgement", "schema": question.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if question.logprobs:
            body |= {"logprobs": True, "top_logprobs": server.TOP_LOGPROBS}
        if question.continues:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self._is_vllm:
            # Some checkpoints bring defaults that would make every pass the same.
            body |= {"top_k": -1, "repetition_penalty": 1.0}
        return body


def _content(response: "httpx2.Response", data: bytes, url: str) -> Any:
    status, said = response.status_code, data[:300].decode(errors="replace")
    if status >= 500 or status in _AGAIN:
        raise _MayPass(f"HTTP {status}: {said}", _wished_pause(response))
    if status in _REFUSED:
        raise EarlError(
            f"{url}: HTTP {status}: {said}; check reward_function_api_base, reward_function_api_model_name and the "
            f"environment variable {server.KEY}"
        )
    if status != 200:
        raise _Fails(f"HTTP {status}: {said}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _MayPass(f"the response is not JSON: {said[:100]!r}") from error


def _wished_pause(response: "httpx2.Response") -> float | None:
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 3600 else None


def _reply(answer: Any, question: Question) -> Reply:
    """Read a response; one of another form is as broken as a cut one."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        passes = [_pass(choice, question.logprobs) for choice in choices]
        usage = answer.get("usage") or {}
        tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _MayPass(f"the response has no answers: {error!r}") from error
    if len(passes) != question.passes:
        raise _MayPass(f"the response has {len(passes)} answers, not {question.passes}")
    return Reply(passes, _count(tokens_in), _count(tokens_out))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def _pass(choice: dict[str, Any], logprobs: bool) -> Pass:
    text = choice["message"].get("content")
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    tokens = None
    listed = (choice.get("logprobs") or {}).get("content")
    if logprobs and listed is not None:
        tokens = [
            Token(entry["token"], [(top["token"], float(top["logprob"])) for top in entry["top_logprobs"]])
            for entry in listed
        ]
    return Pass(text, str(choice["finish_reason"]), tokens)
