"""The judge's client and a server that has no time: nothing is lost, nothing is asked too often, and it ends."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from earl.judges.chat import Question, Reply
from earl.judges.openai_model import OpenAIModel
from earl.messages.errors import EarlError
from tests.support import virtual_time
from tests.support.faulty_server import MODEL, answered, scripted, serving


def question(index: int) -> Question:
    return Question([{"role": "user", "content": f"question {index}"}], seed=index)


def index_of(body: dict) -> int:
    """Which question it is; -1 for the one by which the client finds out whether the server has time for any."""
    words = body["messages"][0]["content"].split()
    return int(words[1]) if len(words) > 1 else -1


class Limited:
    """A server that answers ``rate`` questions a second and turns the others away."""

    def __init__(self, rate: float, status: int, retry_after: Callable[[float], str] | None, clock) -> None:
        self.rate, self.status, self.retry_after, self.clock = rate, status, retry_after, clock
        self.free_at, self.asked, self.answered = 0.0, 0, 0

    def __call__(self, body: dict) -> tuple[int, str, dict[str, str]]:
        now = self.clock()
        self.asked += 1
        if now < self.free_at:
            headers = {"Retry-After": self.retry_after(self.free_at - now)} if self.retry_after else {}
            return self.status, '{"error": {"message": "slow down"}}', headers
        self.free_at = now + 1 / self.rate
        self.answered += 1
        return 200, answered(f"answer {index_of(body)}"), {}


def test_all_sixty_are_answered_by_a_server_that_turns_most_away():
    """Over real sockets, a hundred times as quick as the server it stands for."""
    limited = Limited(200, 429, lambda wait: f"{wait:.3f}", time.monotonic)

    def respond(asked):
        status, text, headers = limited(asked.body)
        return status, text, "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    replies: dict[int, Reply] = {}
    with serving(scripted(respond)) as url:
        model = OpenAIModel(url, MODEL, concurrency=64, timeout=20.0, startup=20.0, pause=(0.005, 0.05))
        model.ask([question(index) for index in range(60)], replies.__setitem__)
    assert {index: reply.error for index, reply in replies.items() if reply.error} == {}
    assert [replies[index].passes[0].text for index in range(60)] == [f"answer {index}" for index in range(60)]


async def streamed(text: str):
    yield text.encode()


def ask_virtually(monkeypatch, respond, count: int, **options) -> tuple[dict[int, Reply], float]:
    """Ask a server that is a function, in virtual time; return the replies and the seconds that it took."""
    from earl.judges import transport

    async def handle(request):
        if request.url.path.endswith("/models"):
            return httpx2.Response(200, content=streamed(json.dumps({"data": [{"id": MODEL}]})))
        answer = respond(json.loads(request.content))
        status, text, headers = await answer if asyncio.iscoroutine(answer) else answer
        return httpx2.Response(status, content=streamed(text), headers=headers)

    def client(connections):
        return httpx2.AsyncClient(transport=httpx2.MockTransport(handle), timeout=None)

    monkeypatch.setattr(transport, "client", client)
    replies: dict[int, Reply] = {}

    def take(index, reply):
        assert index not in replies, "one reply each"
        replies[index] = reply

    async def main():
        model = OpenAIModel("http://judge:1", MODEL, **options)
        await model._ask_all([question(index) for index in range(count)], take)
        return asyncio.get_running_loop().time()

    return replies, virtual_time.run(main())


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date", "none"])
@pytest.mark.parametrize("count", [60, 600])
def test_two_answers_a_second_are_waited_for(monkeypatch, status, form, count):
    def after(wait: float) -> str:
        if form == "seconds":
            return str(-int(-wait // 1))
        return format_datetime(datetime.now(UTC) + timedelta(seconds=wait + 1), usegmt=True)

    limited = Limited(2, status, None if form == "none" else after, now)
    replies, seconds = ask_virtually(monkeypatch, limited, count)
    assert {index: reply.error for index, reply in replies.items() if reply.error} == {}
    assert len(replies) == count, "whatever the number of those that wait"
    assert limited.asked < 5 * count + 300, "and the server is not stormed"
    assert seconds < 8 * count


def test_a_server_that_never_has_time_ends_the_stage_after_the_budget(monkeypatch):
    limited = Limited(1e-9, 429, None, now)
    limited.free_at = 1e9
    with pytest.raises(EarlError, match=r"has had no time for 3\d\d s \(judge_retry_seconds\): HTTP 429.*slow down"):
        ask_virtually(monkeypatch, limited, 60)
    assert limited.asked < 300


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 200])
def test_questions_that_are_always_turned_away_fail_alone(monkeypatch, concurrency, count):
    """Whether others are left or not: they may be all that a stage that was started again has to ask."""
    tries, bad = Counter(), {0, 2} & set(range(count))

    def respond(body):
        tries[index_of(body)] += 1
        if index_of(body) in bad:
            return 429, "too many tokens in this one", {"Retry-After": "0"}
        return 200, answered("fine"), {}

    replies, _ = ask_virtually(monkeypatch, respond, count, concurrency=concurrency)
    assert {index for index, reply in replies.items() if reply.error} == bad
    assert "too many tokens in this one" in replies[0].error
    assert {tries[index] for index in range(count) if index not in bad} <= {1}
    assert "only for others" in replies[0].error
    assert tries[0] < 40, "a pause of 0 that does not help is doubled, too"


@pytest.mark.parametrize("status", [500, 408])
@pytest.mark.parametrize("count", [1, 300])
def test_what_fails_for_good_fails_after_as_long_however_many_wait(monkeypatch, status, count):
    failures = []

    async def respond(body):
        await asyncio.sleep(1.0)
        if index_of(body) == 0:
            failures.append(now())
            return status, "no", {}
        return 200, answered("fine"), {}

    replies, _ = ask_virtually(monkeypatch, respond, count, concurrency=2)
    assert [index for index, reply in replies.items() if reply.error] == [0]
    assert 10 < len(failures) < 40
    assert replies[0].seconds == pytest.approx(len(failures)), "its own tries, not its turns and pauses"
    assert {reply.seconds for index, reply in replies.items() if index} <= {1.0}
    if count > 1:
        assert failures[-1] > 150, "the others had their turns in between"


def test_an_outage_of_two_minutes_is_outlasted(monkeypatch):
    def respond(body):
        return (502, "bad gateway", {}) if now() < 120 else (200, answered("fine"), {})

    replies, seconds = ask_virtually(monkeypatch, respond, 60)
    assert [reply.error for reply in replies.values()] == [None] * 60
    assert seconds < 200


def test_fewer_at_once_where_time_runs_out_and_more_again_afterwards(monkeypatch):
    """The server answers one question in 10 s, all that wait at once; more than 12 at a time are too slow."""
    under_way, most = 0, []

    async def respond(body):
        nonlocal under_way
        under_way += 1
        most.append((now(), under_way))
        try:
            await asyncio.sleep(10.0 * under_way if now() < 2000 else 1.0)
        finally:
            under_way -= 1
        return 200, answered("fine"), {}

    replies, _ = ask_virtually(monkeypatch, respond, 2000, timeout=120.0)
    assert [reply.error for reply in replies.values()] == [None] * 2000
    assert max(count for moment, count in most if moment < 100) == 64
    assert max(count for moment, count in most if 1000 < moment < 2000) < 24
    assert max(count for moment, count in most if moment > 2000) > 32


def test_a_wish_of_a_day_is_not_waited_for(monkeypatch):
    def respond(body):
        return 429, "come back tomorrow", {"Retry-After": "86400"}

    with pytest.raises(EarlError, match="come back tomorrow"):
        ask_virtually(monkeypatch, respond, 5)


@pytest.mark.parametrize("wish", ["nan", "inf", "-5", "soon", "", "Wed, 99 Foo 2026 00:00:00 GMT"])
def test_a_wish_that_is_none_is_no_fault(monkeypatch, wish):
    turned_away = Counter()

    def respond(body):
        turned_away[index_of(body)] += 1
        return (429, "wait", {"Retry-After": wish}) if turned_away[index_of(body)] == 1 else (200, answered("x"), {})

    replies, seconds = ask_virtually(monkeypatch, respond, 5)
    assert [reply.error for reply in replies.values()] == [None] * 5
    assert seconds < 60
