"""Probes for orchestrators, a status page for people and the metrics page."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.engine.types import EngineStats
from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.guard import GuardedRoute, needs, principal_of, public
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.readiness import readiness
from inferflux_core.serving.services import ModelView, Services
from inferflux_core.telemetry.version import VERSION

RETRY_AFTER_SECONDS = 1


class Alive(msgspec.Struct, frozen=True):
    """Reply of `/livez`."""

    status: str = "alive"


class ModelReadiness(msgspec.Struct, frozen=True):
    """What `/readyz` says of a model."""

    name: str
    state: str
    default: bool
    making_progress: bool


class Readiness(msgspec.Struct, frozen=True):
    """Reply of `/readyz`; status is `ready`, `not_ready` or `draining`. Behind auth providers it names no models."""

    status: str
    models: list[ModelReadiness]


class SpeculationHealth(msgspec.Struct, frozen=True):
    """What speculative decoding has brought a model since its engine started.

    `acceptance_ratio` and `mean_accepted_tokens`, accepted tokens of a draft, are null before the first draft. The lists go by
    the position in a draft, from the first.
    """

    method: str | None
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    acceptance_ratio: float | None
    mean_accepted_tokens: float | None
    draft_tokens_per_position: list[int]
    accepted_tokens_per_position: list[int]


class ModelHealth(msgspec.Struct, frozen=True):
    """What `/healthz` says of a model; `speculation` is null where none is configured."""

    name: str
    state: str
    requests_running: int
    requests_waiting: int
    kv_cache_usage_ratio: float
    restarts: int
    last_error: str | None
    speculation: SpeculationHealth | None


class Health(msgspec.Struct, frozen=True):
    """Reply of `/healthz`; status is `ok`, `degraded` (a model is not ready, or the audit log not written) or `draining`.

    `audit_log` is `off`, `ok` or `failing`.
    """

    status: str
    version: str
    uptime_s: float
    models: list[ModelHealth]
    audit_log: str


def health_routes(services: Services) -> APIRouter:
    """The routes that probes and Prometheus ask. They take no body and cost no token."""
    router = APIRouter(tags=["Operations"], route_class=GuardedRoute)
    # Probes carry no credential; where credentials matter they learn of no model either.
    show_models = services.access.admission.open

    @router.get("/livez", **documented(None, Alive, errors=()))
    @public
    async def livez() -> Response:
        """The process answers. A model that fails is no reason to restart the process; see `/readyz`."""
        return json_response(encode(Alive()))

    @router.get("/readyz", **documented(None, Readiness, errors=(), statuses=(503,)))
    @public
    async def readyz() -> Response:
        """Whether new requests should come here: the default model is ready and its engine makes progress."""
        reply = _readiness(services, show_models)
        if reply.status == "ready":
            return json_response(encode(reply))
        return json_response(encode(reply), 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})

    @router.get("/healthz", **documented(None, Health, errors=(401, 403)))
    @needs("api/health", "read")
    async def healthz(request: Request) -> Response:
        """What the server and those of its models are doing that this credential may see. Always 200; probes ask the others."""
        views = services.access.admission.visible(principal_of(request.scope), services.models.list())
        return json_response(encode(_health(services, views)))

    if services.settings.metrics.enabled:

        @router.get("/metrics", **documented(None, errors=(401, 403)))
        @needs("api/metrics", "read")
        async def metrics(request: Request) -> Response:
            """Prometheus metrics."""
            page, content_type = services.metrics.scrape(request.headers.get("accept", ""))
            return Response(page, media_type=content_type)

    return router


def _readiness(services: Services, show_models: bool) -> Readiness:
    shown: Sequence[ModelView] = services.models.list() if show_models else ()
    models = [ModelReadiness(view.name, view.state, view.is_default, view.making_progress) for view in shown]
    return Readiness(readiness(services).status, models)


def _health(services: Services, views: Sequence[ModelView]) -> Health:
    audit = services.access.audit
    audit_log = "off" if not audit.enabled else "ok" if audit.healthy else "failing"
    ok = audit_log != "failing" and all(view.state == "ready" and view.making_progress for view in views)
    status = "draining" if services.state.draining else "ok" if ok else "degraded"
    uptime = round(time.monotonic() - services.state.started, 3)
    return Health(status, VERSION, uptime, [_model_health(view) for view in views], audit_log)


def _model_health(view: ModelView) -> ModelHealth:
    stats = view.stats
    return ModelHealth(
        view.name,
        view.state,
        stats.num_running,
        stats.num_waiting,
        stats.kv_cache_usage,
        view.restarts,
        view.last_error,
        _speculation_health(view.details.get("speculation"), stats),
    )


def _speculation_health(method: str | None, stats: EngineStats) -> SpeculationHealth | None:
    if method is None and not stats.spec_drafts:
        return None
    drafted, accepted = stats.spec_draft_tokens, stats.spec_accepted_tokens
    return SpeculationHealth(
        method,
        stats.spec_drafts,
        drafted,
        accepted,
        round(accepted / drafted, 4) if drafted else None,
        round(accepted / stats.spec_drafts, 2) if stats.spec_drafts else None,
        stats.spec_draft_tokens_per_pos,
        stats.spec_accepted_tokens_per_pos,
    )
