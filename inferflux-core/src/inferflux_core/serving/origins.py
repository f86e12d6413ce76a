"""The `Origin` header: which web pages may call this server (Fetch standard, sections 3.2 and 4.10).

A browser lets any page send requests to any address, this machine's own included. It only keeps the reply from the page. So
a request that a page of somewhere else made is refused before it can do anything, and a reply can be read by pages of this
server and of the origins in `server.allowed_origins`, by nobody else. There is no wildcard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferflux_core.errors import ConfigError, ForbiddenError
from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.exchange import Exchange

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.ASCII)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

PREFLIGHT_SECONDS = 600
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    # Named one by one: `*` would not cover Authorization, and what is not listed no page has to send. The x-stainless ones
    # are those of OpenAI's and Anthropic's JavaScript clients.
    "Access-Control-Allow-Headers": "authorization, content-type, accept, idempotency-key, if-match, x-api-key, x-request-id, "
    "anthropic-beta, anthropic-dangerous-direct-browser-access, anthropic-version, openai-organization, openai-project, "
    "x-stainless-arch, x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, "
    "x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout",
    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
}
_EXPOSED_HEADERS = (
    "etag, openai-processing-ms, retry-after, www-authenticate, x-request-id, x-should-retry, x-ratelimit-limit-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, "
    "x-ratelimit-reset-tokens"
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request comes from, as far as the browser says.

    Attributes:
        refused: why it is refused, for people; None if it is not.
        cors_origin: the listed foreign origin that may read the reply; None for this server's own pages and for programs.
    """

    refused: str | None = None
    cors_origin: str | None = None


class OriginCheck:
    """Decides by `Origin`, and by `Sec-Fetch-Site` where a browser sent no `Origin`."""

    def __init__(self, allowed_origins: Iterable[str] = (), public_url: str | None = None) -> None:
        """Args:
            allowed_origins: `server.allowed_origins`.
            public_url: `server.public_url`: pages of it are this server's own, behind a proxy that ends TLS.

        Raises:
            ConfigError: an origin that no browser sends, so that it would never match.
        """
        self._allowed = {_configured(origin, "server.allowed_origins") for origin in allowed_origins}
        self._own: str | None = None
        if public_url is not None:
            url = urlsplit(public_url)
            self._own = _configured(f"{url.scheme}://{url.netloc}", "server.public_url")

    def caller(self, scope: Scope) -> Caller:
        """Who made a request whose `Host` was checked already."""
        origins: list[bytes] = []
        host = fetch_site = b""
        for name, value in scope["headers"]:
            if name == b"origin":
                origins.append(value)
            elif name == b"host":
                host = value
            elif name == b"sec-fetch-site":
                fetch_site = value
        if not origins:
            if fetch_site in (b"cross-site", b"same-site") and scope["method"] not in _SAFE_METHODS:
                return Caller(refused="A web page of another origin made this request and hid which; it is not answered.")
            return Caller()
        origin = _normal(origins[0].decode("latin-1"))
        if len(origins) == 1 and origin is not None:
            if origin in self._allowed:
                return Caller(cors_origin=origins[0].decode("latin-1"))
            if origin == self._own or origin == _normal(f"{scope['scheme']}://{host.decode('latin-1')}"):
                return Caller()
        return Caller(
            refused=f"Web pages of {origins[0][:100].decode('latin-1')!r} may not call this server; if they shall, add the "
            "origin to server.allowed_origins."
        )


class OriginGuard:
    """ASGI middleware that refuses pages of foreign origins, and answers preflight requests of listed ones.

    Stands inside `RequestEnvelope` and in front of the access gate: a preflight request never has a credential.
    """

    def __init__(self, app: ASGIApp, *, check: OriginCheck) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = self._check.caller(scope)
        if caller.refused is not None:
            error = ForbiddenError(caller.refused, code="origin_not_allowed")
            Exchange.of(scope).error = error.code
            await json_response(msgspec.json.encode(error.body()), error.status)(scope, receive, send)
        elif caller.cors_origin is None:
            await self._app(scope, receive, send)
        else:
            send = _readable_by(caller.cors_origin, send)
            if scope["method"] == "OPTIONS" and any(name == b"access-control-request-method" for name, _ in scope["headers"]):
                await json_response(b"", 204, _PREFLIGHT_HEADERS)(scope, receive, send)
            else:
                await self._app(scope, receive, send)


def _readable_by(origin: str, send: Send) -> Send:
    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
            headers.add_vary_header("Origin")
            message = {**message, "headers": headers.raw}
        await send(message)

    return send_with_cors


def _normal(origin: str) -> str | None:
    """An origin without the port that its scheme implies; None if it is not one, such as `null`."""
    origin = origin.lower()
    if _ORIGIN.fullmatch(origin) is None:
        return None
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition(":")[0], "\0"))


def _configured(origin: str, setting: str) -> str:
    normal = _normal(origin)
    if normal is None:
        raise ConfigError(
            f"{setting}: {origin!r} is not an origin; write scheme and host, and the port if it is not the usual one, without "
            "a path, such as 'https://chat.example.com'. There is no wildcard, and 'null' is any sandboxed page."
        )
    return normal
