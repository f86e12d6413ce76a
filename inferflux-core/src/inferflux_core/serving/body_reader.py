"""Request bodies: read within a byte limit, parsed, and validated against a pydantic model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive

from inferflux_core.errors import RequestTooLargeError
from inferflux_core.serving.disconnect import ClientDisconnected
from inferflux_core.serving.json_body import parse_object
from inferflux_core.serving.unknown_fields import UnknownFields
from inferflux_core.serving.validation import first_error
from inferflux_core.settings import ServerSettings

ModelT = TypeVar("ModelT", bound=BaseModel)
MadeT = TypeVar("MadeT")

# One thread for all large bodies: parsing holds the interpreter's lock, and several at once would take it from the event loop
# again and again.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="inferflux-parser")

INLINE_BYTES = 64 * 1024  # up to this size parsing is faster than handing over to a thread


class BodyReader:
    """Reads the JSON bodies of one group of routes."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._max_bytes = settings.max_body_bytes
        self._max_depth = settings.max_json_depth
        self._unknown_fields = UnknownFields()

    async def read(self, request: Request, model: type[ModelT]) -> ModelT:
        """Read, parse and validate the JSON body of a request.

        Args:
            model: pydantic model of the body; fields it does not have are ignored, with a line in the log. Its validators get
                the server's settings as their context.

        Raises:
            HTTPException: 415, the body is not announced as plain `application/json`.
            RequestTooLargeError: more bytes than `server.max_body_bytes`.
            InvalidRequestError: not JSON, not an object, too deep, or not what the model wants.
            ClientDisconnected: the client left before the body was complete.
        """
        result, _ = await self.read_as(request, model, lambda _: None)
        return result

    async def read_as(self, request: Request, model: type[ModelT], make: Callable[[ModelT], MadeT]) -> tuple[ModelT, MadeT]:
        """As `read`; also what `make` makes of the body, in the thread where that is parsed if it is large."""
        _check_media_type(request)
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            _refuse_size(self._max_bytes)
        body = await _read_bytes(request.receive, self._max_bytes)
        if len(body) <= INLINE_BYTES:
            return self._made(body, model, make)
        return await asyncio.get_running_loop().run_in_executor(_PARSER, self._made, body, model, make)

    def _made(self, body: bytes, model: type[ModelT], make: Callable[[ModelT], MadeT]) -> tuple[ModelT, MadeT]:
        result = self._parse(body, model)
        return result, make(result)

    def _parse(self, body: bytes, model: type[ModelT]) -> ModelT:
        document = parse_object(body, self._max_depth)
        try:
            result = model.model_validate(document, context=self._settings)
        except ValidationError as error:
            raise first_error(error) from None
        self._unknown_fields.note(model, document)
        return result


def _check_media_type(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    name, _, value = parameters.strip().partition("=")
    plain = not parameters.strip() or (name.lower() == "charset" and value.strip('"').lower() == "utf-8")
    if media_type.strip().lower() != "application/json" or not plain:
        raise HTTPException(415, "The request must have the header 'Content-Type: application/json' and a UTF-8 body.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Compressed request bodies are not accepted; send it without Content-Encoding.")


async def _read_bytes(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        body += message.get("body", b"")
        if len(body) > max_bytes:
            _refuse_size(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _refuse_size(max_bytes: int) -> NoReturn:
    raise RequestTooLargeError(
        f"The request body is larger than {max_bytes} bytes, the limit of this server (server.max_body_bytes); send less."
    )
