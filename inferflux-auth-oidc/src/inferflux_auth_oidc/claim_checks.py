"""What the claims of a token must say before anyone is named by them. The same for tokens checked here and by introspection."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from inferflux_auth_oidc.refusal import Refusal
from inferflux_auth_oidc.settings import IssuerSettings

_LATEST = 253_402_300_800  # Unix seconds, the year 10000: no date that is later is meant
_MAX_SUBJECT = 255  # characters, OpenID Connect Core section 2


def check_claims(
    claims: Mapping[str, Any], issuer: IssuerSettings, audiences: Collection[str], now: float, *, iat_required: bool = True
) -> None:
    """Check types and values of `exp`, `nbf`, `iat`, `iss`, `aud` and `sub`; all but `nbf` are required.

    Args:
        audiences: values of `aud`, one of which must be there.
        now: Unix seconds.
        iat_required: whether `iat` must be there; introspection need not tell it.

    Raises:
        Refusal: `token_claims` for a wrong type or a missing claim; `token_expired`, `token_early`, `token_too_old`,
            `token_issuer`, `token_audience` for a wrong value; `token_bound` if it is only good together with a key.
    """
    leeway = issuer.leeway_s
    if now >= _date(claims, "exp") + leeway:
        raise Refusal("token_expired")
    if "nbf" in claims and _date(claims, "nbf") > now + leeway:
        raise Refusal("token_early")
    if iat_required or "iat" in claims:
        issued = _date(claims, "iat")
        if issued > now + leeway:
            raise Refusal("token_early")
        if issuer.max_token_age_s is not None and now - issued > issuer.max_token_age_s + leeway:
            raise Refusal("token_too_old")
    elif issuer.max_token_age_s is not None:
        raise Refusal("token_claims")
    if claims.get("iss") != issuer.issuer:
        raise Refusal("token_issuer")
    audience = claims.get("aud")
    values = audience if isinstance(audience, list) else [audience]
    if not values or not all(isinstance(value, str) for value in values):
        raise Refusal("token_claims")
    if not any(value in audiences for value in values):
        raise Refusal("token_audience")
    check_subject(claims.get("sub"))
    if claims.get("cnf") is not None:
        # Sender-constrained (RFC 7800): as a bearer token it is stolen, as far as this server can tell.
        raise Refusal("token_bound")


def check_subject(subject: object) -> str:
    """Returns the subject. Raises Refusal unless it is 1 to 255 printable characters."""
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT or not subject.isprintable():
        raise Refusal("token_claims")
    return subject


def check_client(claims: Mapping[str, Any], clients: Collection[str]) -> None:
    """Check that the token was issued to one of the clients; any will do if there are none.

    Raises:
        Refusal: `token_client`.
    """
    if not clients:
        return
    named = [claims[name] for name in ("azp", "client_id") if name in claims]
    if not named or not all(isinstance(client, str) and client in clients for client in named):
        raise Refusal("token_client")


def expiry(claims: Mapping[str, Any]) -> float:
    """`exp` of claims that were checked, in Unix seconds."""
    return _date(claims, "exp")


def _date(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519): a finite number, never a string, and `true` is no number."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LATEST:
        raise Refusal("token_claims")
    return float(value)
