"""Errors to HTTP replies, always in OpenAI's four-key shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inferflux_core.errors import InvalidRequestError, RequestError, RequestTooLargeError
from inferflux_core.serving.exchange import Exchange

LINGER_SECONDS = 2.0

_TYPES = {409: "conflict_error", 429: "rate_limit_error"}


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> bytes:
    """The four-key object for errors that are about HTTP and have no class in `errors.py`."""
    error_type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": error_type, "param": param, "code": code}})


def internal_error_body(request_id: str) -> bytes:
    """What a client learns of an error nobody expected: only how to refer to it."""
    message = (
        "The server had an internal error. It was logged; quote request id "
        f"{request_id!r} when you report it. Retrying may help."
    )
    return error_body(message, status=500, code="internal_error")


def json_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A reply whose body is JSON already."""
    return Response(body, status, headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    """The reply that an error is."""
    body = msgspec.json.encode(error.body())
    if isinstance(error, RequestTooLargeError):
        return LingeringResponse(body, error.status, {**error.headers, "Connection": "close"}, media_type="application/json")
    return json_response(body, error.status, error.headers)


def error_reason(error: RequestError) -> str:
    """Label of an error in metrics and logs: its code, or its type where OpenAI has no code."""
    return error.code or error.type


class LingeringResponse(Response):
    """A reply to a client that is still sending a body nobody wants.

    Closing a socket with unread bytes in it resets the connection, and the client would never see why. So the reply goes
    out first, what still comes is thrown away for a moment, and then the connection is closed (RFC 9112, section 9.6).
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply, then discard the rest of the request for at most `LINGER_SECONDS`."""
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(head)
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    Exchange.of(request.scope).error = error_reason(error)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown URLs, wrong methods, and what adapters refuse about HTTP itself (415)."""
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"], request.method
    if error.status_code == 404:
        message = f"Unknown URL: {method} {path[:200]!r}. The API of this server is described at /openapi.json."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"Method {method} is not allowed for {path[:200]!r}; use {allowed}."
    else:
        message = error.detail
    Exchange.of(request.scope).error = f"http_{error.status_code}"
    return json_response(error_body(message, status=error.status_code), error.status_code, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's own validation of path and query parameters; bodies are validated in `validation.py`."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return await _on_request_error(request, InvalidRequestError(f"Invalid value for {param!r}: {first['msg']}.", param=param))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error in one shape. What is not listed here is handled by `RequestEnvelope`, as a 500."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
