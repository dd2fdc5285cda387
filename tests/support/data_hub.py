"""A stand-in for the Hugging Face hub's data sets: enough of its API to look files up and to download them.

Large files have a SHA-256 (Git LFS), small ones Git's own checksum. It can break a download off, give other bytes than
it says, or ask for a login. It runs in the process of the tests; ``HF_ENDPOINT`` points a client at it.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from tests.support.loopback import Answer, Asked, LoopbackServer

LARGE = (".tar.gz", ".tar", ".parquet", ".arrow")


@dataclass
class DataHub(LoopbackServer):
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

    def respond(self, asked: Asked) -> Answer:
        self.calls.append(f"{asked.method} {asked.path} {asked.headers.get('Range', '')}".strip())
        pattern = r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(?:revision|resolve|tree)/([^/]+)(?:/(.+))?)?"
        found = re.fullmatch(pattern, asked.path)
        if found is None or found[1] not in self.files:
            return Answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if self.gated and found[3]:
            return Answer(b"{}", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if not found[3]:
            told = self.info(found[1])
            if "/tree/" in asked.path:
                names = {"rfilename": "path", "blobId": "oid"}
                files = [{names.get(key, key): value for key, value in one.items()} for one in told["siblings"]]
                return Answer([{"type": "file", **one} for one in files])
            return Answer(told)
        if found[3] not in self.files[found[1]]:
            return Answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        return self._file(asked, found[1], found[3])

    def _file(self, asked: Asked, repository: str, name: str) -> Answer:
        content = self.files[repository][name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_sha1(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(repository), "Accept-Ranges": "bytes"}
        if name == self.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("Range", ""))
        start = int(part[1]) if part else 0
        if part:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        kept = None
        if asked.method == "GET" and name.endswith(LARGE):
            kept, self.break_after = self.break_after, None
        return Answer(content[start:], 206 if part else 200, headers, kept)

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
