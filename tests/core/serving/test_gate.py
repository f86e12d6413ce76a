"""Nobody gets past the gate without a principal, and nothing behind it without the permission that the route names."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from core.serving.guarded import Badges, guarded_stand
from core.serving.scripted import CHAT, Stand, stand
from inferflux_core.errors import AuthenticationError
from inferflux_core.serving.app import check_routes
from inferflux_core.serving.guard import GuardedRoute, public

UNAUTHORIZED = {
    "error": {
        "message": "The request has no valid credential. Send an API key or an access token as 'Authorization: Bearer ...'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
}


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[tuple[Stand, Badges, httpx.AsyncClient]]:
    there, badges = guarded_stand(tmp_path)
    async with there.client() as client:
        yield there, badges, client
    await there.access.close()


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer badge-{name}"}


Behind = tuple[Stand, Badges, httpx.AsyncClient]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic YWxpY2U6c2VjcmV0")],
        [("authorization", "Bearer\tbadge-alice")],
        [("authorization", "badge-alice")],
        [("authorization", "Bearer badge-alice, Bearer badge-alice")],
        [("authorization", "Bearer badge-stranger")],
        [("authorization", "Bearer something-else")],
        [("authorization", "Bearer badge-late")],
        [("x-api-key", "badge-stranger")],
        [("x-api-key", "")],
        [("x-api-key", "badge alice")],
        [("cookie", "authorization=Bearer badge-alice")],
    ],
)
async def test_strangers_are_all_told_the_same(behind: Behind, headers: list[tuple[str, str]]) -> None:
    reply = await behind[2].post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (reply.status_code, reply.json()) == (401, UNAUTHORIZED)
    sent = any(name != "cookie" for name, _ in headers)
    assert reply.headers["www-authenticate"] == ('Bearer error="invalid_token"' if sent else "Bearer")
    assert behind[0].pipeline.requests == []


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "badge-alice"}, *({"authorization": f"{w} badge-alice"} for w in ("bearer", "BEARER", "Bearer "))]
)
async def test_who_has_a_credential_gets_in(behind: Behind, headers: dict[str, str]) -> None:
    reply = await behind[2].post("/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.status_code == 200
    context, _ = behind[0].pipeline.requests[0]
    assert (context.principal.subject, context.principal.tenant) == ("user:house|alice", "acme")


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer badge-alice"), ("authorization", "Bearer badge-alice")],
        [("authorization", "Bearer badge-alice"), ("x-api-key", "badge-alice")],
        [("x-api-key", "badge-alice"), ("x-api-key", "badge-admin")],
    ],
)
async def test_two_credentials_are_one_too_many(behind: Behind, headers: list[tuple[str, str]]) -> None:
    reply = await behind[2].get("/v1/models", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "multiple_credentials")
    assert behind[1].asked == []


@pytest.mark.parametrize("badge", ["down", "crash", "nobody", "unmarked"])
async def test_what_cannot_be_found_out_is_no_yes(behind: Behind, badge: str, caplog: pytest.LogCaptureFixture) -> None:
    reply = await behind[2].get("/v1/models", headers=bearer(badge))
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "auth_unavailable")
    assert int(reply.headers["retry-after"]) >= 1
    assert "badge-crash" not in caplog.text


async def test_strangers_learn_nothing_from_urls_and_methods(behind: Behind) -> None:
    replies = [
        await behind[2].request(method, path)
        for method, path in [
            ("GET", "/no/such/url"),
            ("GET", "/v1/admin/api-keys"),
            ("DELETE", "/v1/models"),
            ("GET", "/openapi.json"),
            ("GET", "/healthz"),
            ("GET", "/metrics"),
            ("GET", "//v1/models"),
            ("GET", "/v1/../livez/../v1/models"),
            ("GET", "/livez/"),
            ("GET", "/LIVEZ"),
            ("GET", "/livez;x"),
        ]
    ]
    assert [(r.status_code, r.json()) for r in replies] == [(401, UNAUTHORIZED)] * len(replies)


async def test_every_route_and_method_wants_a_credential(behind: Behind) -> None:
    """Attack list, item 9: the list is made from the application itself."""
    well_known = "/.well-known/oauth-protected-resource"
    open_to_all = {("GET", path) for path in ("/livez", "/readyz", well_known, well_known + "/{path:path}")}
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
    seen = set()
    for route in behind[0].routes():
        for method in methods:
            url = re.sub(r"\{.*?\}", "tiny", route.path)
            reply = await behind[2].request(method, url)
            if (method, route.path) in open_to_all:
                seen.add((method, route.path))
                assert reply.status_code in (200, 404)
            elif ("GET", route.path) in open_to_all:
                assert reply.status_code == 405
            else:
                assert (reply.status_code, method, url) == (401, method, url)
    assert seen == open_to_all


async def test_a_route_that_does_not_say_who_may_call_it_cannot_be_registered() -> None:
    router = APIRouter(route_class=GuardedRoute)

    async def forgotten() -> None: ...

    with pytest.raises(TypeError, match="does not say who may call it"):
        router.get("/v1/forgotten")(forgotten)


async def test_the_application_refuses_unguarded_and_wrongly_public_routes() -> None:
    app = stand().app
    check_routes(app)

    @app.get("/plain")
    async def plain() -> None: ...

    with pytest.raises(TypeError, match="'/plain' is not a GuardedRoute"):
        check_routes(app)
    app = stand().app
    router = APIRouter(route_class=GuardedRoute)
    router.get("/v1/oops")(public(plain))
    app.router.routes += router.routes
    with pytest.raises(TypeError, match="'/v1/oops' is public, but the gate"):
        check_routes(app)


@pytest.mark.parametrize(
    ("badge", "path", "status", "code"),
    [
        ("alice", "/metrics", 200, None),
        ("alice", "/healthz", 200, None),
        ("alice", "/openapi.json", 200, None),
        ("admin", "/metrics", 200, None),
        ("embedder", "/metrics", 403, "insufficient_scope"),
        ("nothing", "/healthz", 403, "insufficient_scope"),
        ("only-tiny", "/metrics", 403, "policy_denied"),
        ("nothing", "/openapi.json", 403, "insufficient_scope"),
        ("alice", "/no/such/url", 404, None),
    ],
)
async def test_scopes_of_the_operations_routes(behind: Behind, badge: str, path: str, status: int, code: str | None) -> None:
    reply = await behind[2].get(path, headers=bearer(badge))
    assert reply.status_code == status
    if status != 200:
        assert reply.json()["error"]["code"] == code
    if code == "insufficient_scope":
        assert reply.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="read"'


async def test_models_are_listed_for_who_may_see_them(behind: Behind) -> None:
    async def names(badge: str) -> list[str]:
        reply = await behind[2].get("/v1/models", headers=bearer(badge))
        return [model["id"] for model in reply.json()["data"]]

    assert await names("alice") == ["tiny", "secret"]
    assert await names("only-tiny") == ["tiny"]
    assert await names("embedder") == ["tiny", "secret"]
    assert await names("nothing") == []
    health = await behind[2].get("/healthz", headers=bearer("only-tiny"))
    assert [model["name"] for model in health.json()["models"]] == ["tiny"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/{}", None),
        ("POST", "/tokenize", {"model": "{}", "prompt": "x"}),
        ("POST", "/detokenize", {"model": "{}", "tokens": [1]}),
        ("POST", "/apply-template", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
@pytest.mark.parametrize("hidden", ["secret", "hidden"])
async def test_hidden_and_missing_models_are_indistinguishable(
    behind: Behind, method: str, path: str, body: dict[str, Any] | None, hidden: str
) -> None:
    async def ask(name: str, badge: str) -> httpx.Response:
        json = None if body is None else {**body, "model": name}
        return await behind[2].request(method, path.format(name), json=json, headers=bearer(badge))

    assert (await ask(hidden, "alice")).status_code == 200
    there, missing = await ask(hidden, "only-tiny"), await ask("absent", "only-tiny")
    assert there.status_code == missing.status_code == 404
    assert there.text.replace(hidden, "absent") == missing.text
    drop = {"x-request-id", "openai-processing-ms", "content-length"}
    assert {k: v for k, v in there.headers.items() if k not in drop} == {
        k: v for k, v in missing.headers.items() if k not in drop
    }


async def test_probes_need_nothing_and_name_no_model(behind: Behind) -> None:
    assert (await behind[2].get("/livez")).json() == {"status": "alive"}
    assert (await behind[2].get("/readyz")).json() == {"status": "ready", "models": []}
    assert behind[1].asked == []


async def test_after_too_many_failures_an_address_waits_but_its_known_credentials_do_not(tmp_path: Path) -> None:
    there, badges = guarded_stand(tmp_path, auth={"max_failures_per_minute": 3})
    async with there.client() as client:
        assert (await client.get("/v1/models", headers=bearer("alice"))).status_code == 200
        assert [(await client.get("/v1/models", headers=bearer(f"x{i}"))).status_code for i in range(4)] == [401] * 3 + [429]
        asked = len(badges.asked)
        reply = await client.get("/v1/models", headers={"authorization": "Bearer asked-viewer"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(reply.headers["retry-after"]) >= 1
        assert len(badges.asked) == asked, "somebody else was asked about a credential while its address had to wait"
        # What is decided here is looked at all the same: a neighbour behind the same address locks nobody out.
        assert (await client.get("/v1/models", headers=bearer("viewer"))).status_code == 200
        assert (await client.get("/v1/models", headers=bearer("alice"))).status_code == 200
        # Nothing was tried without a credential, so that is no failure, and the answer stays the same.
        assert [(await client.get("/v1/models")).status_code for _ in range(5)] == [401] * 5
    assert there.sample('inferflux_auth_failures_total{reason="unknown_badge"}') == 4
    assert there.sample('inferflux_rate_limited_total{kind="failures"}') == 2
    await there.access.close()


async def test_a_credential_that_is_good_no_longer_counts_like_any_other(tmp_path: Path) -> None:
    there, badges = guarded_stand(tmp_path, auth={"max_failures_per_minute": 3})
    badges.principals = dict(badges.principals)
    async with there.client() as client:
        assert (await client.get("/v1/models", headers=bearer("alice"))).status_code == 200
        del badges.principals["alice"]
        statuses = [(await client.get("/v1/models", headers=bearer("alice"))).status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    await there.access.close()


async def test_without_a_provider_everyone_may_use_and_nobody_administer() -> None:
    there = stand()
    async with there.client() as client:
        assert (await client.get("/v1/models", headers={"authorization": "Bearer sk-whatever"})).status_code == 200
        context = (await client.post("/v1/chat/completions", json=CHAT)).status_code, there.pipeline.requests[0][0].principal
        assert context[0] == 200
        assert (context[1].subject, context[1].tenant) == ("anonymous", "default")
        for method, path in [("GET", "/v1/admin/api-keys"), ("POST", "/v1/admin/models"), ("GET", "/v1/admin/config")]:
            reply = await client.request(method, path, json={})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope"), path


async def test_an_authentication_error_never_tells_its_reason() -> None:
    assert "reason" not in str(AuthenticationError("expired_key").body())
    assert "expired" not in str(AuthenticationError("expired_key"))
