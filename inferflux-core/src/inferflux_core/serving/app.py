"""The HTTP application: routes, the layer around them, and errors in one shape."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware

from inferflux_core.serving.admin.routes import admin_routes
from inferflux_core.serving.envelope import RequestEnvelope
from inferflux_core.serving.error_responses import install_error_handlers
from inferflux_core.serving.gate import AccessGate, is_public
from inferflux_core.serving.guard import GuardedRoute, Rule, requirement_of
from inferflux_core.serving.health import health_routes
from inferflux_core.serving.oauth_metadata import metadata_routes
from inferflux_core.serving.openai.chat import chat_routes
from inferflux_core.serving.openai.completions import completion_routes
from inferflux_core.serving.openai.models import model_routes
from inferflux_core.serving.openai.tokens import token_routes
from inferflux_core.serving.openapi import openapi_routes
from inferflux_core.serving.services import Services
from inferflux_core.telemetry.version import VERSION


def create_app(services: Services) -> FastAPI:
    """The ASGI application of one server.

    It starts and stops nothing: who calls this runs the models and hands them in. The page at `/docs` is left out because
    it would load scripts from elsewhere; the description itself is at `/openapi.json`.
    """
    services.metrics.observe_models(services.models.list)
    app = FastAPI(
        title="InferFlux",
        version=VERSION,
        description="OpenAI-compatible inference server.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        openapi_url=None,
        middleware=[
            Middleware(RequestEnvelope, services=services),
            Middleware(AccessGate, access=services.access),
        ],
    )
    install_error_handlers(app)
    for routes in (chat_routes, completion_routes, model_routes, token_routes, health_routes, metadata_routes):
        # Not include_router, which hides the routes from whoever wants to check all of them.
        app.router.routes += routes(services).routes
    app.router.routes += admin_routes(services).routes
    app.router.routes += openapi_routes(app).routes
    check_routes(app)
    return app


def check_routes(app: FastAPI) -> None:
    """Raises TypeError if a route is not guarded: it could be called by anyone whom the gate lets through."""
    for route in app.routes:
        if not isinstance(route, GuardedRoute):
            raise TypeError(f"the route {getattr(route, 'path', route)!r} is not a GuardedRoute")
        if requirement_of(route.endpoint) is Rule.PUBLIC and not is_public(route.path):
            raise TypeError(f"the route {route.path!r} is public, but the gate does not let strangers there")
