"""A stand-in for the Hugging Face hub: enough of its API to make a repository, commit files to it and tag commits.

Files come as the real one takes them: small ones inside the commit, ``*.safetensors`` by Git LFS before it. It runs in
the process of the tests; ``HF_ENDPOINT`` points a client at it.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.support.loopback import Answer, Asked, LoopbackServer

OWNER = "tester"


@dataclass
class Commit:
    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, bytes]) -> Commit:
        self.commits.append(Commit(hashlib.sha1(f"{len(self.commits)}{title}".encode()).hexdigest(), title, files))
        return self.commits[-1]

    def at(self, tag: str) -> dict[str, bytes]:
        """Return the files of a tagged commit."""
        return next(commit.files for commit in self.commits if commit.id == self.tags[tag])


class HubServer(LoopbackServer):
    """``with HubServer() as server: ...``; its repositories by name. ``fail_at`` breaks off the next call whose path
    holds this text: before it is carried out, or after (``fail_after``)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail_at = ""
        self.fail_after = False

    def respond(self, asked: Asked) -> Answer:
        self.calls.append(f"{asked.method} {asked.path}")
        fails = bool(self.fail_at) and self.fail_at in asked.path
        if not fails or self.fail_after:
            status, content = self.route(asked.method, asked.path, asked.body)
        if fails:
            self.fail_at = ""
            status, content = 400, {"error": "told to fail"}
        return Answer(content, status)

    def create(self, body: bytes) -> tuple[int, Any]:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, url | {"error": "exists"}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private))
        self.repositories[name].commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs"})
        return 200, url

    def upload_modes(self, body: bytes) -> tuple[int, Any]:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [("lfs" if name.endswith(".safetensors") else "regular") for name in names]
        files = [
            {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(names, modes, strict=True)
        ]
        return 200, {"files": files}

    def large_files(self, body: bytes) -> tuple[int, Any]:
        """Say where to put large files: nowhere for one whose content is there."""
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.large:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[name]
        head, *operations = [json.loads(line) for line in body.splitlines()]
        if head["value"].get("parentCommit") not in (None, repository.commits[-1].id):
            return 412, {"error": "the branch has moved on"}
        files = dict(repository.commits[-1].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                del files[value["path"]]
        made = repository.commit(head["value"]["summary"], files)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{made.id}", "commitOid": made.id}

    def tag(self, name: str, revision: str, body: bytes) -> tuple[int, Any]:
        self.repositories[name].tags[json.loads(body)["tag"]] = revision
        return 200, {}

    def look(self, name: str, what: str) -> tuple[int, Any]:
        repository = self.repositories[name]
        newest = repository.commits[-1]
        if what.startswith("refs"):
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": c} for tag, c in repository.tags.items()]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": newest.id}
            return 200, {"branches": [main], "converts": [], "tags": tags}
        if what.startswith("commits"):
            date = "2026-01-01T00:00:00.000Z"
            shown = [
                {"id": commit.id, "title": commit.title, "message": "", "date": date, "authors": []}
                for commit in reversed(repository.commits)
            ]
            return 200, shown
        if what.startswith("tree"):
            return 200, [{"type": "file", "path": path, "size": len(d), "oid": "0"} for path, d in newest.files.items()]
        files = [{"rfilename": path} for path in newest.files]
        return 200, {"id": name, "sha": newest.id, "private": repository.private, "siblings": files, "tags": []}

    def route(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(body)
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            self.large[found[1]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return self.large_files(body)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/(.*))?)?", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "not found"}
        name, what, rest = found[1], found[2] or "", found[3] or ""
        if method == "GET":
            return self.look(name, what)
        if what == "preupload":
            return self.upload_modes(body)
        return self.commit(name, body) if what == "commit" else self.tag(name, rest, body)
