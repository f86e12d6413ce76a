"""A real, certified OpenID provider: its tokens are accepted, and what becomes of them when it rotates its keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux_auth_oidc.provider import OidcProvider
from inferflux_auth_oidc.settings import OidcSettings
from inferflux_core.errors import AuthenticationError
from inferflux_core.identity import AuthContext
from oidc.real_provider import RealProvider, real_provider

RESOURCE = "https://llm.example.com"


class Monotonic:
    """The clock of caches, put forward by hand; tokens live in real time."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture(scope="module")
def issuer() -> Iterator[RealProvider]:
    with real_provider("old") as provider:
        yield provider


def provider_for(issuer: RealProvider, resource: str, clock: Monotonic | None = None) -> OidcProvider:
    client_id, secret = issuer.introspection_client
    settings = OidcSettings.model_validate(
        {"issuers": [{"issuer": issuer.url, "introspection": {"client_id": client_id, "client_secret": secret}}]}
    )
    context = AuthContext(state_dir=Path("unused"), resource=resource, count=lambda event: None)
    return OidcProvider(settings, context, monotonic=clock or Monotonic())


@pytest.mark.parametrize("resource", [RESOURCE, RESOURCE + "/opaque"], ids=["jwt", "opaque"])
async def test_a_token_of_a_real_provider_says_who_holds_it(issuer: RealProvider, resource: str) -> None:
    token = issuer.client_credentials(resource, "infer:generate infer:admin")
    assert (token.count(".") == 2) == (resource == RESOURCE)
    provider = provider_for(issuer, resource)
    try:
        await provider.start()
        principal = await provider.authenticate(token, None)
        assert (principal.subject, principal.tenant, principal.roles) == (f"user:{issuer.url}|svc", "t1", {"user"})
        assert principal.scopes == {"generate", "admin"}
        with pytest.raises(AuthenticationError) as caught:
            await provider.authenticate(issuer.client_credentials(RESOURCE + "/other"), None)
        assert caught.value.reason == "token_audience"
        # Asked of the issuer or not, another signature or another name of a token is nobody's.
        with pytest.raises(AuthenticationError):
            await provider.authenticate(token[:-6] + "AAAAAA", None)
    finally:
        await provider.close()


async def test_a_real_rotation(issuer: RealProvider) -> None:
    clock = Monotonic()
    provider = provider_for(issuer, RESOURCE, clock)
    try:
        issuer.restart(keys="old")
        old = issuer.client_credentials(RESOURCE)
        assert (await provider.authenticate(old, None)).scopes == {"generate"}
        issuer.restart(keys="old+new")
        new = issuer.client_credentials(RESOURCE)
        assert (await provider.authenticate(new, None)).scopes == {"generate"}
        assert (await provider.authenticate(old, None)).scopes == {"generate"}
        issuer.restart(keys="new")
        clock.time += 3601  # beyond any TTL
        with pytest.raises(AuthenticationError) as caught:
            await provider.authenticate(old, None)
        assert caught.value.reason == "token_key"
        assert (await provider.authenticate(new, None)).scopes == {"generate"}
    finally:
        await provider.close()
