"""The HTTP application: routes, the layer around them, and errors in one shape."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware

from inferflux_core.serving.envelope import RequestEnvelope
from inferflux_core.serving.error_responses import install_error_handlers
from inferflux_core.serving.health import health_routes
from inferflux_core.serving.hosts import HostCheck
from inferflux_core.serving.openai.chat import chat_routes
from inferflux_core.serving.openai.completions import completion_routes
from inferflux_core.serving.openai.models import model_routes
from inferflux_core.serving.openai.tokens import token_routes
from inferflux_core.serving.openapi import install_openapi
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
        middleware=[Middleware(RequestEnvelope, metrics=services.metrics, host_check=HostCheck(services.settings.server.host))],
    )
    install_error_handlers(app)
    for routes in (chat_routes, completion_routes, model_routes, token_routes, health_routes):
        app.include_router(routes(services))
    install_openapi(app)
    return app
