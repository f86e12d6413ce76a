"""The description of the API at `/openapi.json`.

Bodies are read by `body_reader.py` and replies are encoded by msgspec, so FastAPI sees neither; here the routes say what they
take and give, and the document is put together from the same classes that do the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from inferflux_core.serving.guard import GuardedRoute, needs

_REF = "#/components/schemas/{name}"
_SCHEMAS = "x-inferflux-schemas"  # carries schemas from the routes to the document's components; not in the result

_ERRORS = {
    400: "The request is invalid.",
    401: "The request has no valid credential.",
    403: "The credential may not do this.",
    404: "There is no such model.",
    409: "It is there already, or cannot be changed in this state.",
    412: "Somebody else wrote in between (If-Match).",
    413: "The body is too large.",
    415: "The body is not JSON.",
    428: "A write needs If-Match.",
    429: "A quota is used up.",
    500: "The server failed.",
    503: "The server or the model cannot take the request now.",
    504: "The request took too long.",
}
_OF_CHANGES = (409, 412, 428)
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def documented(
    body: type[BaseModel] | None,
    *replies: type[msgspec.Struct],
    streams: bool = False,
    errors: Sequence[int] | None = None,
    changes: bool = False,
    statuses: Sequence[int] = (),
) -> dict[str, Any]:
    """Arguments of a route that describe it.

    Args:
        body: what it reads, or None.
        replies: what it sends as JSON, one of these; none for plain text.
        streams: it may send server-sent events instead.
        errors: statuses with a four-key error body; by default all that a route with a body can have.
        changes: it changes something that has a version, so that it can also fail over that.
        statuses: further statuses with the same body as success.
    """
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    schemas, components = _schemas(body, replies)
    if replies:
        content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {
        str(status): {"description": "Success." if status == 200 else "Not now.", "content": content}
        for status in (200, *statuses)
    }
    error_content = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    default = [status for status in _ERRORS if changes or status not in _OF_CHANGES]
    for status in default if errors is None else errors:
        responses[str(status)] = {"description": _ERRORS[status], "content": error_content}
    extra: dict[str, Any] = {"responses": responses, _SCHEMAS: components}
    if body is not None:
        schema = {"$ref": _REF.format(name=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"response_model": None, "openapi_extra": extra}


@functools.cache
def _schemas(
    body: type[BaseModel] | None, replies: tuple[type[msgspec.Struct], ...]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The schema of each reply, and the components that these and the body refer to."""
    schemas, components = msgspec.json.schema_components(replies, ref_template=_REF)
    definitions: dict[str, Any] = {}
    if body is not None:
        _, definitions = models_json_schema([(body, "validation")], ref_template=_REF.replace("{name}", "{model}"))
    return list(schemas), {**components, **definitions.get("$defs", {})}


def openapi_routes(app: FastAPI) -> APIRouter:
    """The route of the description; the document is made at the first request for it."""
    router = APIRouter(tags=["Operations"], route_class=GuardedRoute)
    made: list[bytes] = []

    @router.get("/openapi.json", include_in_schema=False)
    @needs("api/openapi", "read")
    async def openapi() -> Response:
        """What this server can do, for programs (OpenAPI 3.1)."""
        if not made:
            made.append(msgspec.json.encode(_document(app)))
        return Response(made[0], media_type="application/json")

    return router


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = {"Error": _ERROR_SCHEMA}
    for path in document["paths"].values():
        for operation in path.values():
            schemas.update(operation.pop(_SCHEMAS, {}))
            operation["responses"].pop("422", None)  # FastAPI's own shape of errors, which is never sent
    document["components"] = {"schemas": schemas}
    return document
