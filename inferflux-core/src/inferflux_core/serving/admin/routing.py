"""`/v1/admin/routing`: what happens to requests that name no model, or one that is not ready."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import APIRouter
from pydantic import ConfigDict, ValidationError, model_validator
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

logger = logging.getLogger(__name__)

PATH = "/v1/admin/routing"
DOCUMENT = "routing"


class RoutingBody(Routing):
    """All rules, since a write replaces all of them; there is no `fallback_scope`."""

    model_config = ConfigDict(json_schema_extra={"required": [*Routing.model_fields]})

    @model_validator(mode="before")
    @classmethod
    def _all_rules(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "fallback_scope" in value:
            raise InvalidRequestError(
                "There is no 'fallback_scope': another model than the one that was asked for never answers. Leave it out.",
                param="fallback_scope",
                code="unsupported_parameter",
            )
        if (missing := next((name for name in Routing.model_fields if name not in value), None)) is not None:
            raise InvalidRequestError(f"Missing required parameter: {missing!r}.", param=missing)
        return value


class RoutingReply(msgspec.Struct, frozen=True):
    """The rules."""

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
    document = StoredDocument(services.access.store, DOCUMENT, Routing)

    @router.get(PATH, **documented(None, RoutingReply))
    @needs("api/routing", "admin")
    async def show_routing() -> Response:
        """The rules: as last written here, or else as at the start."""
        return _shown(*await document.read(manager_of(services).routing))

    @router.put(PATH, **documented(RoutingBody, RoutingReply, changes=True))
    @needs("api/routing", "admin")
    async def replace_routing(request: Request) -> Response:
        """Put other rules in force, from the next request on. Needs If-Match."""
        expected = expected_number(request)
        rules = Routing.model_validate((await reader.read(request, RoutingBody)).model_dump())
        models = manager_of(services)
        version = await document.write(rules, expected)
        models.routing = rules
        await record(services, request, "routing.changed", version=version, routing=rules.model_dump())
        return _shown(rules, version)

    return router


def _shown(rules: Routing, version: int) -> Response:
    return tagged(encode(rules.model_dump()), version)
