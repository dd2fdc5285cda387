"""A server on the loopback interface, on a thread of the tests' process: what stand-ins for others' servers share."""

import gzip
import json
import sys
import threading
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote


@dataclass(frozen=True)
class Asked:
    """A request. The path is decoded and has no query; the body is decompressed."""

    method: str
    path: str
    headers: Message
    body: bytes


@dataclass(frozen=True)
class Answer:
    """A response. The content is bytes, or something that is sent as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the content after which the connection breaks off."""


class LoopbackServer:
    """``with Server() as server: ...``; a subclass says what it answers, and ``url`` is where it listens."""

    url = ""

    def respond(self, asked: Asked) -> Answer:
        raise NotImplementedError

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"respond": staticmethod(self.respond)})
        self._http = _Server(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *address: object) -> None:
        # A client that was killed has cut its connections; that is part of the tests.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = self.respond(Asked(self.command, unquote(self.path.partition("?")[0]), self.headers, body))
        is_json = not isinstance(answer.content, bytes)
        data = json.dumps(answer.content).encode() if is_json else answer.content
        headers = ({"Content-Type": "application/json"} if is_json else {}) | answer.headers
        self.send_response(answer.status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: answer.cut_after])
            self.wfile.flush()
        if answer.cut_after is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *_: object) -> None:
        pass
