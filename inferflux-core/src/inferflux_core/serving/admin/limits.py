"""`/v1/admin/limits`: the quotas of everyone who has none of their own, of tenants and of models."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.access.services import LIMITS_DOCUMENT
from inferflux_core.errors import InvalidRequestError
from inferflux_core.serving.admin.body import AdminBodyReader
from inferflux_core.serving.admin.documents import StoredDocument
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import expected_number, tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services
from inferflux_core.settings import Group, LimitTable

PATH = "/v1/admin/limits"
OLD_PATH = "/v1/admin/rate_limit"


class LimitsObject(msgspec.Struct, frozen=True):
    """One quota; null does not limit."""

    rpm: int | None
    tpm: int | None
    concurrency: int | None
    daily_tokens: int | None
    max_tokens: int | None


class LimitsReply(msgspec.Struct, frozen=True):
    """The quotas in force."""

    default: LimitsObject
    tenants: dict[str, LimitsObject]
    models: dict[str, LimitsObject]


class RateLimitBody(Group):
    """The two limits a minute of `default`; what is absent stays, null does not limit."""

    tokens_per_minute: Annotated[int, Field(ge=1)] | None = Field(None, description="`default.tpm` of /v1/admin/limits.")
    requests_per_minute: Annotated[int, Field(ge=1)] | None = Field(None, description="`default.rpm` of /v1/admin/limits.")


class RateLimitReply(msgspec.Struct, frozen=True):
    """The two limits a minute of `default`."""

    tokens_per_minute: int | None
    requests_per_minute: int | None


def limit_routes(services: Services) -> APIRouter:
    """The routes of quotas. Version 0 is what the configuration says; once written here, what is written here counts."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)
    rules = services.access.limit_rules
    document = StoredDocument(services.access.store, LIMITS_DOCUMENT, LimitTable)

    async def replace(request: Request, table: LimitTable, expected_version: int | None) -> int:
        version = await document.write(table, expected_version)
        rules.replace(table)
        await record(services, request, "limits.changed", version=version, limits=table.model_dump(mode="json"))
        return version

    @router.get(PATH, **documented(None, LimitsReply))
    @needs("api/limits", "admin")
    async def show_limits() -> Response:
        """The quotas: as last written here, or else as configured."""
        return _shown(*await document.read(rules.table))

    @router.put(PATH, **documented(LimitTable, LimitsReply, changes=True))
    @needs("api/limits", "admin")
    async def replace_limits(request: Request) -> Response:
        """Put other quotas in force from the next request on; what was used so far stays counted. Needs If-Match."""
        expected = expected_number(request)
        table = await reader.read(request, LimitTable)
        return _shown(table, await replace(request, table, expected))

    @router.get(OLD_PATH, **documented(None, RateLimitReply))
    @needs("api/limits", "admin")
    async def show_rate_limit() -> Response:
        """The two limits a minute of `default`, as the first InferFlux had them."""
        return _rate_limit(*await document.read(rules.table))

    @router.put(OLD_PATH, **documented(RateLimitBody, RateLimitReply, changes=True))
    @needs("api/limits", "admin")
    async def change_rate_limit(request: Request) -> Response:
        """Change what the body names, and nothing else. If-Match is honoured, not needed."""
        expected = expected_number(request, required=False)
        body = await reader.read(request, RateLimitBody)
        if not body.model_fields_set:
            raise InvalidRequestError("Send 'tokens_per_minute', 'requests_per_minute' or both.", param="tokens_per_minute")
        fields = {"tokens_per_minute": "tpm", "requests_per_minute": "rpm"}
        changes = {fields[name]: getattr(body, name) for name in body.model_fields_set}
        before, version = await document.read(rules.table)
        table = before.model_copy(update={"default": before.default.model_copy(update=changes)})
        expected = version if expected is None else expected  # what was read is what is changed
        return _rate_limit(table, await replace(request, table, expected))

    return router


def _shown(table: LimitTable, version: int) -> Response:
    return tagged(encode(table.model_dump(mode="json")), version)


def _rate_limit(table: LimitTable, version: int) -> Response:
    return tagged(encode(RateLimitReply(table.default.tpm, table.default.rpm)), version)
