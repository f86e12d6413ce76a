"""Bodies of admin requests. Nothing in them is guessed: an unknown field, a duplicate one or one of a wrong type is refused."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from inferflux_core.errors import InvalidRequestError, RequestTooLargeError
from inferflux_core.serving.body_reader import BodyReader
from inferflux_core.serving.disconnect import ClientDisconnected
from inferflux_core.serving.json_body import parse_object
from inferflux_core.serving.validation import dotted_path, first_error
from inferflux_core.settings import ServerSettings

ModelT = TypeVar("ModelT", bound=BaseModel)

TEXT_TYPES = ("text/csv", "text/plain")


class AdminBodyReader(BodyReader):
    """Reads JSON bodies strictly: what would be ignored or converted elsewhere is an error here."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        self.max_bytes = settings.max_body_bytes

    async def read_text(self, request: Request) -> bytes:
        """The body of a request that sends a file as it is, with one of `TEXT_TYPES`.

        Raises:
            HTTPException: 415, it is compressed.
            RequestTooLargeError: more bytes than `server.max_body_bytes`.
            ClientDisconnected: the client left before it was complete.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "Compressed request bodies are not accepted; send it without Content-Encoding.")
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise RequestTooLargeError(
                    f"The request body is larger than {self.max_bytes} bytes, the limit of this server "
                    f"(server.max_body_bytes); send less."
                )
            if not message.get("more_body", False):
                return bytes(body)

    def _parse(self, body: bytes, model: type[ModelT]) -> ModelT:
        parse_object(body, self._max_depth)  # bounded and well-formed from here on
        json.loads(body, object_pairs_hook=_without_duplicates)
        try:
            return model.model_validate_json(body, strict=True)
        except ValidationError as error:
            # A misspelt field often leaves another one missing: the misspelling is what to tell.
            found = error.errors(include_url=False, include_context=False, include_input=False)
            details = next((details for details in found if details["type"] == "extra_forbidden"), None)
            if details is None:
                raise first_error(error) from None
            path = dotted_path(details["loc"])
            known = ", ".join(sorted(model.model_fields))
            hint = f" There are: {known}." if len(details["loc"]) == 1 else ""
            raise InvalidRequestError(f"Unknown parameter: {path!r}.{hint}", param=path) from None


def is_text(request: Request) -> bool:
    """Whether the body is announced as plain text rather than as JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() in TEXT_TYPES


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise InvalidRequestError(
                f"The request body has the field {name[:100]!r} twice; send it once.", code="invalid_json", param=name[:100]
            )
        result[name] = value
    return result
