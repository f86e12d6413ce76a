"""`/v1/admin/api-keys`, and what all of the admin API has in common: permission, versions, strict bodies, audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from core.serving.admin.administered import HELLO, Administered, administered, refused
from inferflux_core.serving.admin.keys import KeyObject

KEYS = "/v1/admin/api-keys"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Administered]:
    async with administered(tmp_path) as running:
        yield running


async def test_a_key_is_made_used_changed_rotated_and_revoked(server: Administered) -> None:
    made = await server.ok("POST", KEYS, {"name": "ci", "tenant": "acme", "roles": ["user"], "limits": {"rpm": 100}})
    secret = made.pop("key")
    assert secret.startswith(f"ifx_live_{made['id']}_")
    assert (made["name"], made["tenant"], made["scopes"], made["version"]) == ("ci", "acme", ["generate", "embed", "read"], 1)
    chat = await server.ask("POST", "/v1/chat/completions", HELLO, key=secret)
    assert chat.status_code == 200

    one = f"{KEYS}/{made['id']}"
    shown = await server.ask("GET", one)
    assert shown.headers["etag"] == '"1"'
    assert secret not in shown.text
    changed = await server.ask("PATCH", one, {"name": "ci-2", "limits": None}, match="1")
    assert (changed.json()["name"], changed.json()["limits"], changed.headers["etag"]) == ("ci-2", None, '"2"')

    rotated = await server.ok("POST", f"{one}/rotate", {"overlap_s": 60})
    assert (rotated["id"], rotated["version"]) == (made["id"], 3)
    assert rotated["key"] != secret
    for key in (secret, rotated["key"]):
        assert (await server.ask("GET", "/v1/models", key=key)).status_code == 200

    revoked = await server.ok("DELETE", one)
    assert revoked["revoked_at"] is not None
    assert await server.ok("DELETE", one) == revoked  # twice is no error
    for key in (secret, rotated["key"]):
        refused(await server.ask("GET", "/v1/models", key=key), 401, "invalid_api_key")
    assert server.audit.names()[:4] == ["key.created", "key.updated", "key.rotated", "key.revoked"]


async def test_a_star_changes_whatever_version_there_is(server: Administered) -> None:
    made = await server.ok("POST", KEYS, {"name": "ci"})
    changes = ({"name": "one"}, {"owner": "Ann"}, {"priority": 3})
    replies = await asyncio.gather(*(server.ask("PATCH", f"{KEYS}/{made['id']}", change, match="*") for change in changes))
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    shown = await server.ok("GET", f"{KEYS}/{made['id']}")
    assert (shown["name"], shown["owner"], shown["priority"], shown["version"]) == ("one", "Ann", 3, 4)


async def test_the_list_has_every_key_and_no_secret(server: Administered) -> None:
    listed = await server.ask("GET", KEYS)
    assert [key["name"] for key in listed.json()["data"]] == ["boss", "user"]
    assert listed.json()["object"] == "list"
    for secret in (server.admin_key, server.user_key):
        assert secret not in listed.text
        assert secret.rpartition("_")[2][:20] not in listed.text
    for key in listed.json()["data"]:
        msgspec.convert(key, KeyObject)  # as the description of the API has it
        assert set(key) == set(KeyObject.__struct_fields__)


async def test_a_change_is_recorded_with_who_what_and_from_where(server: Administered) -> None:
    made = await server.ok("POST", KEYS, {"name": "ci"}, headers={"x-request-id": "r-1"})
    [event] = server.audit.events
    assert (event["event"], event["request_id"], event["key_id"]) == ("key.created", "r-1", made["id"])
    assert event["actor"]["tenant"] == "ops"
    assert event["key"]["scopes"] == ["generate", "embed", "read"]
    assert made["key"] not in str(event)
    assert made["key"].split("_")[3] not in str(event)


ROUTES: tuple[tuple[str, str, object], ...] = (
    ("GET", KEYS, None),
    ("POST", KEYS, {"name": "mine", "scopes": ["admin"]}),
    ("GET", "/v1/admin/policy", None),
    ("PUT", "/v1/admin/policy", {"policy": "x"}),
    ("GET", "/v1/admin/limits", None),
    ("GET", "/v1/admin/models", None),
    ("POST", "/v1/admin/models", {"source": "fake:3"}),
    ("DELETE", "/v1/admin/models/second", None),
    ("GET", "/v1/admin/routing", None),
    ("GET", "/v1/admin/cache", None),
    ("GET", "/v1/admin/pools", None),
    ("GET", "/v1/admin/config", None),
)


async def test_who_is_no_administrator_gets_nothing(server: Administered) -> None:
    for method, path, body in ROUTES:
        refused(await server.ask(method, path, body, key=server.user_key), 403, "insufficient_scope")
        refused(await server.ask(method, path, body, key=server.admin_key[:-1] + "!"), 401, "invalid_api_key")
    assert await server.num_keys() == 2
    assert [model.name for model in server.models.list()] == ["fake", "second"]


async def test_an_administrator_of_the_policy_is_none_of_the_keys(server: Administered) -> None:
    policy = (await server.ok("GET", "/v1/admin/policy"))["policy"]
    policy = f"{policy}role, clerk\np, role:clerk, *, api/policy, admin, allow\n"
    await server.ok("PUT", "/v1/admin/policy", {"policy": policy}, match="*")
    key = (await server.ok("POST", KEYS, {"name": "clerk", "scopes": ["admin"], "roles": ["clerk"]}))["key"]
    assert (await server.ask("GET", "/v1/admin/policy", key=key)).status_code == 200
    refused(await server.ask("GET", KEYS, key=key), 403, "policy_denied")


async def test_a_write_needs_the_current_version(server: Administered) -> None:
    key_id = (await server.ok("POST", KEYS, {"name": "ci"}))["id"]
    one = f"{KEYS}/{key_id}"
    refused(await server.ask("PATCH", one, {"name": "x"}), 428, "version_required", "If-Match")
    refused(await server.ask("PATCH", one, {"name": "x"}, match="7"), 412, "version_mismatch")
    refused(await server.ask("PATCH", one, {"name": "x"}, match="abc"), 412, "version_mismatch")
    refused(await server.ask("PATCH", one, {"name": "x"}, headers={"if-match": 'W/"1"'}), 412, "version_mismatch", "weak")
    refused(await server.ask("PATCH", one, {"name": "x"}, headers={"if-match": '"1", "2"'}), 400, None, "one entity tag")
    refused(await server.ask("DELETE", one, match="7"), 412, "version_mismatch")
    refused(await server.ask("POST", f"{one}/rotate", {}, match="7"), 412, "version_mismatch")
    assert (await server.ok("GET", one))["version"] == 1
    assert (await server.ok("PATCH", one, {"name": "y"}, match="*"))["version"] == 2
    assert server.audit.names() == ["key.created", "key.updated"]


WRONG_BODIES: tuple[tuple[bytes, tuple[str, ...]], ...] = (
    (b'{"name": "x", "scope": ["read"]}', ("Unknown parameter: 'scope'", "scopes")),
    (b'{"name": "x", "limits": {"rps": 1}}', ("Unknown parameter: 'limits.rps'",)),
    (b'{"name": "x", "name": "y"}', ("'name' twice",)),
    (b'{"name": "x", "limits": {"rpm": 1, "rpm": 2}}', ("'rpm' twice",)),
    (b'{"name": "x", "priority": "1"}', ("'priority'",)),
    (b'{"name": "x", "limits": {"rpm": true}}', ("'limits.rpm'",)),
    (b'{"name": "x", "scopes": ["root"]}', ("'scopes",)),
    (b'{"name": "x", "scopes": []}', ("'scopes'",)),
    (b'{"name": "x", "expires_at": "2001-01-01T00:00:00Z"}', ("past",)),
    (b'{"name": "a\\nb"}', ("'name'",)),
    (b'{"tenant": "x"}', ("Missing required parameter: 'name'",)),
    (b'{"name": "x"', ("not valid JSON",)),
    (b"[]", ("must be a JSON object",)),
    (b"", ("empty",)),
)


async def test_a_body_that_is_wrong_makes_no_key(server: Administered) -> None:
    for content, words in WRONG_BODIES:
        response = await server.ask("POST", KEYS, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, (content, response.text)
        for word in words:
            assert word in response.json()["error"]["message"], content
    assert await server.num_keys() == 2
    assert server.audit.events == []


async def test_bodies_of_other_kinds(server: Administered) -> None:
    form = await server.ask("POST", KEYS, content=b"name=x", headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415
    deep = b'{"name": ' + b"[" * 100 + b"]" * 100 + b"}"
    refused(await server.ask("POST", KEYS, content=deep, headers={"content-type": "application/json"}), 400, "invalid_json")


async def test_a_key_that_is_not_there(server: Administered) -> None:
    for method, path, body in (("GET", "", None), ("PATCH", "", {"name": "x"}), ("DELETE", "", None), ("POST", "/rotate", {})):
        refused(await server.ask(method, f"{KEYS}/000000000000{path}", body, match="*"), 404, "not_found", "000000000000")


async def test_a_revoked_key_stays_revoked(server: Administered) -> None:
    key_id = (await server.ok("POST", KEYS, {"name": "ci"}))["id"]
    await server.ok("DELETE", f"{KEYS}/{key_id}")
    refused(await server.ask("PATCH", f"{KEYS}/{key_id}", {"name": "x"}, match="*"), 409, None, "revoked")
    refused(await server.ask("POST", f"{KEYS}/{key_id}/rotate", {}), 409, None, "revoked")


async def test_a_rotation_without_overlap_ends_the_old_secret(server: Administered) -> None:
    made = await server.ok("POST", KEYS, {"name": "ci"})
    rotated = await server.ok("POST", f"{KEYS}/{made['id']}/rotate", {})
    refused(await server.ask("GET", "/livez-not", key=made["key"]), 401, "invalid_api_key")
    assert (await server.ask("GET", "/livez-not", key=rotated["key"])).status_code == 404
    refused(await server.ask("POST", f"{KEYS}/{made['id']}/rotate", {"overlap_s": -1}), 400, None, "overlap_s")
