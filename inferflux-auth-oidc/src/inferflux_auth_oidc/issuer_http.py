"""HTTP to issuers: small, quick, to where it was configured, or not at all."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from inferflux_auth_oidc.strict_json import parse_object
from inferflux_core.errors import ConfigError

MAX_BODY = 1024 * 1024  # bytes
_CONNECTIONS = 8  # at most 4 introspections and a refresh of keys at a time


class FetchError(Exception):
    """An issuer did not answer as it should.

    Attributes:
        status: HTTP status of the reply; None if there was none or it was a 200 that is no use.
        code: what a 400 gave as its `error` (RFC 6749, section 5.2), to compare with and not to show; empty without one.
    """

    def __init__(self, reason: str, status: int | None = None, code: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Reply:
    """A JSON object that an issuer answered with.

    Attributes:
        cache_control: the header `Cache-Control`; empty if there is none.
    """

    body: dict[str, Any]
    cache_control: str


class IssuerHttp:
    """A client that follows no redirect, sends no cookie, reads no more than 1 MiB and waits no longer than it was told."""

    def __init__(self, *, timeout: float, ca_file: Path | None = None, proxy: SecretStr | None = None) -> None:
        """
        Raises:
            ConfigError: the file of authorities or the proxy cannot be used.
        """
        self._timeout = timeout
        try:
            context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"auth.settings.oidc.ca_file {str(ca_file)!r} cannot be read: {error}; name a PEM file") from None
        try:
            self._client = httpx.AsyncClient(
                verify=context,
                proxy=None if proxy is None else proxy.get_secret_value(),
                trust_env=False,
                follow_redirects=False,
                timeout=timeout,
                limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS),
                # A compressed body could be a thousand times as large as what was counted.
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "inferflux"},
            )
        except (ValueError, httpx.InvalidURL):
            # Their messages quote the URL, which may have a password in it.
            raise ConfigError("auth.settings.oidc.proxy cannot be used; write it as `http://host:port`") from None

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, url: str) -> Reply:
        """Fetch a JSON object.

        Raises:
            FetchError: anything but a 200 with a JSON object of at most 1 MiB in time.
        """
        return await self._send(self._client.build_request("GET", url))

    async def post(self, url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Reply:
        """Send a form and read the JSON object of the reply. Raises FetchError as `get` does."""
        return await self._send(self._client.build_request("POST", url, data=dict(form), headers=dict(headers)))

    async def _send(self, request: httpx.Request) -> Reply:
        try:
            # httpx's own limits are for each read; a slow drip would stay below them for ever.
            async with asyncio.timeout(self._timeout):
                response = await self._client.send(request, stream=True)
                try:
                    body = await _read(response)
                finally:
                    await response.aclose()
                    self._client.cookies.clear()
        except TimeoutError:
            raise FetchError(f"no complete reply within {self._timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise FetchError(type(error).__name__) from None
        try:
            return Reply(parse_object(body), response.headers.get("Cache-Control", ""))
        except ValueError as error:
            raise FetchError(f"the reply is {error}") from None


async def _read(response: httpx.Response) -> bytes:
    status = response.status_code
    if status != 200:
        code = await _error_code(response) if status == 400 else ""
        raise FetchError(f"HTTP status {status}", status, code)
    return await _read_body(response)


async def _error_code(response: httpx.Response) -> str:
    try:
        code = parse_object(await _read_body(response)).get("error")
    except (FetchError, ValueError):
        return ""
    return code if isinstance(code, str) else ""


async def _read_body(response: httpx.Response) -> bytes:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("the reply is compressed")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BODY:
            raise FetchError(f"the reply is larger than {MAX_BODY} bytes")
    return bytes(body)
