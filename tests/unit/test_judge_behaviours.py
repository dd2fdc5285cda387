"""The judge's client against a server whose behaviour is drawn: whatever it does, each question gets one reply."""

import asyncio
import gzip
import json
import logging

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earl.judges import openai_model, transport
from earl.judges.chat import Question, Reply
from earl.judges.openai_model import OpenAIModel
from earl.messages.errors import EarlError
from tests.support import virtual_time
from tests.support.faulty_server import MODEL

KEY = "sehr-geheimer-schluessel"
PATIENCE = 60.0

WISHES = st.sampled_from(
    [{}, {}, {"Retry-After": "0"}, {"Retry-After": "3"}, {"Retry-After": "90"}, {"Retry-After": "x"}]
)
STATUSES = st.sampled_from([400, 403, 408, 409, 413, 422, 425, 429, 500, 501, 502, 503, 504, 529])
TEXTS = st.sampled_from(
    [
        "",
        "null",
        "[]",
        "{}",
        "<html>Sign in</html>",
        '{"choices": null}',
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"message": {"content": null, "refusal": "no"}}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": "part"}]}}]}',
        '{"choices": "x"}',
        '{"choices": [7]}',
        '{"error": {"code": 429}}',
        '{"error": "overloaded"}',
        '{"error": {"code": 400, "message": "no, KEY"}}',
        '{"choices": [{"message": {"content": "cut',
        "[" * 5000,
        "KEY is not known",
    ]
)


@st.composite
def behaviours(draw):
    """One thing that a server does: (kind, what)."""
    kind = draw(st.sampled_from(["answer", "answer", "status", "text", "cut", "slow", "packed", "broken", "gone"]))
    what = {
        "status": st.tuples(STATUSES, WISHES, st.sampled_from(["not now", "n must be 1", "seed: unknown", "KEY", ""])),
        "text": TEXTS,
        "slow": st.sampled_from([1.0, 15.0, 45.0]),
    }.get(kind, st.none())
    return kind, draw(what)


class Server:
    """Does one thing after another, then goes on with the last for good."""

    def __init__(self, plan: list) -> None:
        self.plan, self.requests, self.sent = plan, 0, set()

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/models"):
            return response(200, json.dumps({"data": [{"id": MODEL}]}))
        kind, what = self.plan[min(self.requests, len(self.plan) - 1)]
        self.requests += 1
        body = json.loads(request.content)
        items = [
            {"index": index, "message": {"content": f"answer {self.requests}.{index}"}, "finish_reason": "stop"}
            for index in range(body.get("n", 1))
        ]
        text = json.dumps({"choices": items})
        whole = {item["message"]["content"] for item in items}
        match kind:
            case "status":
                return response(what[0], what[2].replace("KEY", KEY), what[1])
            case "text":
                self.sent.add("part")
                return response(200, what.replace("KEY", KEY))
            case "cut":
                return response(200, text[: len(text) // 2])
            case "slow":
                await asyncio.sleep(what)
            case "packed":
                self.sent |= whole
                return response(200, gzip.compress(text.encode()), {"Content-Encoding": "gzip"})
            case "broken":
                raise httpx2.RemoteProtocolError(f"illegal header {KEY}")
            case "gone":
                raise httpx2.ConnectError("refused")
        self.sent |= whole
        return response(200, text)


def response(status: int, text: str | bytes, headers: dict | None = None) -> httpx2.Response:
    async def stream():
        yield text if isinstance(text, bytes) else text.encode()

    return httpx2.Response(status, content=stream(), headers=headers or {})


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "earl")
    return caplog


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(behaviours(), min_size=1, max_size=12),
    passes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    concurrency=st.integers(1, 4),
)
def test_whatever_a_server_does(monkeypatch, log, plan, passes, concurrency):
    monkeypatch.setenv("EARL_JUDGE_API_KEY", KEY)
    openai_model._known.clear()
    log.clear()
    server, replies = Server(plan), dict[int, list[Reply]]()

    def client(connections):
        return httpx2.AsyncClient(transport=httpx2.MockTransport(server), timeout=None)

    monkeypatch.setattr(transport, "client", client)
    questions = [Question([], seed=index, passes=count) for index, count in enumerate(passes)]

    async def main():
        model = OpenAIModel("http://judge:1", MODEL, concurrency, timeout=30.0, startup=60.0, patience=PATIENCE)
        await model._ask_all(questions, lambda index, reply: replies.setdefault(index, []).append(reply))
        return asyncio.get_running_loop().time()

    said = ""
    try:
        virtual_time.run(main())
        assert sorted(replies) == list(range(len(questions))), "each question has a reply"
    except EarlError as error:
        said = str(error)
    assert all(len(found) == 1 for found in replies.values()), "and only one"
    for index, (reply,) in replies.items():
        assert (reply.error is None) == (len(reply.passes) == passes[index])
        assert reply.error is None or not reply.passes
        for one in reply.passes:
            assert one.text in server.sent or (one.text == "" and one.refusal), "no text that the server did not send"
    assert KEY not in f"{said} {replies} {log.text}"
    assert server.requests <= 60 * sum(passes), "tries are bounded"
