"""`/v1/admin/models`: loading and unloading models while the server runs, and which one is the default."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Self

import msgspec
from fastapi import APIRouter
from pydantic import AfterValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.config import served_name
from inferflux_core.errors import ConfigError, DrainingError, InvalidRequestError, UnavailableError
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.serving.admin.body import AdminBodyReader
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services
from inferflux_core.settings import Group, ModelSettings

PATH = "/v1/admin/models"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("it must be 1 to 128 of A-Z a-z 0-9 . _ : / @ + - and begin with a letter or digit")
    return text


ModelName = Annotated[str, AfterValidator(_name)]


class LoadBody(Group):
    """A model to load. Exactly one of `source` and `path`."""

    source: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="`demo`, `hf:owner/repo[:file-or-quantisation][@revision]`, or a path within `model_roots`."
    )
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(None, description="The same, by its older name.")
    id: ModelName | None = Field(None, description="Name clients use; by default made from the source.")
    aliases: Annotated[tuple[ModelName, ...], Field(max_length=16)] = Field((), description="Further names of it.")
    backend: Annotated[str, Field(min_length=1, max_length=64)] = Field("auto", description="Name of a backend, or `auto`.")
    max_model_len: Annotated[int, Field(ge=16)] | None = Field(None, description="Most tokens of a sequence.")
    default: bool = Field(False, description="Make it the default model once it is ready.")
    wait: bool = Field(False, description="Answer when it is ready or has failed, instead of at once.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise InvalidRequestError("Send exactly one of 'source' and 'path'.", param="source")
        return self

    def settings(self) -> ModelSettings:
        """The model as the configuration would have it.

        Raises:
            InvalidRequestError: the source makes a name that clients could not use.
        """
        settings = ModelSettings(
            source=self.source or self.path or "",
            name=self.id,
            aliases=self.aliases,
            backend=self.backend,
            max_model_len=self.max_model_len,
            default=self.default,
        )
        if not _NAME.fullmatch(name := served_name(settings)):
            raise InvalidRequestError(
                f"The source makes the name {name[:128]!r}, which is no good one; send an 'id'.", param="id"
            )
        return settings


class ModelId(Group):
    """Names one model."""

    id: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="Name or alias of the model.")


class AdminModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as administrators see it. `state` is `loading`, `ready`, `restarting`, `failed` or `unloading`."""

    id: str
    aliases: Sequence[str]
    source: str
    backend: str
    state: str
    default: bool
    created: int
    max_model_len: int | None
    load_seconds: float | None
    restarts: int
    requests_running: int
    requests_waiting: int
    last_error: str | None


class AdminModels(msgspec.Struct, frozen=True):
    """All models."""

    data: list[AdminModel]
    object: str = "list"


class ModelStatus(msgspec.Struct, frozen=True):
    """What became of a model: `loading`, `ready` or `unloaded`."""

    status: str
    id: str


class DefaultModel(msgspec.Struct, frozen=True):
    """The default model."""

    status: str
    default_model: str


def manager_of(services: Services) -> ModelManager:
    """The models, where they can be changed.

    Raises:
        UnavailableError: they cannot.
    """
    if not isinstance(services.models, ModelManager):
        raise UnavailableError("The models of this server cannot be changed while it runs.", code="router_unavailable")
    return services.models


def model_routes(services: Services) -> APIRouter:
    """The routes that change which models there are. They last until a restart: the configuration stays as it is."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)

    async def unload(request: Request, name: str) -> Response:
        manager = manager_of(services)
        model = await manager.remove(name, drain_s=services.settings.server.drain_timeout_s)
        await record(services, request, "model.unloaded", model=model.name)
        return tagged(encode(ModelStatus("unloaded", model.name)))

    @router.get(PATH, **documented(None, AdminModels))
    @needs("api/models", "admin")
    async def list_models() -> Response:
        """All models, those that failed too, and why."""
        return tagged(encode(AdminModels([_shown(model) for model in manager_of(services).list()])))

    @router.post(PATH, **documented(LoadBody, ModelStatus, statuses=(202,), changes=True))
    @needs("api/models", "admin")
    async def load_model(request: Request) -> Response:
        """Load a model beside the others. 202 while it is loading; with `wait`, 200 when it is ready or 400 `load_failed`."""
        body = await reader.read(request, LoadBody)
        if services.state.draining:
            raise DrainingError("The server is shutting down and loads no more models.")
        manager, settings = manager_of(services), body.settings()
        try:
            model = manager.add(settings)
        except ConfigError as error:
            raise _load_failed(settings, str(error)) from None
        await record(
            services, request, "model.load_requested", model=model.name, source=settings.source, default=settings.default
        )
        if not body.wait:
            return tagged(encode(ModelStatus(model.state, model.name)), status=202)
        await manager.loaded(model)
        if (reason := model.last_error) is not None and model.state == "failed":
            if not model.is_default:
                await manager.remove(model.name, drain_s=0)  # who asked knows now; nothing is left behind
            raise _load_failed(settings, reason)
        return tagged(encode(ModelStatus(model.state, model.name)))

    @router.delete(PATH, **documented(ModelId, ModelStatus, changes=True))
    @needs("api/models", "admin")
    async def unload_model_of_body(request: Request) -> Response:
        """Unload the model that the body names."""
        return await unload(request, (await reader.read(request, ModelId)).id)

    @router.delete(PATH + "/{model_id:path}", **documented(None, ModelStatus, changes=True))
    @needs("api/models", "admin")
    async def unload_model(request: Request, model_id: str) -> Response:
        """Unload a model: it takes no more requests, and those it has get `server.drain_timeout_s`. Not the default one."""
        return await unload(request, model_id)

    @router.put(PATH + "/default", **documented(ModelId, DefaultModel, changes=True))
    @needs("api/models", "admin")
    async def set_default_model(request: Request) -> Response:
        """Make a ready model the one for requests that name none."""
        model = manager_of(services).set_default((await reader.read(request, ModelId)).id)
        await record(services, request, "model.default_changed", model=model.name)
        return tagged(encode(DefaultModel("ok", model.name)))

    return router


def _shown(model: ServedModel) -> AdminModel:
    stats = model.stats
    return AdminModel(
        id=model.name,
        aliases=model.aliases,
        source=model.settings.source,
        backend=model.backend,
        state=model.state,
        default=model.is_default,
        created=model.created,
        max_model_len=model.max_model_len,
        load_seconds=model.load_seconds,
        restarts=model.restarts,
        requests_running=stats.num_running,
        requests_waiting=stats.num_waiting,
        last_error=model.last_error,
    )


def _load_failed(settings: ModelSettings, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The model {settings.source!r} cannot be loaded: {reason}", code="load_failed", param="source")
