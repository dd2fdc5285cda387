"""An OpenAI-compatible server that misbehaves as the pictures it is shown say, for the tests of the judge `openai`.

The last image of a question tells everything, in its first pixels: the four sub-scores that are the right answer, the
number of the fault and whether it passes after the first time. So a test knows what must come out of each question.
It runs as a process of its own: ``python tests/faulty_server.py <file that gets the address>``. `serving` and
`scripted` are for tests that say themselves what a server does.
"""

import asyncio
import base64
import inspect
import io
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODEL = "test/judge"
NONE = "none"
FAULTS = (
    NONE,
    "429",
    "500",
    "slow",
    "cut before a response",
    "cut inside a response",
    "truncated JSON",
    "JSON of another form",
    "huge body",
    "HTML",
    "prose",
    "truncated answer",
    "out of range",
    "NaN",
    "a score missing",
    "length",
    "400",
)
WORDS = {"JSON of another form", "prose", "truncated answer", "out of range", "NaN", "a score missing", "length"}
"""Faults of the answer itself: the judge asks again, with another seed."""
FIELDS = ("edit_success", "overedit", "naturalness", "artifacts")
SLOW = 20.0
"""Seconds that a slow response takes; more than the client's patience."""


def picture(index: int, scores: tuple[int, int, int, int], fault: str, passes_by: bool) -> np.ndarray:
    """A picture, uint8 [8, 8, 3], that says what the server is to answer."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1, 0] = scores[:3], scores[3]
    pixels[0, 2] = FAULTS.index(fault), passes_by, 0
    pixels[0, 3] = index >> 16, index >> 8 & 255, index & 255
    return pixels


def read(body: dict) -> tuple[dict[str, int], str, bool, bytes]:
    """The right scores, the fault, whether it passes, and what identifies the question."""
    url = next(part for part in reversed(body["messages"][-1]["content"]) if part["type"] == "image_url")
    png = base64.b64decode(url["image_url"]["url"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    values = [*pixels[0, 0], pixels[0, 1, 0]]
    scores = {name: int(value) for name, value in zip(FIELDS, values, strict=True)}
    wanted = body["response_format"]["json_schema"]["schema"]["properties"]
    identity = pixels[0, 3].tobytes() + ",".join(wanted).encode()
    return {k: v for k, v in scores.items() if k in wanted}, FAULTS[pixels[0, 2, 0]], bool(pixels[0, 2, 1]), identity


def answered(text: str, finish_reason: str = "stop") -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 10}})


def answer(scores: dict[str, int], fault: str) -> tuple[str, str]:
    """The text of an answer and its finish_reason."""
    right = json.dumps({"reasoning": "looks fine", **scores})
    last = list(scores)[-1]
    wrong = {
        "prose": "All in all I would say " + " and ".join(f"{value} for {name}" for name, value in scores.items()),
        "truncated answer": right[:-2],
        "out of range": json.dumps(scores | {last: 11}),
        "NaN": json.dumps(scores | {last: float("nan")}),
        "a score missing": json.dumps({name: value for name, value in scores.items() if name != last}),
    }
    return wrong.get(fault, right), "length" if fault == "length" else "stop"


class Server:
    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(v) for v in head.lower().split(b"content-length: ")[1:2] for v in v.split(b"\r\n")[:1]), 0
            )
            body = await reader.readexactly(length)
            await self.respond(head.split()[1].decode(), body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def respond(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path.endswith("/models"):
            await send(writer, 200, json.dumps({"data": [{"id": MODEL, "owned_by": "the tests"}]}))
            return
        if json.loads(body)["model"] != MODEL:
            await send(writer, 404, json.dumps({"error": {"message": "The model does not exist."}}))
            return
        if b"image_url" not in body:
            await send(writer, 200, answered("1"))
            return
        scores, fault, passes_by, identity = read(json.loads(body))
        self.seen[identity] += 1
        if passes_by and self.seen[identity] > 1:
            fault = NONE
        match fault:
            case "429" | "500" | "400":
                await send(writer, int(fault), "not now", "Retry-After: 0\r\n")
            case "slow":
                await asyncio.sleep(SLOW)
            case "cut before a response":
                writer.transport.abort()
            case "cut inside a response":
                text = answered(*answer(scores, NONE))
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text[: len(text) // 2]}".encode())
                await writer.drain()
            case "truncated JSON":
                await send(writer, 200, answered(*answer(scores, NONE))[:-20])
            case "JSON of another form":
                await send(writer, 200, '{"choices": []}')
            case "huge body":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                while True:
                    writer.write(b" " * 2**20)
                    await writer.drain()
            case "HTML":
                await send(writer, 200, "<html><body>Sign in to go on: edit_success 10</body></html>")
            case _:
                await send(writer, 200, answered(*answer(scores, fault)))


async def send(writer: asyncio.StreamWriter, status: int, text: str | bytes, headers: str = "") -> None:
    data = text if isinstance(text, bytes) else text.encode()
    writer.write(f"HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode())
    writer.write(data)
    await writer.drain()


class serving:
    """A server on a thread of its own: ``with serving(handler) as url``; with TLS where there is a context for it."""

    def __init__(self, handler: Callable, tls: Any = None, host: str = "127.0.0.1") -> None:
        self.handler, self.tls, self.host = handler, tls, host
        self.loop, self.url, self.up = asyncio.new_event_loop(), "", threading.Event()

    def __enter__(self) -> str:
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.run(),), daemon=True)
        self.thread.start()
        self.up.wait()
        return self.url

    def __exit__(self, *error) -> None:
        self.loop.call_soon_threadsafe(self.done.set)
        self.thread.join()

    async def run(self) -> None:
        self.done = asyncio.Event()
        listening = await asyncio.start_server(self.handler, self.host, 0, ssl=self.tls, limit=2**24)
        self.url = f"{'https' if self.tls else 'http'}://{self.host}:{listening.sockets[0].getsockname()[1]}"
        self.up.set()
        await self.done.wait()
        listening.close()


@dataclass
class Asked:
    """One request to a scripted server."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Response = tuple[int, str | bytes, str]
"""Status, content and further header lines."""


def scripted(respond: Callable[[Asked], Any], models: bool = True) -> Callable:
    """A handler that sends the `Response` that ``respond`` returns, or breaks off at None; ``/models`` by itself."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            asked = Asked(head[0].split()[1], headers, json.loads(body) if body else {})
            if models and asked.path.endswith("/models"):
                answer = (200, json.dumps({"data": [{"id": MODEL}]}), "")
            else:
                answer = respond(asked)
                answer = await answer if inspect.isawaitable(answer) else answer
            if answer is None:
                writer.transport.abort()
            else:
                await send(writer, *answer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    return handle


async def main(address: Path) -> None:
    server = await asyncio.start_server(Server().handle, "127.0.0.1", 0, limit=2**24)
    port = server.sockets[0].getsockname()[1]
    partial = address.with_suffix(".partial")
    partial.write_text(f"127.0.0.1:{port}\n")
    partial.rename(address)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
