"""A real server with API keys, a policy and an audit log, and clients of different worth; and one without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

from core.serving.scripted import FakeModel, FakeModels, Stand, stand
from inferflux_core.access.keys.records import KeyRecord, NewKey
from inferflux_core.access.keys.ring import KeyRing, open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.services import AccessServices
from inferflux_core.plugins import load_plugins
from inferflux_core.settings import Settings
from inferflux_core.telemetry.metrics import Metrics
from served import ServedInferFlux, serving, until

POLICY = """\
role, user, reader, boss
p, role:user, *, model/open, generate, allow
p, role:reader, *, api/models, read, allow
p, role:boss, *, **, admin, allow
g, role:reader, role:user, *
"""
"""`user` may use `open` and knows of no other model; `reader` sees all and uses `open`; `boss` may do everything."""

CHAT: dict[str, Any] = {"model": "open", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}
UNAUTHORIZED = {
    "error": {
        "message": "The request has no valid credential. Send an API key or an access token as 'Authorization: Bearer ...'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
}


@dataclass
class ApiServer:
    """The server, and who may call it.

    Attributes:
        state: its state folder.
        user: key with the role `user`.
        admin: key with the role `boss`.
    """

    served: ServedInferFlux
    client: httpx.Client
    state: Path
    user: str = field(default="", repr=False)
    admin: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return self.served.url

    @contextmanager
    def ring(self) -> Iterator[KeyRing]:
        """The keys as another process has them: through the file, behind the server's back."""
        keys = open_keys(ApiKeySettings(), self.state)
        try:
            yield keys
        finally:
            keys.close()

    def new_key(self, role: str, **terms: Any) -> tuple[KeyRecord, str]:
        with self.ring() as keys:
            return asyncio.run(keys.create(NewKey(name=role, roles=frozenset({role}), **terms)))

    def revoke(self, key_id: str) -> None:
        with self.ring() as keys:
            asyncio.run(keys.revoke(key_id, None))

    def ask(
        self, method: str, path: str, body: object = None, *, key: str | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """One request; the user's unless `key` says otherwise. A body of bytes is sent as it is."""
        sent = {"authorization": f"Bearer {self.user if key is None else key}", **(headers or {})}
        if body is None:
            return self.client.request(method, path, headers=sent)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.request(method, path, headers={**JSON, **sent}, content=content)

    def chat(self, key: str | None = None, **fields: Any) -> httpx.Response:
        """A chat completion of two tokens by the model `open`, but for these fields."""
        return self.ask("POST", "/v1/chat/completions", {**CHAT, **fields}, key=key)

    def complete(self, **fields: Any) -> httpx.Response:
        """A text completion of two tokens by the model `open`, but for these fields."""
        return self.ask("POST", "/v1/completions", {"model": "open", "prompt": "hi", "max_tokens": 2, **fields})

    def assert_well(self) -> None:
        """It answers, with the engine processes that it began with."""
        assert self.chat().status_code == 200
        found = self.ask("GET", "/healthz", key=self.admin).json()["models"]
        assert [(model["state"], model["restarts"]) for model in found] == [("ready", 0)] * 2

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page."""
        reply = self.ask("GET", "/metrics", key=self.admin)
        assert reply.status_code == 200
        samples = (line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def audit_lines(self) -> list[bytes]:
        """Lines of the audit log, without their ends; the last one may be in the making."""
        complete, _, _ = (self.state / "audit.jsonl").read_bytes().rpartition(b"\n")
        return complete.split(b"\n")

    def record_of(self, reply: httpx.Response) -> dict[str, Any]:
        """The audit record of a request; it is written a moment after the reply."""
        mark = b'"request_id":"%b"' % reply.headers["x-request-id"].encode()
        until(lambda: any(mark in line for line in self.audit_lines()))
        record: dict[str, Any] = json.loads(next(line for line in self.audit_lines() if mark in line))
        return record


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object; asserts that the reply has OpenAI's four keys and nothing else."""
    document = reply.json()
    assert document.keys() == {"error"}, document
    assert document["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    return error


def refusal(reply: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, code and parameter of an error."""
    error = error_of(reply)
    return reply.status_code, error["code"], error["param"]


def server_ms(reply: httpx.Response) -> int:
    """Milliseconds from the end of the request's head to the beginning of the reply, as the server counts them."""
    return int(reply.headers["openai-processing-ms"])


@contextmanager
def api_server(folder: Path, *, fake: dict[str, object] | None = None, **settings: Any) -> Iterator[ApiServer]:
    """Serve the models `open` (alias `public`) and `secret` (alias `hidden`), of at most 256 tokens.

    Args:
        fake: settings of the fake backend.
        settings: further groups of settings.
    """
    state = folder / "state"
    state.mkdir(mode=0o700)
    (folder / "policy.csv").write_text(POLICY)
    configuration = {
        "state_dir": str(state),
        "models": [
            {"source": "fake", "name": "open", "aliases": ["public"]},
            {"source": "fake:2", "name": "secret", "aliases": ["hidden"]},
        ],
        "backends": {"fake": {"max_model_len": 256, **(fake or {})}},
        "auth": {"providers": ["api_keys"], "max_failures_per_minute": 100_000},
        "policy": {"file": str(folder / "policy.csv")},
        "audit": {"fsync": "never"},
        **settings,
    }
    (folder / "inferflux.yaml").write_text(json.dumps(configuration))
    with (
        serving("--config", str(folder / "inferflux.yaml"), cwd=folder) as served,
        httpx.Client(base_url=served.url, timeout=30) as client,
    ):
        there = ApiServer(served, client, state)
        _, there.user = there.new_key("user")
        _, there.admin = there.new_key("boss", scopes=frozenset({"admin"}), tenant="ops")
        yield there


@dataclass
class InProcess:
    """An application with real keys and a pipeline that answers whatever comes to it.

    Attributes:
        runner: of the loop that it lives in.
        key: of everybody's use of the models.
        admin: of an administrator.
    """

    stand: Stand
    runner: asyncio.Runner
    key: str = field(repr=False)
    admin: str = field(repr=False)

    def ask(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes = b"") -> int:
        """The status of the reply to a request with exactly these headers."""
        return self.runner.run(_status(self.stand.app, method, path, headers, body))


@contextmanager
def in_process(folder: Path) -> Iterator[InProcess]:
    """Nobody is made to wait after failures, and no policy adds to what a key says."""
    auth = {"providers": ["api_keys"], "max_failures_per_minute": 10**9}
    settings = Settings.model_validate({"state_dir": folder / "state", "auth": auth, "audit": {"enabled": False}})
    metrics = Metrics()
    with asyncio.Runner() as runner:
        access = AccessServices.open(settings, metrics, load_plugins())
        try:
            assert access.keys is not None
            _, key = runner.run(access.keys.create(NewKey(name="user")))
            _, admin = runner.run(access.keys.create(NewKey(name="admin", scopes=frozenset({"admin"}))))
            models = FakeModels([FakeModel("tiny")])
            yield InProcess(stand(models=models, settings=settings, access=access, metrics=metrics), runner, key, admin)
        finally:
            runner.run(access.close())


async def _status(app: ASGIApp, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> int:
    sent: list[Message] = []
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status
