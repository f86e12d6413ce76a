"""`/v1/admin/routing`: what happens to requests that name no model, or one that is not ready."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import APIRouter
from pydantic import Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.access.store import AccessStore
from inferflux_core.errors import ConfigError, InvalidRequestError
from inferflux_core.models.manager import ModelManager
from inferflux_core.models.routing import Routing
from inferflux_core.serving.admin.body import AdminBodyReader
from inferflux_core.serving.admin.documents import StoredDocument
from inferflux_core.serving.admin.models import manager_of
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import expected_number, tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services
from inferflux_core.settings import Group

logger = logging.getLogger(__name__)

PATH = "/v1/admin/routing"
DOCUMENT = "routing"


class RoutingBody(Group):
    """Both rules; there is no `fallback_scope`."""

    allow_default_fallback: bool = Field(description="Requests that name no model go to the default one.")
    require_ready_backend: bool = Field(description="Requests for a model that is not ready get 503 at once.")

    @model_validator(mode="before")
    @classmethod
    def _no_scope(cls, value: Any) -> Any:
        if isinstance(value, dict) and "fallback_scope" in value:
            raise InvalidRequestError(
                "There is no 'fallback_scope': another model than the one that was asked for never answers. Leave it out.",
                param="fallback_scope",
                code="unsupported_parameter",
            )
        return value


class RoutingReply(msgspec.Struct, frozen=True):
    """The rules in force."""

    allow_default_fallback: bool
    require_ready_backend: bool


async def restore_routing(store: AccessStore | None, models: ModelManager) -> None:
    """At the start of the server: put in force what administrators last wrote.

    Raises:
        ConfigError: the store holds something else under this name.
        AccessUnavailableError: the store cannot be read.
    """
    document = None if store is None else await store.get_document(DOCUMENT)
    if document is None:
        return
    try:
        models.routing = Routing.model_validate(document.value)
    except ValidationError as error:
        raise ConfigError(f"the access store holds routing rules that cannot be read: {error.error_count()} errors") from error
    logger.info("routing rules are those of the admin API, version %d", document.version)


def routing_routes(services: Services) -> APIRouter:
    """The routes of the routing rules."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)
    document = StoredDocument(services.access.store, DOCUMENT)

    def shown(version: int) -> Response:
        return tagged(encode(manager_of(services).routing.model_dump()), version)

    @router.get(PATH, **documented(None, RoutingReply))
    @needs("api/routing", "admin")
    async def show_routing() -> Response:
        """The rules in force."""
        return shown(await document.version())

    @router.put(PATH, **documented(RoutingBody, RoutingReply, changes=True))
    @needs("api/routing", "admin")
    async def replace_routing(request: Request) -> Response:
        """Put other rules in force, from the next request on. Needs If-Match."""
        expected = expected_number(request)
        body = await reader.read(request, RoutingBody)
        models, value = manager_of(services), body.model_dump()
        version = await document.put(value, expected)
        models.routing = Routing.model_validate(value)
        await record(services, request, "routing.changed", version=version, routing=value)
        return shown(version)

    return router
