"""`/v1/admin/limits`, `/v1/admin/routing`, `/v1/admin/pools` and `/v1/admin/config`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.serving.admin.administered import HELLO, Administered, administered, refused
from inferflux_core.access.store import AccessStore
from inferflux_core.errors import ConfigError
from inferflux_core.models.manager import ModelManager
from inferflux_core.models.routing import Routing
from inferflux_core.serving.admin.routing import restore_routing
from inferflux_core.settings import Limits

LIMITS = "/v1/admin/limits"
OLD = "/v1/admin/rate_limit"
ROUTING = "/v1/admin/routing"
NO_LIMITS = {"rpm": None, "tpm": None, "concurrency": None, "daily_tokens": None, "max_tokens": None}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Administered]:
    async with administered(tmp_path, limits={"default": {"rpm": 1000}}) as running:
        yield running


async def test_limits_are_replaced_at_once_and_kept(server: Administered) -> None:
    shown = await server.ask("GET", LIMITS)
    assert shown.json() == {"default": {**NO_LIMITS, "rpm": 1000}, "tenants": {}, "models": {}}
    assert shown.headers["etag"] == '"0"'  # what the configuration says
    table = {"default": {"rpm": 1}, "tenants": {"acme": {"tpm": 10}}, "models": {"*": {"concurrency": 4}}}
    changed = await server.ask("PUT", LIMITS, table, match="0")
    assert changed.headers["etag"] == '"1"'
    assert changed.json()["tenants"] == {"acme": {**NO_LIMITS, "tpm": 10}}
    assert (await server.ask("PUT", LIMITS, changed.json(), match="1")).headers["etag"] == '"2"'  # what was read can be sent
    statuses = [(await server.ask("POST", "/v1/chat/completions", HELLO, key=server.user_key)).status_code for _ in range(2)]
    assert statuses == [200, 429]
    assert server.access.store is not None
    document = await server.access.store.get_document("limits")
    assert document is not None
    assert (document.version, document.value["default"]["rpm"]) == (2, 1)
    assert server.audit.names() == ["limits.changed", "limits.changed"]


WRONG_LIMITS: tuple[tuple[object, str], ...] = (
    ({"default": {"rpm": 0}}, "default.rpm"),
    ({"default": {"rpm": "60"}}, "default.rpm"),
    ({"default": {"rps": 1}}, "default.rps"),
    ({"tenant": {}}, "tenant"),
    ({"tenants": {"acme": {"tpm": -1}}}, "tenants.acme.tpm"),
    ({"tenants": {"acme*": {"tpm": 1}}}, "tenants"),
    ({"tenants": {"": {"tpm": 1}}}, "tenants"),
    ({"models": {"acme-*": {"tpm": 1}}}, "models"),
    ({"models": {"**": {"tpm": 1}}}, "models"),
)


async def test_wrong_limits_change_nothing(server: Administered) -> None:
    for body, param in WRONG_LIMITS:
        response = await server.ask("PUT", LIMITS, body, match="*")
        refused(response, 400, None)
        assert response.json()["error"]["param"] == param
    refused(await server.ask("PUT", LIMITS, {}, match="3"), 412, "version_mismatch")
    refused(await server.ask("PUT", LIMITS, {}), 428, "version_required")
    assert (await server.ok("GET", LIMITS))["default"]["rpm"] == 1000
    assert server.audit.events == []


async def test_the_older_path_changes_what_it_names(server: Administered) -> None:
    assert await server.ok("GET", OLD) == {"tokens_per_minute": None, "requests_per_minute": 1000}
    changed = await server.ok("PUT", OLD, {"tokens_per_minute": 5000})
    assert changed == {"tokens_per_minute": 5000, "requests_per_minute": 1000}
    assert (await server.ok("PUT", OLD, {"requests_per_minute": None}))["requests_per_minute"] is None
    assert (await server.ok("GET", LIMITS))["default"] == {**NO_LIMITS, "tpm": 5000}
    refused(await server.ask("PUT", OLD, {}), 400, None, "tokens_per_minute")
    refused(await server.ask("PUT", OLD, {"tokens_per_minute": 0}), 400, None)
    refused(await server.ask("PUT", OLD, {"tokens_per_minute": 1}, match="0"), 412, "version_mismatch")


async def test_a_value_and_its_version_are_of_one_moment(server: Administered) -> None:
    """Another server of this machine writes; its value is not shown under the name of ours, or ours under its version."""
    assert server.access.store is not None
    other = AccessStore(server.access.store.path)
    try:
        await other.put_document("limits", {"default": {"rpm": 5}, "tenants": {}, "models": {}}, None)
        await other.put_document("routing", {"allow_default_fallback": False, "require_ready_backend": True}, None)
    finally:
        other.close()
    shown = await server.ask("GET", LIMITS)
    assert (shown.headers["etag"], shown.json()["default"]) == ('"1"', {**NO_LIMITS, "rpm": 5})
    shown = await server.ask("GET", OLD)
    assert (shown.headers["etag"], shown.json()) == ('"1"', {"tokens_per_minute": None, "requests_per_minute": 5})
    shown = await server.ask("GET", ROUTING)
    assert (shown.headers["etag"], shown.json()["allow_default_fallback"]) == ('"1"', False)
    changed = await server.ok("PUT", OLD, {"tokens_per_minute": 7})
    assert changed == {"tokens_per_minute": 7, "requests_per_minute": 5}  # the other's change is not undone
    assert server.access.limit_rules.table.default == Limits(rpm=5, tpm=7)


async def test_a_document_of_another_kind_is_no_server_error(server: Administered) -> None:
    assert server.access.store is not None
    await server.access.store.put_document("limits", {"rules": []}, None)
    refused(await server.ask("GET", LIMITS), 503, "auth_unavailable")


async def test_of_two_writers_one_learns_that_it_was_late(server: Administered) -> None:
    answers = await asyncio.gather(*(server.ask("PUT", LIMITS, {"default": {"rpm": n}}, match="0") for n in (10, 20)))
    assert sorted(answer.status_code for answer in answers) == [200, 412]
    [winner] = [answer.json()["default"]["rpm"] for answer in answers if answer.status_code == 200]
    assert (await server.ok("GET", LIMITS))["default"]["rpm"] == winner
    assert server.access.limit_rules.table.default.rpm == winner


async def test_routing_rules_are_in_force_at_once_and_after_a_restart(server: Administered) -> None:
    shown = await server.ask("GET", ROUTING)
    assert (shown.json(), shown.headers["etag"]) == ({"allow_default_fallback": True, "require_ready_backend": True}, '"0"')
    rules = {"allow_default_fallback": False, "require_ready_backend": False}
    assert await server.ok("PUT", ROUTING, rules, match="0") == rules
    refused(await server.ask("POST", "/v1/chat/completions", {**HELLO, "model": None}), 400, None, "'model'")
    assert server.models.routing == Routing(**rules)
    server.models.routing = Routing()
    await restore_routing(server.access.store, server.models)
    assert server.models.routing == Routing(**rules)
    assert server.audit.names() == ["routing.changed"]


async def test_routing_rules_that_are_refused(server: Administered) -> None:
    both = {"allow_default_fallback": True, "require_ready_backend": True}
    scope = await server.ask("PUT", ROUTING, {**both, "fallback_scope": "any_compatible"}, match="*")
    refused(scope, 400, "unsupported_parameter", "fallback_scope", "never answers")
    refused(await server.ask("PUT", ROUTING, {"allow_default_fallback": True}, match="*"), 400, None, "require_ready_backend")
    refused(await server.ask("PUT", ROUTING, {**both, "allow_default_fallback": 1}, match="*"), 400, None)
    refused(await server.ask("PUT", ROUTING, both), 428, "version_required")
    assert server.models.routing == Routing()


async def test_stored_rules_that_cannot_be_read_stop_the_start(tmp_path: Path, server: Administered) -> None:
    models: ModelManager = server.models
    store = AccessStore(tmp_path / "other.db")
    try:
        await restore_routing(store, models)  # nothing stored
        await restore_routing(None, models)
        await store.put_document("routing", {"allow": 1}, None)
        with pytest.raises(ConfigError, match="routing rules"):
            await restore_routing(store, models)
    finally:
        store.close()


async def test_the_pools_say_what_readyz_says(server: Administered) -> None:
    answer = await server.ok("GET", "/v1/admin/pools")
    assert answer["status"] == "ok"
    assert answer["pool_health"] == {
        "ready": True,
        "http_status": 200,
        "role": "unified",
        "reason": "",
        "model_loaded": True,
    }
    assert answer["scheduler"] == {"queue_depth": 0, "running": 0, "batch_limit_size": 16, "batch_limit_tokens": 2048}
    server.models.get("fake").fail("broken")
    answer = await server.ok("GET", "/v1/admin/pools")
    assert (answer["status"], answer["pool_health"]["http_status"]) == ("not_ready", 503)
    assert answer["pool_health"]["reason"] == "the default model is failed"


async def test_the_configuration_is_shown_with_origins_and_without_secrets(server: Administered) -> None:
    answer = await server.ask("GET", "/v1/admin/config")
    settings = answer.json()["settings"]
    assert answer.json()["file"] is None
    assert settings["limits.default.rpm"] == {"value": 1000, "origin": "command line"}
    assert settings["server.port"] == {"value": 8080, "origin": "default"}
    assert settings["auth.settings.api_keys.pepper"]["value"] == "********"
    assert "p" * 32 not in answer.text


async def test_every_document_has_an_etag(server: Administered) -> None:
    for path in (LIMITS, ROUTING, OLD, "/v1/admin/pools", "/v1/admin/config", "/v1/admin/models", "/v1/admin/cache"):
        response = await server.ask("GET", path)
        assert response.headers["etag"].startswith('"')
        assert response.headers["cache-control"] == "no-store"
