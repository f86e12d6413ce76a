"""All of `/v1/admin`. Each route says which permission it needs; every change is in the audit log before its answer."""

from __future__ import annotations

from fastapi import APIRouter

from inferflux_core.serving.admin.cache import cache_routes
from inferflux_core.serving.admin.configuration import config_routes
from inferflux_core.serving.admin.keys import key_routes
from inferflux_core.serving.admin.limits import limit_routes
from inferflux_core.serving.admin.models import model_routes
from inferflux_core.serving.admin.policy import policy_routes
from inferflux_core.serving.admin.pools import pool_routes
from inferflux_core.serving.admin.routing import routing_routes
from inferflux_core.serving.guard import GuardedRoute
from inferflux_core.serving.services import Services

_PARTS = (
    key_routes,
    policy_routes,
    limit_routes,
    model_routes,
    routing_routes,
    cache_routes,
    pool_routes,
)


def admin_routes(services: Services) -> APIRouter:
    """The routes of the admin API."""
    router = APIRouter(route_class=GuardedRoute)
    for part in _PARTS:
        router.routes += part(services).routes
    router.routes += config_routes(services.configuration).routes
    return router
