"""`/v1/admin/pools`: whether the server takes requests, and how many wait."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from inferflux_core.serving.admin.versions import tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.readiness import readiness
from inferflux_core.serving.services import ModelView, Services

PATH = "/v1/admin/pools"


class PoolHealth(msgspec.Struct, frozen=True):
    """What `/readyz` says, in one object. `reason` is empty when ready."""

    ready: bool
    http_status: int
    role: str
    reason: str
    model_loaded: bool


class SchedulerLoad(msgspec.Struct, frozen=True):
    """The queues of all models together, and the limits of one step."""

    queue_depth: int
    running: int
    batch_limit_size: int
    batch_limit_tokens: int


class PoolsReply(msgspec.Struct, frozen=True):
    """The state of the server; `status` is `ok`, `not_ready` or `draining`."""

    status: str
    pool_health: PoolHealth
    scheduler: SchedulerLoad


def pool_routes(services: Services) -> APIRouter:
    """The route of the server's load."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)

    @router.get(PATH, **documented(None, PoolsReply))
    @needs("api/pools", "admin")
    async def show_pools() -> Response:
        """Whether the server takes requests, and how many wait."""
        views: list[ModelView] = list(services.models.list())
        ready = readiness(services)
        engine = services.settings.engine
        reply = PoolsReply(
            "ok" if ready.status == "ready" else ready.status,
            PoolHealth(
                ready=ready.status == "ready",
                http_status=200 if ready.status == "ready" else 503,
                role="unified",
                reason=ready.reason,
                model_loaded=any(view.state == "ready" for view in views),
            ),
            SchedulerLoad(
                sum(view.stats.num_waiting for view in views),
                sum(view.stats.num_running for view in views),
                engine.max_num_seqs,
                engine.max_num_batched_tokens,
            ),
        )
        return tagged(encode(reply))

    return router
