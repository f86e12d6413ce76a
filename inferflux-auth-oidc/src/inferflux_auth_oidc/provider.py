"""The auth provider `oidc`: who holds an access token.

three parts of base64url, issuer with jwt on   -> header, issuer, key, signature, claims, typ, client   (`_Issuer.check`)
five parts                                     -> refused, encrypted for somebody else
anything else                                  -> the one issuer with introspection, if there is one
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping

from inferflux_auth_oidc.claim_checks import check_claims, check_client
from inferflux_auth_oidc.compact_token import CompactToken, check_length, has_jwe_form, has_jwt_form, take_apart
from inferflux_auth_oidc.discovery import Discovery
from inferflux_auth_oidc.introspection import Introspection
from inferflux_auth_oidc.issuer_http import IssuerHttp
from inferflux_auth_oidc.key_cache import KeyCache
from inferflux_auth_oidc.principals import PrincipalMap
from inferflux_auth_oidc.refusal import Refusal, Unavailable
from inferflux_auth_oidc.settings import IssuerSettings, OidcSettings
from inferflux_auth_oidc.signing_keys import SignatureCheck
from inferflux_core.errors import AccessUnavailableError, AuthenticationError, ConfigError
from inferflux_core.identity import ACTIONS, AuthContext, AuthProvider, Principal

logger = logging.getLogger("inferflux.oidc")

# Those are the keys' provider's, whatever is wrong with them: `access.key_format.PREFIX` of inferflux-core, which is its own.
_API_KEY_PREFIX = "ifx_"
_ACCESS_TOKEN_TYPES = frozenset({"at+jwt", "application/at+jwt"})
_ID_TOKEN_CLAIMS = frozenset({"nonce", "at_hash", "c_hash"})
_B64TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, what a bearer token may consist of


class _Issuer:
    """One configured issuer: its keys, its rules, and what its claims mean here."""

    def __init__(
        self,
        settings: IssuerSettings,
        context: AuthContext,
        http: IssuerHttp,
        timeout: float,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        audiences = settings.audiences or (() if context.resource is None else (context.resource,))
        if not audiences:
            raise ConfigError(
                f"the issuer {settings.issuer!r} of auth provider 'oidc' has no audience, so tokens for any service would do: "
                f"set its `audiences`, or `server.public_url`"
            )
        self.settings = settings
        self._audiences = frozenset(audiences)
        self._now = now
        self._signatures = SignatureCheck(settings.algorithms)
        self._principals = PrincipalMap(settings)
        discovery = Discovery(settings.issuer, http, monotonic)
        self.keys = KeyCache(settings, http, discovery, monotonic=monotonic, count=context.count)
        self.introspection: Introspection | None = None
        if settings.introspection is not None:
            self.introspection = Introspection(
                settings,
                settings.introspection,
                self._audiences,
                http,
                discovery,
                timeout=timeout,
                now=now,
                monotonic=monotonic,
                count=context.count,
            )

    async def check(self, token: CompactToken) -> Principal:
        """Who holds a token that names this issuer.

        Raises:
            Refusal: it proves nothing, with the reason.
            Unavailable: the issuer's keys cannot be had now.
        """
        if token.algorithm not in self.settings.algorithms:
            raise Refusal("token_algorithm")
        self._signatures.check(token, await self.keys.find(token.key_id))
        claims = token.claims
        check_claims(claims, self.settings, self._audiences, self._now())
        self._check_type(token)
        check_client(claims, self.settings.clients)
        return self._principals.principal(claims)

    def _check_type(self, token: CompactToken) -> None:
        if self.settings.required_typ and token.type not in self.settings.required_typ:
            raise Refusal("token_type")
        if token.type not in _ACCESS_TOKEN_TYPES and not _ID_TOKEN_CLAIMS.isdisjoint(token.claims):
            raise Refusal("token_type")

    async def close(self) -> None:
        await self.keys.close()
        if self.introspection is not None:
            await self.introspection.close()


class OidcProvider(AuthProvider):
    """Decides about every credential that is not an API key.

    Args:
        now: Unix seconds, for the times in tokens.
        monotonic: seconds of a clock that never jumps, for caches.
    """

    def __init__(
        self,
        settings: OidcSettings,
        context: AuthContext,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Raises:
            ConfigError: an issuer without audience, or a file or secret that cannot be used.
        """
        self._settings = settings
        self._http = IssuerHttp(timeout=settings.timeout_s, ca_file=settings.ca_file, proxy=settings.proxy)
        self._issuers = {
            issuer.issuer: _Issuer(issuer, context, self._http, settings.timeout_s, now, monotonic)
            for issuer in settings.issuers
        }
        self._opaque = next((i.introspection for i in self._issuers.values() if i.introspection is not None), None)
        self._reads_jwt = any(issuer.jwt for issuer in settings.issuers)

    async def start(self) -> None:
        """Fetch the keys of every issuer. One that cannot be reached now is tried again when a token needs it."""
        wanted = [issuer.keys for issuer in self._issuers.values() if issuer.settings.jwt]
        fetches = [asyncio.create_task(keys.refresh()) for keys in wanted]
        if fetches:
            # Those that take longer go on; a slow issuer does not hold up the start.
            await asyncio.wait(fetches, timeout=self._settings.timeout_s)

    async def close(self) -> None:
        for issuer in self._issuers.values():
            await issuer.close()
        await self._http.close()

    def claims(self, credential: str) -> bool:
        return not credential.startswith(_API_KEY_PREFIX)

    def is_local(self, credential: str) -> bool:
        """True for JSON Web Tokens, unless it is their issuer's introspection that decides.

        An unknown key may have the keys fetched again; that is rare whoever asks, and tells the issuer nothing of the token.
        """
        if not self._reads_jwt or not has_jwt_form(credential):
            return False
        try:
            issuer = self._issuer_of(take_apart(credential))
        except Refusal:
            return True
        return issuer.settings.jwt

    async def authenticate(self, credential: str, address: str | None) -> Principal:
        try:
            return await self._authenticate(credential, address)
        except Refusal as refusal:
            raise AuthenticationError(refusal.reason) from None
        except Unavailable as unavailable:
            raise AccessUnavailableError(
                "The identity provider cannot be reached, so the access token cannot be checked. Please retry later.",
                retry_after=unavailable.retry_after,
            ) from None

    async def _authenticate(self, credential: str, address: str | None) -> Principal:
        check_length(credential)
        if has_jwe_form(credential):
            raise Refusal("token_encrypted")
        if self._reads_jwt and has_jwt_form(credential):
            token = take_apart(credential)
            issuer = self._issuer_of(token)
            if issuer.settings.jwt:
                return await issuer.check(token)
            assert issuer.introspection is not None  # the settings see to it
            return await issuer.introspection.principal(credential, address)
        if self._opaque is None or _B64TOKEN.fullmatch(credential) is None:
            raise Refusal("token_malformed")
        return await self._opaque.principal(credential, address)

    def _issuer_of(self, token: CompactToken) -> _Issuer:
        issuer = self._issuers.get(token.issuer) if isinstance(token.issuer, str) else None
        if issuer is None:
            raise Refusal("token_issuer")
        return issuer

    def metadata(self) -> Mapping[str, object]:
        scopes = {issuer.scope_of(action) for issuer in self._settings.issuers for action in ACTIONS}
        return {"authorization_servers": list(self._issuers), "scopes_supported": sorted(scopes)}
