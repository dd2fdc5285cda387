"""A stand-in for a Weights & Biases server: enough of what its client asks to keep pages of runs, and to take them up
again.

A page is what the real one would show: one line of history a step, files by name, and the summary. It runs in the
process of the tests; ``WANDB_BASE_URL`` points a client at it.
"""

import gzip
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Page:
    """One run as the server knows it; ``history`` is a list of lines, in the order of the server's own offsets."""

    project: str
    name: str = ""
    config: str = "{}"
    summary: str = "{}"
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history]


@dataclass
class Artifact:
    """Files that stand or fall together: for a table, its rows and its pictures. Known by the digest of all."""

    id: str
    name: str
    digest: str
    files: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False


class WandbServer:
    """``with WandbServer() as server: ...``; its pages by the id of their run."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.artifacts: list[Artifact] = []
        self.queries: list[str] = []
        self.down = False
        handler = type("Handler", (_Handler,), {"backend": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL request, by the name of its operation."""
        name = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
        self.queries.append(name.group(1) if name else query)
        return _ANSWERS.get(self.queries[-1], lambda *_: {})(self, variables | variables.get("input", {}))

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        page = self.pages.get(variables["name"])
        if page is None:
            return {"model": None}
        bucket = {
            "id": "1",
            "name": variables["name"],
            "summaryMetrics": page.summary,
            "displayName": page.name,
            "logLineCount": 0,
            "historyLineCount": len(page.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in page.history[-1:]]),
            "eventsTail": "[]",
            "config": page.config,
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "1", "name": page.project, "entity": {"id": "1", "name": "tester"}, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        page = self.pages.setdefault(variables["name"], Page(variables["project"]))
        page.name = variables.get("displayName") or page.name
        page.config = variables.get("config") or page.config
        project = {"name": page.project, "entity": {"name": "tester"}}
        bucket = {
            "id": "1",
            "name": variables["name"],
            "displayName": page.name,
            "description": "",
            "config": page.config,
            "project": project,
            "sweepName": None,
            "historyLineCount": len(page.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _upload_urls(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = [known for known in self.artifacts if known.digest == variables["digest"]]
        if not found:
            found = [Artifact(str(len(self.artifacts)), variables["artifactCollectionName"], variables["digest"])]
            self.artifacts += found
        state = "COMMITTED" if found[0].complete else "PENDING"
        sequence = {"id": "1", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": found[0].id, "state": state, "artifactSequence": sequence}}}

    def _manifest(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables.get("artifactID") or variables["artifactManifestID"]
        file = {"id": "1", "uploadUrl": f"{self.url}/artifact/{artifact}/manifest", "uploadHeaders": []}
        return {operation: {"artifactManifest": {"id": artifact, "file": file}}}

    def _artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": spec["name"],
                "uploadUrl": f"{self.url}/artifact/{spec['artifactID']}/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in variables["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(variables["artifactID"])]
        artifact.complete = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Take a piece of a run's streams: lines replace what stands at their offsets."""
        page = self.pages[run]
        for name, piece in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                lines = [json.loads(line) for line in piece["content"]]
                page.history[piece["offset"] : piece["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                page.summary = piece["content"][-1]


_ANSWERS = {
    "Viewer": WandbServer._viewer,
    "RunResumeStatus": WandbServer._resume_status,
    "UpsertBucket": WandbServer._upsert,
    "CreateRunFiles": WandbServer._upload_urls,
    "CreateArtifact": WandbServer._create_artifact,
    "CreateArtifactManifest": lambda server, variables: server._manifest("createArtifactManifest", variables),
    "UpdateArtifactManifest": lambda server, variables: server._manifest("updateArtifactManifest", variables),
    "CreateArtifactFiles": WandbServer._artifact_files,
    "CommitArtifact": WandbServer._commit_artifact,
    "ArtifactType": lambda server, variables: {"project": None},
}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *address: object) -> None:
        # A client that was killed has cut its connections; that is part of the tests.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*address)


class _Handler(BaseHTTPRequestHandler):
    backend: WandbServer
    protocol_version = "HTTP/1.1"

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if self.backend.down:
            self._reply({"error": "down"}, 503)
        elif self.path.endswith("/graphql"):
            self._reply({"data": self.backend.answer(body["query"], body.get("variables") or {})})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.backend.stream(found.group(1), body)
            self._reply({"exitcode": None, "limits": {}})
        else:
            self._reply({}, 404)

    def do_PUT(self) -> None:
        data = self._body()
        _, kind, owner, name = unquote(self.path).split("/", 3)
        holder = self.backend.artifacts[int(owner)] if kind == "artifact" else self.backend.pages[owner]
        holder.files[name] = data
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def log_message(self, *_: object) -> None:
        pass
