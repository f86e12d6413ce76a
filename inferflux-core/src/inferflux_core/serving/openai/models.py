"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.serving.error_responses import json_response
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.guard import GuardedRoute, model_checked, principal_of
from inferflux_core.serving.openai.wire import ModelExtras, ModelList, ModelObject, encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import ModelView, Services


def model_object(view: ModelView) -> ModelObject:
    """A model as OpenAI describes one, with what only this server knows under `inferflux`."""
    return ModelObject(
        id=view.name,
        created=view.created,
        inferflux=ModelExtras(
            backend=view.backend,
            max_model_len=view.max_model_len,
            aliases=view.aliases,
            default=view.is_default,
            state=view.state,
            details=view.details,
        ),
    )


def model_routes(services: Services) -> APIRouter:
    """The routes that tell which models there are."""
    router = APIRouter(tags=["OpenAI"], route_class=GuardedRoute)
    admission = services.access.admission

    @router.get("/v1/models", **documented(None, ModelList, errors=(401,)))
    @model_checked
    async def list_models(request: Request) -> Response:
        """The models that this credential may see, loaded or not, in the order of the configuration."""
        views: Sequence[ModelView] = admission.visible(principal_of(request.scope), services.models.list())
        return json_response(encode(ModelList(data=[model_object(view) for view in views])))

    @router.get("/v1/models/{model_id:path}", **documented(None, ModelObject, errors=(401, 404)))
    @model_checked
    async def retrieve_model(request: Request, model_id: str) -> Response:
        """One model by its name, which may contain slashes, or by an alias."""
        exchange = Exchange.of(request.scope)
        view: ModelView = admission.see(exchange.principal, services.models, model_id, exchange.judged)
        return json_response(encode(model_object(view)))

    return router
