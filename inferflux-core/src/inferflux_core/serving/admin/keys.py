"""`/v1/admin/api-keys`: making, listing, changing, rotating and revoking API keys."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.access.keys.records import KeyChange, KeyRecord, NewKey, key_public
from inferflux_core.access.keys.ring import MAX_OVERLAP_S, KeyRing
from inferflux_core.errors import UnavailableError
from inferflux_core.serving.admin.body import AdminBodyReader
from inferflux_core.serving.admin.limits import LimitsObject
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import expected_number, tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services
from inferflux_core.settings import Group

PATH = "/v1/admin/api-keys"
ONE = PATH + "/{key_id}"


class KeyObject(msgspec.Struct, frozen=True, kw_only=True):
    """An API key, without its secret. Times are RFC 3339, UTC."""

    id: str
    name: str
    tenant: str
    owner: str
    scopes: list[str]
    roles: list[str]
    models: list[str] | None
    limits: LimitsObject | None
    priority: int
    cidr: list[str]
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    rotated_at: str | None
    revoked_at: str | None
    version: int


class KeyWithSecret(KeyObject, frozen=True, kw_only=True):
    """A key that was made or rotated. `key` is shown this once and kept nowhere."""

    key: str


class KeyList(msgspec.Struct, frozen=True):
    """All keys, revoked and expired ones too."""

    data: list[KeyObject]
    object: str = "list"


class RotateBody(Group):
    """Body of the rotation of a key."""

    overlap_s: Annotated[float, Field(ge=0, le=MAX_OVERLAP_S, allow_inf_nan=False)] = Field(
        0.0, description="Seconds for which the old secret stays valid beside the new one."
    )


def key_routes(services: Services) -> APIRouter:
    """The routes of API keys."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)

    def ring() -> KeyRing:
        if services.access.keys is None:
            raise UnavailableError(
                "This server keeps no API keys: auth.providers does not name 'api_keys'.", code="policy_store_disabled"
            )
        return services.access.keys

    @router.get(PATH, **documented(None, KeyList))
    @needs("api/keys", "admin")
    async def list_keys() -> Response:
        """All keys, the oldest first. Those of the configuration file are not among them."""
        return tagged(encode({"object": "list", "data": [key_public(key) for key in await ring().list()]}))

    @router.post(PATH, **documented(NewKey, KeyWithSecret, changes=True))
    @needs("api/keys", "admin")
    async def create_key(request: Request) -> Response:
        """Make a key. The answer has the whole key, which is shown this once."""
        key, secret = await ring().create(await reader.read(request, NewKey))
        await record(services, request, "key.created", **_recorded(key))
        return _shown(key, secret)

    @router.get(ONE, **documented(None, KeyObject))
    @needs("api/keys", "admin")
    async def show_key(key_id: str) -> Response:
        """One key."""
        return _shown(await ring().get(key_id))

    @router.patch(ONE, **documented(KeyChange, KeyObject, changes=True))
    @needs("api/keys", "admin")
    async def update_key(request: Request, key_id: str) -> Response:
        """Change what the body names; `null` for models, limits or expires_at removes them. Needs If-Match."""
        version = expected_number(request)
        change = await reader.read(request, KeyChange)
        key = await ring().update(key_id, change, version)
        await record(services, request, "key.updated", changed=sorted(change.model_fields_set), **_recorded(key))
        return _shown(key)

    @router.post(ONE + "/rotate", **documented(RotateBody, KeyWithSecret, changes=True))
    @needs("api/keys", "admin")
    async def rotate_key(request: Request, key_id: str) -> Response:
        """Give a key a new secret; the old one stays valid for `overlap_s` seconds. If-Match is honoured, not needed."""
        version = expected_number(request, required=False)
        body = await reader.read(request, RotateBody)
        key, secret = await ring().rotate(key_id, body.overlap_s, version)
        await record(services, request, "key.rotated", overlap_ms=int(body.overlap_s * 1000), **_recorded(key))
        return _shown(key, secret)

    @router.delete(ONE, **documented(None, KeyObject, changes=True))
    @needs("api/keys", "admin")
    async def revoke_key(request: Request, key_id: str) -> Response:
        """Make a key invalid for ever, within a second. Twice is no error. If-Match is honoured, not needed."""
        key = await ring().revoke(key_id, expected_number(request, required=False))
        await record(services, request, "key.revoked", **_recorded(key))
        return _shown(key)

    return router


def _shown(key: KeyRecord, secret: str | None = None) -> Response:
    document: dict[str, Any] = key_public(key)
    if secret is not None:
        document["key"] = secret
    return tagged(encode(document), key.version)


def _recorded(key: KeyRecord) -> dict[str, Any]:
    """What the audit log says of a key after a change: whose it is and what it may do."""
    public = key_public(key)
    names = ("name", "tenant", "scopes", "roles", "models", "limits", "priority", "cidr", "expires_at", "version")
    return {"key_id": key.id, "key": {name: public[name] for name in names}}
