"""Requests to identity providers: small JSON documents over HTTPS, from servers that are not trusted to be kind.

httpx is imported when the first request is made, so that a command which needs no login does not pay for it.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from inferflux_core.cli.api_errors import ApiError, connection_cause, printable

if TYPE_CHECKING:
    import httpx

SILENCE_S = 10.0
"""Longest wait for a connection, or for the next bytes of an answer."""
ANSWER_S = 30.0
"""Longest time a whole answer may take."""
MAX_ANSWER_BYTES = 1024 * 1024
_MAX_SHOWN = 200


class OAuthError(ApiError):
    """An error that the provider answered with (RFC 6749, section 5.2); its word for it is `code`."""


def get_json(url: str) -> tuple[int, dict[str, Any]]:
    """The status and document of a GET; the document is empty where the answer is not a JSON object.

    Redirects are not followed: they are answers like any other.

    Raises:
        ApiError: no answer, or one that is too large or too slow.
    """
    return _exchange("GET", url)


def post_form(url: str, form: Mapping[str, str]) -> dict[str, Any]:
    """Posts a form; returns the document of an answer with status 200, which is empty where that is not a JSON object.

    Raises:
        OAuthError: the provider says what is wrong.
        ApiError: no answer, one that is too large or too slow, or an error without a reason. The status is then None or 5xx
            where the same request may work later.
    """
    status, document = _exchange("POST", url, form)
    if status == 200:
        return document
    error = document.get("error")
    if isinstance(error, str):
        told = document.get("error_description")
        reason = f": {_shown(told)}" if isinstance(told, str) and told else ""
        raise OAuthError(f"{_origin(url)} answered {_shown(error)!r}{reason}", status=status, code=error)
    raise ApiError(f"{_origin(url)} answered with HTTP {status} and no reason", status=status)


def checked_url(url: object, what: str, *, local: bool) -> str:
    """A URL that tokens and codes may be sent to, or a person to.

    Args:
        what: names it in messages, such as `the issuer`.
        local: whether plain HTTP to this machine is good enough. Only for a server that is itself on this machine: a remote one
            has no business in sending us to a local port.

    Raises:
        ApiError: it is not https, or not a URL at all.
    """
    parts = _split(url)
    shown = repr(_shown(url)) if isinstance(url, str) else "missing"
    if not isinstance(url, str) or parts is None:
        raise ApiError(f"{what} is {shown}, not an https URL", code="insecure_url")
    if parts.scheme == "https" or (parts.scheme == "http" and local and _is_loopback(parts)):
        return url
    raise ApiError(f"{what} is {shown}. A login needs https, so that nobody on the way can read the token", code="insecure_url")


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine's loopback."""
    parts = _split(url)
    return parts is not None and _is_loopback(parts)


def _split(url: object) -> SplitResult | None:
    """The parts of an http or https URL with nothing odd about it; else None."""
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        good = parts.port != 0 and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return None
    return parts if good and parts.username is None and not parts.fragment else None


def _is_loopback(parts: SplitResult) -> bool:
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def _exchange(method: str, url: str, form: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    import httpx

    # Identity: an answer that unpacks to a thousand times its size would pass the limit below in one piece.
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    with (
        _mapped_errors(url),
        httpx.Client(headers=headers, timeout=SILENCE_S, trust_env=not is_loopback(url)) as http,
        http.stream(method, url, data=form) as response,
    ):
        body = _body(url, response)
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        document = None
    return response.status_code, document if isinstance(document, dict) else {}


def _body(url: str, response: httpx.Response) -> bytes:
    deadline = time.monotonic() + ANSWER_S
    body = bytearray()
    for received in response.iter_raw():
        body += received
        if len(body) > MAX_ANSWER_BYTES:
            raise ApiError(f"{_origin(url)} answered with more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ApiError(f"the answer of {_origin(url)} was not complete after {ANSWER_S:g} s")
    return bytes(body)


@contextmanager
def _mapped_errors(url: str) -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.ConnectError as error:
        raise ApiError(f"cannot reach {_origin(url)}: {connection_cause(error)}") from error
    except httpx.TimeoutException as error:
        raise ApiError(f"{_origin(url)} sent nothing for {SILENCE_S:g} s") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ApiError(f"the request to {_origin(url)} failed: {printable(str(error)).rstrip('.')}") from error


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _shown(text: str) -> str:
    text = printable(text).replace("\n", " ").replace("\t", " ")
    return text[:_MAX_SHOWN] + "…" if len(text) > _MAX_SHOWN else text
