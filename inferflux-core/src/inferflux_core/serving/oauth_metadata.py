"""`/.well-known/oauth-protected-resource`: which authorization servers this server believes (RFC 9728)."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from inferflux_core.access.services import METADATA_PATH
from inferflux_core.errors import NotFoundError
from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.guard import GuardedRoute, public
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services


class ResourceMetadata(msgspec.Struct, frozen=True):
    """Protected resource metadata."""

    resource: str
    authorization_servers: list[str]
    scopes_supported: list[str]
    bearer_methods_supported: list[str]
    resource_name: str = "InferFlux"


def metadata_routes(services: Services) -> APIRouter:
    """The route of the metadata, at the root and, for a public URL with a path, at that path below it."""
    router = APIRouter(tags=["Operations"], route_class=GuardedRoute)
    resource = services.settings.server.public_url
    described = _described(resource, services)
    paths = {""} if resource is None else {"", urlsplit(resource).path.strip("/")}

    @router.get(METADATA_PATH, **documented(None, ResourceMetadata, errors=(404,)))
    @router.get(METADATA_PATH + "/{path:path}", **documented(None, ResourceMetadata, errors=(404,)))
    @public
    async def protected_resource(path: str = "") -> Response:
        """Where clients get an access token for this server."""
        if described is None or path not in paths:
            raise NotFoundError("This server has no OAuth metadata here: no auth provider with an authorization server.")
        return json_response(msgspec.json.encode(described))

    return router


def _described(resource: str | None, services: Services) -> ResourceMetadata | None:
    servers: list[str] = []
    scopes: list[str] = []
    for provider in services.access.providers:
        metadata: dict[str, Any] = dict(provider.metadata())
        servers += [url for url in metadata.get("authorization_servers", ()) if url not in servers]
        scopes += [scope for scope in metadata.get("scopes_supported", ()) if scope not in scopes]
    if resource is None or not servers:
        return None
    return ResourceMetadata(resource, servers, scopes, ["header"])
