"""The gate: nobody gets past it without a principal, whatever the URL is, except to the paths listed here.

It stands in front of the router, so that an unknown URL, a wrong method and a route that somebody forgot are answered alike
to strangers: 401. What a principal may do is checked behind it (`guard.py`, `Admission.find`).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from inferflux_core.access.services import METADATA_PATH, AccessServices
from inferflux_core.errors import AuthenticationError, InvalidRequestError, RequestError
from inferflux_core.serving.error_responses import error_reason, error_response
from inferflux_core.serving.exchange import Exchange

_PUBLIC_PATHS = frozenset({"/livez", "/readyz", METADATA_PATH})

_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
_CREDENTIAL_HEADERS = (b"authorization", b"x-api-key")


def is_public(path: str) -> bool:
    """Whether strangers may come to a path: probes, and what tells clients where to get a credential (RFC 9728)."""
    return path in _PUBLIC_PATHS or path.startswith(METADATA_PATH + "/")


class AccessGate:
    """ASGI middleware that finds out who asks and refuses strangers."""

    def __init__(self, app: ASGIApp, *, access: AccessServices) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its principal, or answer it."""
        exchange = Exchange.of(scope)
        admission = exchange.admission = self._access.admission
        if not is_public(scope["path"]):
            try:
                self._access.audit.check()
                credential = None if admission.open else self._credential(scope, exchange)
                exchange.principal = await admission.authenticate(credential, exchange.address)
            except RequestError as error:
                exchange.error = error_reason(error)
                if isinstance(error, AuthenticationError):
                    exchange.auth_failure = error.reason
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _credential(self, scope: Scope, exchange: Exchange) -> str | None:
        """The one credential of a request; None if it has none.

        Raises:
            InvalidRequestError: it has several: which one decides must not be a matter of order.
            AuthenticationError: it is not of a form that is known here.
        """
        found = [(name, value) for name, value in scope["headers"] if name in _CREDENTIAL_HEADERS]
        if len(found) > 1:
            raise InvalidRequestError(
                "The request has several credentials; send one 'Authorization: Bearer ...' or one 'x-api-key', not both.",
                code="multiple_credentials",
            )
        if not found:
            return None
        name, value = found[0]
        match = _BEARER.fullmatch(value if name == b"authorization" else b"bearer " + value)
        if match is None:
            error = AuthenticationError("malformed_header")
            self._access.admission.authentication_failed(error, exchange.address)
            raise error
        return match[1].decode("ascii")
