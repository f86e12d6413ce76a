"""`/v1/admin/models` and `/v1/admin/cache`: models that come and go, and prefixes computed before they are asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.serving.admin.administered import HELLO, Administered, administered, refused

PATH = "/v1/admin/models"
CACHE = "/v1/admin/cache"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Administered]:
    async with administered(tmp_path) as running:
        yield running


async def states(server: Administered) -> dict[str, str]:
    return {model["id"]: model["state"] for model in (await server.ok("GET", PATH))["data"]}


async def test_a_model_is_loaded_used_and_unloaded(server: Administered) -> None:
    loaded = await server.ok("POST", PATH, {"source": "fake:3", "id": "third", "aliases": ["t"], "wait": True})
    assert loaded == {"status": "ready", "id": "third"}
    assert await states(server) == {"fake": "ready", "second": "ready", "third": "ready"}
    chat = await server.ok("POST", "/v1/chat/completions", {**HELLO, "model": "t"}, key=server.user_key)
    assert chat["model"] == "third"
    assert "third" in [model["id"] for model in (await server.ok("GET", "/v1/models"))["data"]]
    assert await server.ok("DELETE", f"{PATH}/third") == {"status": "unloaded", "id": "third"}
    assert await states(server) == {"fake": "ready", "second": "ready"}
    refused(await server.ask("POST", "/v1/chat/completions", {**HELLO, "model": "third"}), 404, "model_not_found")
    refused(await server.ask("DELETE", f"{PATH}/third"), 404, "model_not_found")
    assert server.audit.names() == ["model.load_requested", "model.unloaded"]
    assert [event["model"] for event in server.audit.events] == ["third", "third"]


async def test_without_wait_the_answer_is_202(server: Administered) -> None:
    response = await server.ask("POST", PATH, {"path": "fake:3"})
    assert (response.status_code, response.json()) == (202, {"status": "loading", "id": "fake:3"})
    await server.models.loaded(server.models.get("fake:3"))
    assert (await states(server))["fake:3"] == "ready"


async def test_names_with_slashes_and_the_older_way_to_unload(server: Administered) -> None:
    for name in ("acme/one", "default"):
        await server.ok("POST", PATH, {"source": "fake:3", "id": name, "wait": True})
    assert (await server.ok("DELETE", f"{PATH}/acme/one"))["id"] == "acme/one"
    assert (await server.ok("DELETE", PATH, {"id": "default"}))["id"] == "default"
    assert await states(server) == {"fake": "ready", "second": "ready"}


async def test_the_default_model_changes_and_cannot_be_unloaded(server: Administered) -> None:
    refused(await server.ask("DELETE", f"{PATH}/fake"), 409, None, "default model")
    assert await server.ok("PUT", f"{PATH}/default", {"id": "second"}) == {"status": "ok", "default_model": "second"}
    chat = await server.ok("POST", "/v1/chat/completions", {**HELLO, "model": None})
    assert chat["model"] == "second"
    await server.ok("DELETE", f"{PATH}/fake")
    refused(await server.ask("PUT", f"{PATH}/default", {"id": "fake"}), 404, "model_not_found")
    loaded = await server.ok("POST", PATH, {"source": "fake:3", "default": True, "wait": True})
    assert [m["id"] for m in (await server.ok("GET", PATH))["data"] if m["default"]] == [loaded["id"]]


async def test_a_name_is_taken_once(server: Administered) -> None:
    refused(await server.ask("POST", PATH, {"source": "fake:3", "id": "second"}), 409, None, "'second' belongs to")
    refused(await server.ask("POST", PATH, {"source": "fake:3", "id": "x", "aliases": ["fake"]}), 409, None)


NOT_LOADED: tuple[tuple[dict[str, object], str | None, str], ...] = (
    ({}, None, "exactly one of 'source' and 'path'"),
    ({"source": "fake:3", "path": "fake:3"}, None, "exactly one"),
    ({"source": "fake:3", "id": "a b"}, None, "'id'"),
    ({"source": "fake:3", "id": "a*"}, None, "'id'"),
    ({"source": "/x/a b.gguf"}, None, "send an 'id'"),
    ({"source": "/etc/passwd.gguf"}, "load_failed", "set model_roots"),
    ({"source": "fake:3", "backend": "nobody"}, "load_failed", "nobody"),
    ({"source": "what", "wait": True}, "load_failed", "no model source understands"),
    ({"source": "fake:3", "format": "gguf"}, None, "Unknown parameter: 'format'"),
    ({"source": "fake:3", "chat_template": "/etc/passwd"}, None, "Unknown parameter"),
)


async def test_what_cannot_be_loaded_leaves_nothing_behind(server: Administered) -> None:
    for body, code, words in NOT_LOADED:
        refused(await server.ask("POST", PATH, body), 400, code, words)
    assert await states(server) == {"fake": "ready", "second": "ready"}


async def test_a_model_that_fails_while_nobody_waits_says_why_in_the_list(server: Administered) -> None:
    await server.ok("POST", PATH, {"source": "what"})
    await server.models.loaded(server.models.get("what"))
    [model] = [m for m in (await server.ok("GET", PATH))["data"] if m["id"] == "what"]
    assert model["state"] == "failed"
    assert "no model source understands 'what'" in model["last_error"]
    assert (await server.ok("DELETE", f"{PATH}/what"))["status"] == "unloaded"


# --- the prefix cache -------------------------------------------------------------------------------------------------


async def test_a_warmed_prefix_is_found_by_that_tenant_only(server: Administered) -> None:
    prefix = "You are a helpful assistant of the acme company. " * 4
    asked = {"model": "fake", "prompt": prefix, "tenant": "acme"}
    first = await server.ok("POST", f"{CACHE}/warm", asked)
    tokens = len(prefix) + 1
    assert first == {"status": "ok", "model": "fake", "tenant": "acme", "tokens": tokens, "cached_tokens": None}
    assert await server.ok("POST", f"{CACHE}/warm", asked) == first  # what acme's prompts begin with is not told
    own = [await server.ok("POST", f"{CACHE}/warm", {**asked, "tenant": tenant}) for tenant in ("ops", None)]
    assert own[0] == {**first, "tenant": "ops", "cached_tokens": 0}
    assert own[1] == {**first, "tenant": "ops", "cached_tokens": own[1]["cached_tokens"]}
    assert 0 < own[1]["cached_tokens"] < tokens
    keys = {}
    for tenant in ("acme", "other"):
        made = await server.ok("POST", "/v1/admin/api-keys", {"name": tenant, "tenant": tenant, "roles": ["user"]})
        keys[tenant] = made["key"]
    completion = {"model": "fake", "prompt": prefix + "Hi", "max_tokens": 1}
    found = {
        tenant: (await server.ok("POST", "/v1/completions", completion, key=key))["usage"]["prompt_tokens_details"]
        for tenant, key in keys.items()
    }
    assert found["acme"]["cached_tokens"] >= own[1]["cached_tokens"]
    assert found["other"]["cached_tokens"] == 0
    [shown] = [model for model in (await server.ok("GET", CACHE))["data"] if model["model"] == "fake"]
    assert (shown["enabled"], shown["hits"], shown["misses"], shown["hit_rate"]) == (True, 3, 3, 0.5)
    assert shown["matched_tokens"] == 2 * own[1]["cached_tokens"] + found["acme"]["cached_tokens"]
    assert "cache.warmed" in server.audit.names()
    assert "helpful" not in str(server.audit.events)


async def test_warming_for_another_tenant_is_the_callers_own_use(server: Administered) -> None:
    warm = {"model": "fake", "prompt": "x" * 64, "tenant": "acme"}
    table = {"tenants": {"acme": {"rpm": 1}, "ops": {"rpm": 2}}}
    await server.ok("PUT", "/v1/admin/limits", table, match="0")
    answers = [await server.ask("POST", f"{CACHE}/warm", warm) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    acme = await server.ok("POST", "/v1/admin/api-keys", {"name": "acme", "tenant": "acme", "roles": ["user"]})
    assert (await server.ask("POST", "/v1/chat/completions", HELLO, key=acme["key"])).status_code == 200


async def test_messages_are_warmed_as_a_chat_reads_them(server: Administered) -> None:
    system = {"role": "system", "content": "Be brief. " * 10}
    warm = {"model": "fake", "messages": [system, {"role": "user", "content": "x"}]}
    await server.ok("POST", f"{CACHE}/warm", warm)
    chat = {**HELLO, "messages": [system, {"role": "user", "content": "Hello"}]}
    made = await server.ok("POST", "/v1/admin/api-keys", {"name": "ops", "tenant": "ops", "roles": ["user"]})
    usage = (await server.ok("POST", "/v1/chat/completions", chat, key=made["key"]))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 96  # the caller's own tenant, without naming it


async def test_warming_is_refused_as_a_request_would_be(server: Administered) -> None:
    refused(await server.ask("POST", f"{CACHE}/warm", {"prompt": "x", "messages": []}), 400, None)
    refused(await server.ask("POST", f"{CACHE}/warm", {"model": "fake"}), 400, None, "exactly one")
    refused(await server.ask("POST", f"{CACHE}/warm", {"prompt": "x", "model": "none"}), 404, "model_not_found")
    refused(await server.ask("POST", f"{CACHE}/warm", {"prompt": "x" * 5000}), 400, "context_length_exceeded")
    refused(await server.ask("POST", f"{CACHE}/warm", {"prompt": "x", "tenant": "a/b"}), 400, None, "tenant")
    refused(await server.ask("POST", f"{CACHE}/warm", {"tokens": [1], "block_table": [1]}), 400, None, "Unknown parameter")
