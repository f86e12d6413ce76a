"""A whole server without a network: real keys, policy, limits, store and pipeline, models of the fake backend in threads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from inferflux_core.access.audit.events import AuditEvent, record_fields
from inferflux_core.access.audit.log import NoAudit
from inferflux_core.access.keys.records import NewKey
from inferflux_core.access.services import AccessServices
from inferflux_core.config import load_settings
from inferflux_core.effective import as_json, effective_values
from inferflux_core.engine.client import EngineClient
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.inprocess import InProcessEngineClient
from inferflux_core.models.manager import ModelManager
from inferflux_core.plugins import load_plugins
from inferflux_core.serving.app import create_app
from inferflux_core.serving.pipeline import Pipeline
from inferflux_core.serving.services import ServerState, Services
from inferflux_core.telemetry.metrics import Metrics

REGISTRY = load_plugins()
POLICY = """\
role, boss
role, user
p, role:boss, *, **, admin, allow
p, role:user, *, model/*, generate, allow
p, role:user, *, api/models, read, allow
"""
TESTS = """\
subject,tenant,object,action,expected
role:boss,default,api/keys,admin,allow
role:user,default,api/keys,admin,deny
"""
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 4}


@dataclass
class RecordingAudit(NoAudit):
    """Keeps what administrators did, in the form of a record."""

    events: list[dict[str, Any]] = field(default_factory=list)

    async def record(self, event: AuditEvent, *, important: bool = False) -> None:
        fields = record_fields(event)
        json.dumps(fields)
        if event.event not in ("request.completed", "policy.denied", "auth.failed"):
            assert important
            self.events.append(dict(fields))

    def names(self) -> list[Any]:
        return [event["event"] for event in self.events]


@dataclass
class Administered:
    """The server and an administrator's client."""

    client: httpx.AsyncClient
    access: AccessServices
    models: ModelManager
    audit: RecordingAudit
    admin_key: str
    user_key: str
    policy_file: Path

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        match: str | None = None,
        key: str | None = None,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """One request; the admin's unless `key` says otherwise. `match` is the version for If-Match."""
        sent = {"authorization": f"Bearer {self.admin_key if key is None else key}", **(headers or {})}
        if match is not None:
            sent["if-match"] = match if match == "*" else f'"{match}"'
        if body is not None:
            options["json"] = body
        return await self.client.request(method, path, headers=sent, **options)

    async def ok(self, method: str, path: str, body: object = None, **options: Any) -> Any:
        """The document of a reply that must be a success."""
        response = await self.ask(method, path, body, **options)
        assert response.status_code in (200, 202), response.text
        return response.json()

    async def num_keys(self) -> int:
        assert self.access.keys is not None
        return len(await self.access.keys.list())


def refused(response: httpx.Response, status: int, code: str | None, *words: str) -> None:
    """The reply is this refusal, in the four-key shape, and its message has these words."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    for word in words:
        assert word in error["message"]


@contextlib.asynccontextmanager
async def administered(tmp_path: Path, **settings: Any) -> AsyncIterator[Administered]:
    """A running server whose models are `fake` (the default) and `second`."""
    policy_file = tmp_path / "policy.csv"
    policy_file.write_text(POLICY)
    (tmp_path / "tests.csv").write_text(TESTS)
    overrides = {
        "state_dir": str(tmp_path / "state"),
        "models": [{"source": "fake"}, {"source": "fake:2", "name": "second"}],
        "auth": {"providers": ["api_keys"], "settings": {"api_keys": {"pepper": "p" * 32}}},
        "policy": {"file": str(policy_file), "reload_interval_s": 3600},
        "audit": {"enabled": False},
        "server": {"drain_timeout_s": 0.2},
        **settings,
    }
    loaded = load_settings(overrides=overrides, environ={})
    configured, registry, metrics = loaded.settings, REGISTRY, Metrics()

    def engine(name: str, spec: EngineSpec) -> EngineClient:
        return InProcessEngineClient(name, spec, configured.engine, registry)

    access = AccessServices.open(configured, metrics, registry)
    audit = RecordingAudit()
    access.audit = audit
    models = ModelManager(configured, registry, engine)
    state = ServerState()
    services = Services(
        pipeline=Pipeline(models, access, metrics, state),
        models=models,
        access=access,
        settings=configured,
        metrics=metrics,
        state=state,
        configuration=lambda: as_json(loaded, effective_values(loaded, registry)),
    )
    app = create_app(services)
    await access.start()
    try:
        await models.load()
        assert access.keys is not None
        _, admin_key = await access.keys.create(
            NewKey(name="boss", scopes=frozenset({"admin"}), roles=frozenset({"boss"}), tenant="ops")
        )
        _, user_key = await access.keys.create(NewKey(name="user", roles=frozenset({"user"})))
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield Administered(client, access, models, audit, admin_key, user_key, policy_file)
    finally:
        await models.stop()
        await access.close()
