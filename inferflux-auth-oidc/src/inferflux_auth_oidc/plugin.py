"""Registers the auth provider `oidc`. Imports in milliseconds: joserfc and httpx only when it is configured."""

from __future__ import annotations

from collections.abc import Iterable

from inferflux_auth_oidc.settings import OidcSettings
from inferflux_core.hookspecs import hookimpl
from inferflux_core.identity import AuthContext, AuthProvider
from inferflux_core.interfaces import Registration


def _make(settings: OidcSettings, context: AuthContext) -> AuthProvider:
    from inferflux_auth_oidc.provider import OidcProvider

    return OidcProvider(settings, context)


@hookimpl
def inferflux_auth_providers() -> Iterable[Registration[AuthProvider]]:
    return [
        Registration(
            name="oidc",
            factory=_make,
            settings=OidcSettings,
            summary="access tokens of OpenID Connect providers, JSON Web Tokens and opaque ones",
        )
    ]
