"""A chat model behind any OpenAI-compatible server.

What a network does is met here: the server may not be up yet, have no time, answer late, cut off or something else.
What may pass is tried again, for a bounded time; what does not pass becomes a reply with an error. Sizes and times are
bounded, so that no server can make a run hang or fill its memory.

    earl.config.address    where the server is
    earl.judges.transport  one request, and how it may fail
    earl.judges.pace       how many requests at once, and when none
    earl.judges.dialect    how a request is put to this server
    earl.judges.model_list    which models it has
    earl.judges.responses  what its answers mean
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from earl.config import address
from earl.judges import dialect, model_list, responses, transport
from earl.judges.chat import Pass, Question, Reply
from earl.judges.dialect import Dialect
from earl.judges.pace import Pace
from earl.judges.transport import Busy, Failure, Faulty, Refused, Slow, Unreachable
from earl.messages.errors import EarlError
from earl.messages.redaction import redacted

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

_TRIES = 3
"""Times that a list of models is asked for before it is seen whether questions are answered without."""
_SMALLEST = Question([{"role": "user", "content": "1"}], seed=0, max_tokens=1)

_known: dict[tuple[str, str], Dialect] = {}
"""What this process has found out, by address and model."""


@dataclass
class _Patience:
    """How long one question has been tried."""

    index: int
    tries: int = 0
    seconds: float = 0.0
    """Of all its tries."""
    spent: float = 0.0
    """Seconds of its own tries that failed, and of the pauses after them; not those in which it waited its turn."""
    turned_away: float | None = None
    """When the server first had no time for it, since it last had."""


@dataclass
class OpenAIModel:
    """Asks a server, up to ``concurrency`` questions at a time, fewer where it bears no more."""

    api_base: str
    """URL, or a file that holds it: see `earl.config.address`."""
    model: str
    concurrency: int = 64
    timeout: float = 120.0
    """Seconds that one try may take from connecting to the last byte."""
    startup: float = 1800.0
    """Seconds to wait for the server to come up."""
    patience: float = 300.0
    """Seconds that a question is tried for before it is given up, and a server that has time for none."""
    pause: tuple[float, float] = (0.5, 30.0)
    """Seconds of the first pause between tries, and of the longest, where the server names none."""
    _url: str = field(default="", init=False)
    _found_at: float = field(default=0.0, init=False)
    _has_answered: bool = field(default=False, init=False)
    _has_logprobs: bool = field(default=False, init=False)

    def ask(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        """See `earl.judges.chat.ChatModel`.

        Raises:
            EarlError: the server does not come up in time, goes away for longer than that, or has no time for any
                question for as long as `patience`; it has no such model; it refuses the key; it gives no
                log-probabilities where they are wanted.
        """
        asyncio.run(self._ask_all(questions, take))

    async def _ask_all(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        self._pace, self._changing = Pace(self.concurrency, self.pause), asyncio.Lock()
        async with transport.client(self.concurrency) as client:
            await self._find(client)

            async def work(index: int, question: Question) -> None:
                take(index, await self._ask(client, index, question))

            try:
                async with asyncio.TaskGroup() as group:
                    for index, question in enumerate(questions):
                        group.create_task(work(index, question))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _ask(self, client: "httpx2.AsyncClient", index: int, question: Question) -> Reply:
        patience, passes = _Patience(index), list[Pass]()
        tokens_in = tokens_out = None
        try:
            while len(passes) < question.passes:
                answer, found = await self._post(client, question, len(passes), patience)
                passes += found
                used_in, used_out = responses.usage(answer)
                tokens_in, tokens_out = _sum(tokens_in, used_in), _sum(tokens_out, used_out)
        except Failure as error:
            return Reply(seconds=patience.seconds, error=str(error))
        return Reply(passes, tokens_in, tokens_out, patience.seconds)

    async def _post(
        self, client: "httpx2.AsyncClient", question: Question, done: int, patience: _Patience
    ) -> tuple[Any, list[Pass]]:
        """Ask for the answers that are missing until some come; return the response and those.

        Raises:
            Failure: the question is given up; the message says why.
        """
        while True:
            async with self._pace.turn(patience.tries, patience.index):
                started = _now()
                try:
                    answer, found = await self._speak(client, question, done)
                except (Busy, Faulty) as error:
                    failure: Failure = error
                    if isinstance(error, Busy):
                        self._pace.overloaded(started, self._bounded(error.wish))
                    elif isinstance(error, Slow):
                        self._pace.lower(started)
                except Refused:
                    self._pace.answered()
                    raise
                else:
                    self._pace.answered()
                    self._has_answered = True
                    return answer, found
                finally:
                    tried = _now() - started
                    patience.seconds += tried
            await self._bear(client, failure, started, tried, patience)

    async def _bear(
        self, client: "httpx2.AsyncClient", failure: Failure, started: float, tried: float, patience: _Patience
    ) -> None:
        """Wait until a question may be tried again.

        Raises:
            Failure: it has been tried for long enough.
            EarlError: the server has no time for anyone, or is gone.
        """
        patience.tries += 1
        if isinstance(failure, Busy):
            await self._check_time(client, failure, patience)
            return
        patience.turned_away = None
        if not isinstance(failure, Slow | Unreachable):
            self._pace.served = _now()
        first, longest = self.pause
        backoff = random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(patience.tries, 30))
        pause = max(self._bounded(failure.wish) or 0.0, backoff)
        patience.spent += tried + pause
        # A server that is slow because of all that it is asked at once is not slow any more when that is little.
        least = 2 + (int(math.log2(self.concurrency)) if isinstance(failure, Slow) else 0)
        if patience.tries >= least and patience.spent >= self.patience:
            raise Failure(f"after {patience.tries} tries in {patience.spent:.3g} s (judge_retry_seconds): {failure}")
        await asyncio.sleep(pause)
        if isinstance(failure, Unreachable):
            # One lost question, or no server any more? The second ends the stage: what was answered is kept.
            await self._find(client, since=started)

    def _bounded(self, wish: float | None) -> float | None:
        return None if wish is None else min(wish, self.patience)

    async def _check_time(self, client: "httpx2.AsyncClient", failure: Failure, patience: _Patience) -> None:
        """Give up where the server has had no time for this question, nor for any other, for too long.

        Whether it is the server or this question is asked, with the smallest question there is.
        """
        most = max(self.patience, self.timeout)
        if patience.turned_away is None:
            patience.turned_away = _now()
        if (idle := _now() - self._pace.served) < most:
            return
        try:
            await self._request(client, self._dialect, _SMALLEST, 0)
        except (Busy, Slow, Unreachable) as error:
            raise EarlError(
                f"{self._url}: the server has had no time for {idle:.0f} s (judge_retry_seconds): {error}; what it "
                "answered before is kept: start again when it has time, or raise judge_retry_seconds"
            ) from error
        except Failure:
            pass  # not the words that were hoped for, but words
        if _now() - patience.turned_away >= most:
            raise Failure(f"after {patience.tries} tries: no time for it, only for others: {failure}")

    async def _speak(self, client: "httpx2.AsyncClient", question: Question, done: int) -> tuple[Any, list[Pass]]:
        """Ask once, in the form that this server takes: found out where it refuses one."""
        spoken = self._dialect
        try:
            return await self._request(client, spoken, question, done)
        except Refused as refusal:
            first = refusal
        if first.status not in transport.FORM:
            raise self._final(first, question) from first
        async with self._changing:
            if spoken != self._dialect:  # another question has found it out in the meantime
                spoken = self._dialect
                try:
                    return await self._request(client, spoken, question, done)
                except Refused as refusal:
                    first = refusal
            return await self._change(client, spoken, first, question, done)

    async def _change(
        self, client: "httpx2.AsyncClient", spoken: Dialect, first: Refused, question: Question, done: int
    ) -> tuple[Any, list[Pass]]:
        """Leave out what a refusal names until the request is taken. What helped is kept; if nothing does, raise."""
        refusal, tried = first, dict[str, Refused]()
        while not (question.logprobs and dialect.refuses_logprobs(refusal.said)):
            body = spoken.body(question, self.model, question.passes - done, 0)
            change = next((one for one in spoken.changes(refusal.said, body) if one not in tried), None)
            if change is None:
                refusal = first
                break
            tried[change] = refusal
            before, spoken = spoken, replace(spoken, without=spoken.without | {change})
            try:
                found = await self._request(client, spoken, question, done)
            except Refused as again:
                if again.said == refusal.said:
                    spoken = before
                refusal = again
                continue
            self._learn(spoken, tried)
            return found
        raise self._final(refusal, question) from refusal

    def _learn(self, spoken: Dialect, refusals: Mapping[str, Failure] = MappingProxyType({})) -> None:
        """Keep what a server does not take, and say once what that means and in which words it was refused."""
        known = self._dialect
        for name in sorted(spoken.without - known.without):
            because = f" ({str(refusals[name])[:200]})" if name in refusals else ""
            log.warning("judge: %s does not take %s: %s%s", self._url, name, dialect.MEANING[name], because)
        _known[self._url, self.model] = replace(known, without=known.without | spoken.without)

    def _final(self, refusal: Refused, question: Question) -> Exception:
        """Return what a refusal comes to: the end of the stage where every question would meet it."""
        if question.logprobs and dialect.refuses_logprobs(refusal.said):
            return self._no_logprobs(str(refusal))
        # Some refuse with 403 what they do not want to talk about.
        if refusal.status in transport.EVERYONE and not (refusal.status == 403 and self._has_answered):
            return transport.everyone(f"{self._url}/chat/completions", refusal)
        return Refused(str(refusal)[:400], refusal.status)

    def _no_logprobs(self, said: str) -> EarlError:
        return EarlError(
            f"{self._url}: gives no log-probabilities, which judge_readout 'expected' reads ({said[:300]}); set "
            "judge_readout to 'sampled', or ask another server"
        )

    async def _request(
        self, client: "httpx2.AsyncClient", spoken: Dialect, question: Question, done: int
    ) -> tuple[Any, list[Pass]]:
        """Send one request and read its answers: all that are missing, or the next one."""
        wanted = 1 if dialect.ONE in spoken.without else question.passes - done
        seed = dialect.pass_seed(question, done)
        body = spoken.body(question, self.model, wanted, seed)
        try:
            answer = await transport.fetch(client, "POST", f"{self._url}/chat/completions", self.timeout, body)
            found = responses.passes(answer, question, wanted)
        except (Busy, Faulty) as error:
            if (error.status or 0) < 500 or not dialect.refuses_form(error.said, body):
                raise
            # A refusal that came as a fault of the server. The status is that of a refusal, not to be tried again.
            raise Refused(str(error), 501, said=error.said) from error
        if len(found) < wanted:
            self._learn(replace(spoken, without=spoken.without | {dialect.ONE}))
        if question.logprobs and not self._has_logprobs:
            self._has_logprobs = any(one.tokens for one in found)
            if not self._has_logprobs and any(one.text for one in found):
                raise self._no_logprobs("its answers have none")
        return answer, found

    @property
    def _dialect(self) -> Dialect:
        return _known.get((self._url, self.model), Dialect())

    async def _find(self, client: "httpx2.AsyncClient", since: float = float("inf")) -> None:
        """Wait for the server and see that it has the model; only once for all who lost it at the same time."""
        async with self._changing:
            if self._found_at < since:
                await self._wait(client)
                self._found_at = _now()

    async def _wait(self, client: "httpx2.AsyncClient") -> None:
        deadline, tries = _now() + self.startup, 0
        while True:
            url, models = "", None
            try:
                url = self._resolved()
                models = await transport.fetch(client, "GET", f"{url}/models", self.timeout)
                break
            except (Busy, Faulty) as error:
                tries += 1
                if tries == 1:
                    await model_list.check_kind(url, error)
                    waited = f"up to {self.startup:g} s (judge_startup_seconds)"
                    log.info("judge: waiting %s for the server at %s: %s", waited, redacted(self.api_base), error)
                is_due = tries >= _TRIES or _now() > deadline
                if url and is_due and not isinstance(error, Unreachable):
                    self._url = url
                    if await self._is_answering(client):
                        self._unlisted(error)
                        break
                if _now() > deadline:
                    raise EarlError(
                        f"reward_function_api_base {self.api_base}: no judge server within {self.startup:g} s "
                        f"(judge_startup_seconds): {error}. Start one with `earl judge serve`"
                    ) from error
                await asyncio.sleep(max(min(error.wish or 0.0, deadline - _now()), min(1.0, self.pause[0])))
            except Refused as refusal:
                if refusal.status in transport.ACCOUNT:
                    raise transport.everyone(f"{url}/models", refusal) from refusal
                self._url = url
                self._unlisted(refusal)
                break
        self._url = url
        if models is None:
            return
        _known[url, self.model] = replace(self._dialect, is_vllm=model_list.is_vllm(models))
        if not model_list.has(models, self.model):
            await self._check_answers(client, model_list.shown(models))

    def _unlisted(self, why: Failure) -> None:
        # Some servers do not say what they have; the first question tells.
        log.info("judge: %s lists no models (%.100s); that it has %s is not checked", self._url, why, self.model)

    def _resolved(self) -> str:
        url = address.resolve(self.api_base)
        if url is None:
            raise Faulty(f"the file {Path(self.api_base).absolute()} is not there yet")
        return url

    async def _check_answers(self, client: "httpx2.AsyncClient", has: str) -> None:
        """Ask the smallest question of a server that does not list the model: it may have it by another name.

        Raises:
            EarlError: the server refuses the model, or the key.
        """
        try:
            try:
                answer, _ = await self._request(client, self._dialect, _SMALLEST, 0)
            except Refused as refusal:
                if refusal.status not in transport.FORM:
                    raise
                answer, _ = await self._change(client, self._dialect, refusal, _SMALLEST, 0)
            if not answer.get("choices"):
                raise Refused(responses.shown(answer))
        except Refused as refusal:
            if refusal.status in transport.ACCOUNT:
                raise transport.everyone(f"{self._url}/chat/completions", refusal) from refusal
            raise EarlError(
                f"{self._url}: serves {has}, not reward_function_api_model_name {self.model!r} "
                f"({str(refusal)[:300]}); ask another server, or correct the name"
            ) from refusal
        except (Busy, Faulty) as error:
            log.warning("judge: %s does not list %s but %s; it cannot say more: %s", self._url, self.model, has, error)
        else:
            log.warning(
                "judge: %s does not list %s but %s; it answers by that name all the same, as model %.100r",
                *(self._url, self.model, has, answer.get("model")),
            )

    async def _is_answering(self, client: "httpx2.AsyncClient") -> bool:
        """Return whether a server deals with questions, whatever it says to the smallest."""
        try:
            await self._request(client, self._dialect, _SMALLEST, 0)
        except (Busy, Faulty):
            return False
        except Refused:
            pass
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()


def _sum(before: int | None, more: int | None) -> int | None:
    return more if before is None else before if more is None else before + more
