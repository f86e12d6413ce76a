"""`GET /v1/admin/config`: every setting in effect and where it comes from. Secrets are masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from inferflux_core.errors import UnavailableError
from inferflux_core.serving.admin.versions import tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openapi import documented

PATH = "/v1/admin/config"


class SettingValue(msgspec.Struct, frozen=True):
    """A value as JSON has it, and where it comes from: `command line`, `environment ...`, `file ...` or `default`."""

    value: Any
    origin: str


class ConfigReply(msgspec.Struct, frozen=True):
    """The file that was read, and each setting by its name."""

    file: str | None
    settings: dict[str, SettingValue]


def config_routes(configuration: Callable[[], str] | None) -> APIRouter:
    """The route of the configuration; see `admin_routes`."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)

    @router.get(PATH, **documented(None, ConfigReply))
    @needs("api/config", "admin")
    async def show_config() -> Response:
        """Every setting in effect. What the admin API changed since the start is not in it: see limits, routing and models."""
        if configuration is None:
            raise UnavailableError("This server was started without a configuration to show.", code="config_unavailable")
        return tagged(configuration().encode())

    return router
