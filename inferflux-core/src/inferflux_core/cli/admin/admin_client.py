"""Requests to a server's admin API, with the versions that its writes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.api_errors import ApiError, error_from_response, printable

_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """A document, and the ETag with which it can be replaced (as it came, with its quotes)."""

    document: Any
    etag: str


def ask(
    client: ApiClient,
    method: str,
    path: str,
    body: object = None,
    *,
    text: bytes | None = None,
    if_match: str | None = None,
) -> Answer:
    """One request.

    Args:
        body: sent as JSON; None sends none.
        text: sent as `text/csv` instead.
        if_match: value of the header.

    Raises:
        ApiError: it did not work, whatever the reason.
    """
    headers = {} if if_match is None else {"if-match": if_match}
    content = text
    if text is not None:
        headers["content-type"] = "text/csv"
    elif body is not None:
        headers["content-type"] = _JSON
        content = msgspec.json.encode(body)
    response = client.request(method, path, content, headers)
    if response.status_code not in (200, 202):
        raise _error(client.url, path, response.status_code, response.content, response.headers.get("retry-after"))
    try:
        document = msgspec.json.decode(response.content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ApiError(f"{client.url}{path} answered with something that is not JSON. Is it an InferFlux server?") from None
    if not isinstance(document, dict):
        raise ApiError(f"{client.url}{path} answered with something that is not a JSON object. Is it an InferFlux server?")
    return Answer(document, response.headers.get("etag", "*"))


def _error(url: str, path: str, status: int, body: bytes, retry_after: str | None) -> ApiError:
    error = error_from_response(url, path, status, body, retry_after)
    if status in (404, 412) and error.code is not None:
        try:
            message = msgspec.json.decode(body)["error"]["message"]
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
            return error
        return ApiError(f"{printable(str(message)).rstrip('.')} (HTTP {status})", status=status, code=error.code)
    return error
