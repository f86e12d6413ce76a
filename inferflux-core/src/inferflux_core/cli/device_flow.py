"""The device authorization grant (RFC 8628) and what follows it: refreshing (RFC 6749) and revoking (RFC 7009) tokens.

Ours is a public client: it has an id and no secret. ID tokens that come along are not looked at: nothing here depends on who
the user is, and the server checks the access token itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inferflux_core.cli.api_errors import ApiError, printable
from inferflux_core.cli.oauth_discovery import Issuer
from inferflux_core.cli.oauth_http import OAuthError, checked_url, is_loopback, post_form

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DEFAULT_INTERVAL_S = 5.0
SLOW_DOWN_S = 5.0
MAX_INTERVAL_S = 60.0
"""Longest pause between two questions while the provider fails to answer."""
MAX_SECONDS = 1e9
"""A lifetime or interval beyond this, some thirty years, is a mistake, and is read as not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCode:
    """A login that waits for its user. `expires_in` and `interval` are in seconds."""

    device_code: str = field(repr=False)
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_in: float
    interval: float = DEFAULT_INTERVAL_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What the token endpoint gave. None: not told, or for the refresh token that there is no new one."""

    access_token: str = field(repr=False)
    expires_in: float | None
    refresh_token: str | None = field(default=None, repr=False)
    scope: str | None = None


def begin(issuer: Issuer, *, client_id: str, scope: str, resource: str) -> DeviceCode:
    """Asks for a code that the user confirms elsewhere.

    Raises:
        ApiError: the provider refuses, cannot be reached, or has no device login.
    """
    if issuer.device_authorization is None:
        raise ApiError(
            f"{issuer.issuer} has no device login (RFC 8628). Give an API key with --api-key", code="no_device_login"
        )
    answer = post_form(issuer.device_authorization, {"client_id": client_id, "scope": scope, "resource": resource})
    device_code, user_code = answer.get("device_code"), answer.get("user_code")
    expires_in = _seconds(answer.get("expires_in"))
    if not isinstance(device_code, str) or not isinstance(user_code, str) or not user_code or expires_in is None:
        raise ApiError(f"{issuer.issuer} answered the device login without a code or its lifetime")
    local = is_loopback(issuer.issuer)
    complete = answer.get("verification_uri_complete")
    return DeviceCode(
        device_code=device_code,
        user_code=printable(user_code).strip()[:64],
        # A browser is sent there: never to a file, a script or a program that another scheme would start.
        verification_uri=checked_url(answer.get("verification_uri"), "the address to log in at", local=local),
        verification_uri_complete=None if complete is None else checked_url(complete, "the address to log in at", local=local),
        expires_in=expires_in,
        interval=_seconds(answer.get("interval")) or DEFAULT_INTERVAL_S,
    )


def wait_for_tokens(
    issuer: Issuer,
    code: DeviceCode,
    *,
    client_id: str,
    resource: str,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> Tokens:
    """Asks at the interval that the provider wants until the user has decided.

    Args:
        clock: seconds of a clock that only goes forward.

    Raises:
        ApiError: with code `expired_token` or `access_denied`, or what else the provider says.
    """
    form = {"grant_type": DEVICE_GRANT, "device_code": code.device_code, "client_id": client_id, "resource": resource}
    deadline = clock() + code.expires_in
    interval = code.interval
    while clock() < deadline:
        sleep(min(interval, deadline - clock()))
        try:
            return _tokens(issuer, post_form(issuer.token, form))
        except OAuthError as error:
            if error.code == "slow_down":
                interval += SLOW_DOWN_S
            elif error.code == "access_denied":
                raise ApiError(f"the login was denied at {issuer.issuer}", status=error.status, code=error.code) from error
            elif error.code == "expired_token":
                break
            elif error.code != "authorization_pending":
                raise
        except ApiError as error:
            if error.status is not None and error.status < 500 and error.status != 429:
                raise
            interval = min(2 * interval, max(interval, MAX_INTERVAL_S))  # RFC 8628, section 3.5: back off
    raise ApiError("the code expired before the login was confirmed. Start again with: inferctl login", code="expired_token")


def refresh(issuer: Issuer, refresh_token: str, *, client_id: str, resource: str) -> Tokens:
    """New tokens for a refresh token, which is used up by that where the provider rotates them.

    Raises:
        OAuthError: the provider refuses; `invalid_grant` means that the login is over.
        ApiError: it cannot be reached.
    """
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": client_id, "resource": resource}
    return _tokens(issuer, post_form(issuer.token, form))


def revoke(issuer: Issuer, token: str, hint: str, *, client_id: str) -> bool:
    """Makes a token invalid, and with a refresh token what was got with it. False if the provider cannot do that.

    Args:
        hint: `refresh_token` or `access_token`.

    Raises:
        ApiError: the provider refuses or cannot be reached.
    """
    if issuer.revocation is None:
        return False
    post_form(issuer.revocation, {"token": token, "token_type_hint": hint, "client_id": client_id})
    return True


def _tokens(issuer: Issuer, answer: dict[str, Any]) -> Tokens:
    access, refresh_token, scope = answer.get("access_token"), answer.get("refresh_token"), answer.get("scope")
    kind = answer.get("token_type")
    usable = isinstance(access, str) and access.isascii() and access.isprintable() and access and " " not in access
    if not usable or not isinstance(kind, str) or kind.lower() != "bearer":
        raise ApiError(f"{issuer.issuer} answered without a bearer token that can be sent", status=200, code="no_token")
    assert isinstance(access, str)
    return Tokens(
        access_token=access,
        expires_in=_seconds(answer.get("expires_in")),
        refresh_token=refresh_token if isinstance(refresh_token, str) and refresh_token else None,
        scope=printable(scope) if isinstance(scope, str) else None,
    )


def _seconds(value: object) -> float | None:
    """A positive number of seconds; some providers write it as text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_SECONDS:
        return None
    return float(value)
