"""A real server with API keys, a policy and an audit log, and clients of different worth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from inferflux_core.access.api_key_settings import ApiKeySettings
from inferflux_core.access.key_records import KeyRecord, NewKey
from inferflux_core.access.key_ring import KeyRing, open_keys
from served import ServedInferFlux, serving

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
    user: str = ""
    admin: str = ""

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

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page."""
        reply = self.ask("GET", "/metrics", key=self.admin)
        assert reply.status_code == 200
        samples = (line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def audit_lines(self) -> list[bytes]:
        """Lines of the audit log, without their ends."""
        return (self.state / "audit.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")


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
    with serving("--config", str(folder / "inferflux.yaml"), cwd=folder) as served:
        with httpx.Client(base_url=served.url, timeout=30) as client:
            there = ApiServer(served, client, state)
            _, there.user = there.new_key("user")
            _, there.admin = there.new_key("boss", scopes=frozenset({"admin"}), tenant="ops")
            yield there
