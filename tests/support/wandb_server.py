"""A stand-in for a Weights & Biases server: enough of what its client asks to keep pages of runs, and to take them up
again.

A page is what the real one would show: one line of history a step, files by name, and the summary. It runs in the
process of the tests; ``WANDB_BASE_URL`` points a client at it.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.support.loopback import Answer, Asked, LoopbackServer


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


class WandbServer(LoopbackServer):
    """``with WandbServer() as server: ...``; its pages by the id of their run."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.artifacts: list[Artifact] = []
        self.queries: list[str] = []
        self.down = False

    def respond(self, asked: Asked) -> Answer:
        if asked.method == "PUT":
            self._store(asked.path, asked.body)
        elif asked.method == "POST":
            return self._post(asked.path, json.loads(asked.body or b"{}"))
        return Answer({})

    def _store(self, path: str, data: bytes) -> None:
        """Take a file of a page or of an artifact."""
        _, kind, owner, name = path.split("/", 3)
        holder = self.artifacts[int(owner)] if kind == "artifact" else self.pages[owner]
        holder.files[name] = data

    def _post(self, path: str, body: dict[str, Any]) -> Answer:
        if self.down:
            return Answer({"error": "down"}, 503)
        if path.endswith("/graphql"):
            return Answer({"data": self.answer(body["query"], body.get("variables") or {})})
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.stream(found[1], body)
            return Answer({"exitcode": None, "limits": {}})
        return Answer({}, 404)

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
