"""A stand-in for the Hugging Face hub's data sets: enough of its API to look files up and to download them.

Large files have a SHA-256 (Git LFS), small ones Git's own checksum. It can break a download off, give other bytes than
it says, or ask for a login. It runs in the process of the tests; ``HF_ENDPOINT`` points a client at it.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = (".tar.gz", ".tar", ".parquet", ".arrow")


@dataclass
class DataHub:
    """``with DataHub() as hub: hub.files["owner/name"] = {"a.parquet": b"..."}``."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    licence: str | None = None
    calls: list[str] = field(default_factory=list)
    """Method, path and range of each call."""
    break_after: int | None = None
    """Bytes after which the next download of a large file ends."""
    wrong: str = ""
    """Name of a file that comes with another byte at its end."""
    gated: bool = False

    def __enter__(self) -> "DataHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def downloads(self) -> list[str]:
        """Return the files that were downloaded, with the range that was asked for."""
        return [call.split("/resolve/")[1].split("/", 1)[1] for call in self.calls if call.startswith("GET /datasets/")]

    def commit(self, name: str) -> str:
        """Return the repository's newest commit, which changes with its files."""
        return git_sha1(repr(sorted((path, git_sha1(content)) for path, content in self.files[name].items())).encode())

    def info(self, name: str) -> dict[str, Any]:
        siblings = []
        for path, content in self.files[name].items():
            found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if path.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                found["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(found)
        card = {"cardData": {"license": self.licence}} if self.licence else {}
        return {"id": name, "sha": self.commit(name), "private": False, "tags": [], "siblings": siblings, **card}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: DataHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.calls.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(?:revision|resolve|tree)/([^/]+)(?:/(.+))?)?", path)
        if found is None or found[1] not in hub.files:
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif hub.gated and found[3]:
            self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}")
        elif not found[3]:
            told = hub.info(found[1])
            if "/tree/" in path:
                names = {"rfilename": "path", "blobId": "oid"}
                files = [{names.get(key, key): value for key, value in one.items()} for one in told["siblings"]]
                told = [{"type": "file", **one} for one in files]
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(told).encode())
        elif found[3] not in hub.files[found[1]]:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        else:
            self._file(found[1], found[3], hub.files[found[1]][found[3]])

    def _file(self, repository: str, name: str, content: bytes) -> None:
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_sha1(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(repository), "Accept-Ranges": "bytes"}
        if name == self.hub.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        body = content[start:]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.hub.break_after is not None and name.endswith(LARGE):
            kept, self.hub.break_after = self.hub.break_after, None
            self._answer(206 if asked else 200, headers, body, kept)
            self.close_connection = True
        else:
            self._answer(206 if asked else 200, headers, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, kept: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:kept])
            self.wfile.flush()

    do_GET = do_HEAD = _handle

    def log_message(self, *_: object) -> None:
        pass
