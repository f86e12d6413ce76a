"""A hub on loopback that speaks as much of the Hugging Face hub's protocol as a download needs, and fails on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")


@dataclass
class Repo:
    """A repository: commit -> file -> content, and branches."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    token: str | None = None  # the only one that may read it


@dataclass
class Request:
    """One request that arrived."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """The state of the server; tests change it between requests.

    Attributes:
        break_after: file -> bytes after which its next transfer breaks off; each takes effect once.
        corrupt: files whose content is sent with another last byte.
        short: files whose transfer ends early, as if complete.
        endless: files that are followed by ever more bytes.
        failing: status that everything is answered with.
    """

    url: str
    cdn: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    break_after: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    endless: set[str] = field(default_factory=set)
    failing: int | None = None

    def add(self, repo: str, files: dict[str, bytes], *, branch: str = "main", **settings: Any) -> str:
        """A new commit on a branch; returns its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        entry = self.repos.setdefault(repo, Repo({}, {}, **settings))
        entry.commits[commit] = files
        entry.branches[branch] = commit
        return commit

    def transfers(self, file: str) -> list[Request]:
        """GET requests for the content of a file."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith("/" + file)]

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [
            request.path.rsplit("/", 1)[1]
            for request in self.requests
            if request.method == "GET" and not request.path.startswith("/api/")
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, dict(self.headers.items())))
        if self.hub.failing is not None:
            self._error(self.hub.failing, "", "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            repo, commit, name = match.groups()
            self._content(name, self.hub.repos[repo].commits[commit][name], {})
        else:
            self._error(404, "", "no such page")

    def _repo(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and not repo.gated and given != repo.token):
            self._error(401, "RepoNotFound", "Repository not found")
        elif repo.gated and given != repo.token:
            self._error(403 if given else 401, "GatedRepo", "Access to this model is restricted")
        elif (commit := repo.branches.get(revision, revision)) not in repo.commits:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        else:
            return commit, repo.commits[commit]
        return None

    def _info(self, name: str, revision: str | None) -> None:
        if (found := self._repo(name, revision or "main")) is None:
            return
        commit, files = found
        siblings = []
        for file, content in files.items():
            sibling: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": _git_sha1(content)}
            if file.endswith(LARGE):
                sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self._repo(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if not file.endswith(LARGE):
            self._content(file, files[file], {**headers, "ETag": f'"{_git_sha1(files[file])}"'})
            return
        self._head(
            302,
            {
                **headers,
                "Location": f"{self.hub.cdn}/cdn/{name}/{commit}/{file}",
                "X-Linked-Etag": f'"{hashlib.sha256(files[file]).hexdigest()}"',
                "X-Linked-Size": str(len(files[file])),
                "Content-Length": "0",
            },
        )

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = 0
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if name in self.hub.short:
            content = content[:-1]
        body = content[start:]
        if name in self.hub.endless and self.command == "GET":
            self._head(status, {**headers, "Connection": "close"})
            self._flood(body)
            return
        self._head(status, {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        broken = self.hub.break_after.pop(name, None)
        self.wfile.write(body[:broken])
        if broken is not None:
            self.close_connection = True

    def _flood(self, body: bytes) -> None:
        try:
            while True:
                self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Length": "0"}
        self._head(status, {**headers, "X-Error-Code": code} if code else headers)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port. Its file storage answers under another host name, as the real one's does."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port = server.server_address[1]
    Handler.hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
