"""What claims become: subject, tenant, scopes, roles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inferflux_core.identity import Principal
from oidc.checked import checking
from oidc.hostile_provider import HostileProvider, hostile_provider
from oidc.tokens import NOW, RESOURCE, token


@pytest.fixture(scope="module")
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


async def principal(issuer: HostileProvider, settings: dict[str, Any], **changes: Any) -> Principal:
    async with checking({"issuer": issuer.url, **settings}) as checked:
        return await checked.principal(token(issuer.url, **changes))


async def test_a_principal_has_what_the_token_says_and_nothing_more(issuer: HostileProvider) -> None:
    assert await principal(issuer, {}, preferred_username="Alice") == Principal(
        subject=f"user:{issuer.url}|alice",
        tenant="t1",
        method="oidc",
        scopes=frozenset({"generate"}),
        scope_prefix="infer:",
        roles=frozenset({"user"}),
        models=None,
        limits=None,
        priority=0,
        expires_at=NOW + 600 + 30,
        name="Alice",
    )


@pytest.mark.parametrize(
    ("settings", "changes", "scopes"),
    [
        ({}, {"scope": ...}, set()),
        ({}, {"scope": ""}, set()),
        ({}, {"scope": "openid generate Infer:generate infer:Generate infer:other infer: infer:generate,infer:admin"}, set()),
        ({}, {"scope": "infer:generate infer:embed infer:read infer:admin"}, {"generate", "embed", "read", "admin"}),
        ({}, {"scope": ["infer:embed", "infer:generate infer:admin"]}, {"embed"}),
        ({"claims": {"scope": "scp"}}, {"scp": ["infer:read"]}, {"read"}),
        ({"scope_prefix": ""}, {"scope": "generate infer:admin"}, {"generate"}),
        ({"scope_prefix": "api://llm/"}, {"scope": "api://llm/embed"}, {"embed"}),
    ],
)
async def test_scopes(issuer: HostileProvider, settings: dict[str, Any], changes: dict[str, Any], scopes: set[str]) -> None:
    assert (await principal(issuer, settings, **changes)).scopes == scopes


@pytest.mark.parametrize(
    ("settings", "changes", "roles"),
    [
        ({}, {"roles": ...}, set()),
        ({}, {"roles": "user  auditor"}, {"user", "auditor"}),
        ({}, {"roles": ["user", "two words", ""]}, {"user", "two words"}),
        ({"roles": {"grp-llm": "user"}}, {"roles": ["grp-llm", "admin"]}, {"user"}),
        ({"claims": {"roles": "https://example.com/roles"}}, {"https://example.com/roles": ["a"]}, {"a"}),
        ({"claims": {"roles": "/realm_access/roles"}}, {"realm_access": {"roles": ["a"]}}, {"a"}),
        ({"claims": {"roles": "/realm_access/roles"}}, {"realm_access": ["roles"]}, set()),
        ({"claims": {"roles": "/a~1b/~0c"}}, {"a/b": {"~c": ["x"]}}, {"x"}),
    ],
)
async def test_roles(issuer: HostileProvider, settings: dict[str, Any], changes: dict[str, Any], roles: set[str]) -> None:
    assert (await principal(issuer, settings, **changes)).roles == roles


@pytest.mark.parametrize(
    ("settings", "changes", "tenant"),
    [
        ({}, {"tenant": ...}, "default"),
        ({"default_tenant": "other"}, {"tenant": ...}, "other"),
        ({"claims": {"tenant": "tid"}}, {"tid": "9f3c.A_b-1"}, "9f3c.A_b-1"),
        ({"allowed_tenants": ["t1", "t2"], "default_tenant": None}, {"tenant": "t2"}, "t2"),
    ],
)
async def test_tenants(issuer: HostileProvider, settings: dict[str, Any], changes: dict[str, Any], tenant: str) -> None:
    assert (await principal(issuer, settings, **changes)).tenant == tenant


@pytest.mark.parametrize("name", [..., 7, "a\nb", "x" * 129, ["a"]])
async def test_a_name_that_cannot_be_shown_is_left_out(issuer: HostileProvider, name: object) -> None:
    assert (await principal(issuer, {}, preferred_username=name)).name == ""


async def test_the_subject_may_be_another_claim(issuer: HostileProvider) -> None:
    found = await principal(issuer, {"claims": {"subject": "oid"}}, oid="a|b")
    assert found.subject == f"user:{issuer.url}|a|b"
    async with checking({"issuer": issuer.url, "claims": {"subject": "oid"}}) as checked:
        assert await checked.verdict(token(issuer.url)) == "token_claims"


async def test_the_token_expires_with_the_leeway(issuer: HostileProvider) -> None:
    found = await principal(issuer, {"leeway_s": 5, "audiences": ["a", RESOURCE]}, exp=NOW + 1)
    assert found.expires_at == NOW + 6
