"""What went wrong between a client and a server, in words that name the cause and the cure."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_ERROR_TEXT = 400
"""Characters of a server's own message that are worth showing."""


class ApiError(Exception):
    """A request that did not work; the message names the cause and, where known, the cure.

    Attributes:
        status: HTTP status, or None when no answer came (unreachable, timeout, broken stream).
        code: the server's stable error code, such as `model_not_found`, or None.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def printable(text: str) -> str:
    """The text without control characters (but LF and TAB), so that a server or model cannot drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0))


def unreachable(url: str, cause: str) -> ApiError:
    """The error for a server that cannot be connected to."""
    return ApiError(f"cannot reach {url}: {cause}. Is the server running? Start it with: inferflux serve")


def connection_cause(error: BaseException) -> str:
    """Why a connection failed, in words, from the operating system's error behind `error`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionRefusedError):
            return "connection refused"
        if isinstance(seen, OSError) and seen.strerror and not seen.strerror.startswith("Multiple"):
            return seen.strerror[0].lower() + seen.strerror[1:]
        seen = seen.__cause__ or seen.__context__
    text = printable(str(error)) or type(error).__name__
    return "connection refused" if "refused" in text.lower() or "Errno 111" in text else text


def error_from_response(url: str, path: str, status: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """The error for an answer with an error status, whatever shape the server gave its body.

    Understands `{"error": {"message", "code"}}`, `{"error": "text"}`, `{"detail": ...}`, `{"message": ...}` and plain
    text. `retry_after` is the header of that name, in seconds.
    """
    message, code = _message_and_code(body)
    if status == 401:
        message = f"{message or 'the server wants an API key'}. Give a valid one with --api-key, or log in with: inferctl login"
    elif status == 404 and code != "model_not_found":
        reason = f" ({message})" if message else ""
        message = f"{url} has no {path}{reason}. Is it an OpenAI-compatible server?"
    elif status in (429, 503) and retry_after and retry_after.isdecimal():
        message = f"{message or 'the server is busy'}. Try again in {retry_after} s"
    return ApiError(f"{message or 'the server gave no reason'} (HTTP {status})", status=status, code=code)


def error_from_event(error: Any) -> ApiError:
    """The error for the value of `error` in a stream that had begun well."""
    message, code = _message_and_code(msgspec.json.encode({"error": error}))
    return ApiError(message or "the server ended the stream with an error", code=code)


def _message_and_code(body: bytes) -> tuple[str, str | None]:
    try:
        document: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body.decode(errors="replace").strip()
        # A proxy's HTML page says nothing that its status does not.
        return ("" if text.startswith("<") else _shown(text)), None
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return _shown(str(error)), None
    message = error.get("message") or error.get("detail") or ""
    code = error.get("code") or error.get("type")
    text = message if isinstance(message, str) else msgspec.json.encode(message).decode()
    return _shown(text), str(code) if code else None


def _shown(text: str) -> str:
    text = printable(text)
    return text[:MAX_ERROR_TEXT] + "…" if len(text) > MAX_ERROR_TEXT else text.rstrip(". \n")
