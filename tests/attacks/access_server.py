"""A real `inferflux serve` behind API keys, a policy file and an audit log, and clients that know its keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from attacks.raw_http import Reply, head
from inferflux_core.access.audit.key_files import AuditPaths, read_key
from inferflux_core.access.audit.verify import Verification, verify
from inferflux_core.access.keys.records import NewKey
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.settings import AuditSettings
from served import ServedInferFlux, serving, until

PEPPER = "a pepper of the tests, 32 bytes or more"

POLICY = """\
role, boss
role, user
role, guest
p, role:boss, *, **, admin, allow
p, role:user, *, model/**, generate, allow
p, role:user, *, model/**, read, allow
p, role:user, *, model/secret, *, deny
p, role:user, *, api/metrics, read, allow
p, role:user, *, api/health, read, allow
p, role:guest, *, model/public, generate, allow
"""
"""What roles may: `boss` all, `user` every model but `secret`, `guest` only `public`."""

BOSS: dict[str, Any] = {"tenant": "ops", "scopes": ["admin"], "roles": ["boss"]}
USER: dict[str, Any] = {"tenant": "acme", "scopes": ["generate", "read"], "roles": ["user"]}


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and what is known of it beside its secret."""

    id: str
    secret: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}


@dataclass(frozen=True, slots=True)
class AccessServer:
    """A running server, its folders and its keys by their names."""

    served: ServedInferFlux
    keys: Mapping[str, Key]
    folder: Path

    @property
    def url(self) -> str:
        return self.served.url

    @property
    def policy(self) -> Path:
        return self.folder / "policy.csv"

    @property
    def audit_log(self) -> Path:
        return self.folder / "state" / "audit.jsonl"

    def client(self, name: str, **options: Any) -> httpx.Client:
        """A client that sends the key of this name."""
        return httpx.Client(base_url=self.url, headers=self.keys[name].headers, timeout=30, **options)

    def ask(self, name: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**self.keys[name].headers, **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=30, **options)

    def chat(self, name: str, **fields: Any) -> httpx.Response:
        return self.ask(name, "POST", "/v1/chat/completions", json=chat(**fields))

    def chat_bytes(self, name: str, **fields: Any) -> bytes:
        """The same as raw HTTP."""
        body, lines = (
            json.dumps(chat(**fields)).encode(),
            ("Content-Type: application/json", f"X-API-Key: {self.keys[name].secret}"),
        )
        return head("POST", "/v1/chat/completions", *lines, f"Content-Length: {len(body)}") + body

    def records(self) -> list[dict[str, Any]]:
        """What is in the audit log now; the last line may be in the making."""
        complete, _, _ = self.audit_log.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in complete.splitlines()]

    def record_of(self, request_id: str) -> dict[str, Any]:
        """The one record of a request that is waited for."""
        until(lambda: any(r.get("request_id") == request_id for r in self.records()), 10)
        (found,) = [r for r in self.records() if r.get("request_id") == request_id]
        return found

    def verified(self) -> Verification:
        """What the verification of the audit log says."""
        return verify(self.audit_log, key=read_key(AuditPaths.of(AuditSettings(), self.folder / "state").key), public_key=None)


def chat(**fields: Any) -> dict[str, Any]:
    """A body for /v1/chat/completions."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0, **fields}


def make_keys(store: Path, keys: Mapping[str, Mapping[str, Any]]) -> dict[str, Key]:
    """Create keys, as the host's administrator does."""

    async def create() -> dict[str, Key]:
        ring = open_keys(ApiKeySettings.model_validate({"pepper": PEPPER, "store": store}), store.parent)
        try:
            made = {}
            for name, terms in keys.items():
                record, secret = await ring.create(NewKey.model_validate({"name": name, **terms}))
                made[name] = Key(record.id, secret)
            return made
        finally:
            ring.close()

    return asyncio.run(create())


async def next_reply(reader: asyncio.StreamReader) -> Reply:
    """The next response with a Content-Length."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"])))


async def burst(url: str, requests: Sequence[bytes], connections: int) -> list[Reply]:
    """Send requests over so many connections, on each ten before the answer to the first is waited for."""
    address = urlsplit(url)

    async def ask(share: Sequence[bytes]) -> list[Reply]:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        replies = []
        for start in range(0, len(share), 10):
            ten = share[start : start + 10]
            writer.write(b"".join(ten))
            replies += [await next_reply(reader) for _ in ten]
        writer.close()
        await writer.wait_closed()
        return replies

    async with asyncio.timeout(60):
        shares = await asyncio.gather(*(ask(requests[number::connections]) for number in range(connections)))
    return [reply for share in shares for reply in share]


@contextmanager
def running(folder: Path, keys: Mapping[str, Key], **groups: Any) -> Iterator[AccessServer]:
    """Start the server of a folder; keyword arguments are groups of settings that are added to or changed."""
    (folder / "policy.csv").touch()
    if not (folder / "policy.csv").read_bytes():
        (folder / "policy.csv").write_text(POLICY)
    state = folder / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "models": [{"source": "fake", "name": name} for name in ("tiny", "secret")],
        "state_dir": str(state),
        "policy": {"file": str(folder / "policy.csv"), "reload_interval_s": 0.1},
        **groups,
        "auth": {
            "providers": ["api_keys"],
            "settings": {"api_keys": {"pepper": PEPPER, **groups.get("auth", {}).pop("api_keys", {})}},
            **groups.get("auth", {}),
        },
    }
    config = folder / "inferflux.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    config.chmod(0o600)
    with serving("--config", str(config), cwd=folder) as served:
        yield AccessServer(served, keys, folder)


@contextmanager
def guarded(folder: Path, keys: Mapping[str, Mapping[str, Any]], **groups: Any) -> Iterator[AccessServer]:
    """A new server of a folder of its own, with keys made for it."""
    state = folder / "state"
    state.mkdir(mode=0o700)
    with running(folder, make_keys(state / "access.db", keys), **groups) as server:
        yield server
