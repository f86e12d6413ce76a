"""`/v1/admin/cache`: how much the prefix cache helps, and filling it before the first request."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.access.keys.records import Tenant
from inferflux_core.errors import InvalidRequestError
from inferflux_core.serving.admin.body import AdminBodyReader
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import tagged
from inferflux_core.serving.disconnect import while_connected
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import GenerationRequest, Prompt, RequestContext
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.answer import collect
from inferflux_core.serving.openai.messages import Message, to_chat_prompt
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import ModelView, Services
from inferflux_core.settings import Group

PATH = "/v1/admin/cache"
WARM = PATH + "/warm"


class WarmBody(Group):
    """A prefix to compute now. Exactly one of `prompt` and `messages`."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Name or alias of a model; by default the default one."
    )
    prompt: Annotated[str, Field(min_length=1)] | None = Field(None, description="Text, as /v1/completions reads it.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="Messages, as /v1/chat/completions reads them."
    )
    tenant: Tenant | None = Field(None, description="Whose requests find the prefix; by default the caller's own tenant.")

    @model_validator(mode="after")
    def _one_prefix(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return self


class KvUsage(msgspec.Struct, frozen=True):
    """How full the KV cache is, between 0 and 1: running sequences and prefixes together."""

    usage_ratio: float


class CacheMemory(msgspec.Struct, frozen=True):
    """Where prefixes are kept."""

    paged_kv: KvUsage


class ModelCache(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix cache of one model since its engine started. A request hits if any part of its prompt was there.

    Attributes:
        matched_tokens: prompt tokens that came from the cache.
        prompt_tokens: all prompt tokens.
    """

    model: str
    enabled: bool
    hits: int
    misses: int
    hit_rate: float
    matched_tokens: int
    prompt_tokens: int
    memory: CacheMemory


class CacheReply(msgspec.Struct, frozen=True):
    """The prefix caches of all models."""

    data: list[ModelCache]
    object: str = "list"


class WarmReply(msgspec.Struct, frozen=True):
    """What was computed: `cached_tokens` of `tokens` had been there already. Null for another tenant than the caller's: it
    would tell what that tenant's prompts begin with."""

    status: str
    model: str
    tenant: str
    tokens: int
    cached_tokens: int | None


def cache_routes(services: Services) -> APIRouter:
    """The routes of the prefix cache."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)
    enabled = services.settings.engine.enable_prefix_caching

    @router.get(PATH, **documented(None, CacheReply))
    @needs("api/cache", "admin")
    async def show_cache() -> Response:
        """How often prompts were found in the prefix cache, by model."""
        return tagged(encode(CacheReply([_shown(view, enabled) for view in services.models.list()])))

    @router.post(WARM, **documented(WarmBody, WarmReply, changes=True))
    @needs("api/cache", "admin")
    async def warm_cache(request: Request) -> Response:
        """Compute a prefix, so that the tenant's requests that begin with it need not. Goes the way of every request: it is
        checked, counted and limited as one of the caller's, whoever it is for."""
        body = await reader.read(request, WarmBody)
        prompt: Prompt = (body.prompt or "") if body.messages is None else to_chat_prompt(body.messages)
        exchange = Exchange.of(request.scope)
        own = exchange.principal.tenant
        tenant = own if body.tenant is None else body.tenant
        context = RequestContext(
            endpoint=WARM,
            deadline=exchange.arrival + services.settings.server.request_timeout_s,
            request_id=exchange.request_id,
            arrival=exchange.arrival,
            principal=exchange.principal,
            judged=exchange.judged,
            cache_tenant=tenant,
        )
        generation = GenerationRequest(
            model=body.model,
            prompts=[prompt],
            max_tokens=1,
            temperature=0.0,
            prompt_param="prompt" if body.messages is None else "messages",
        )
        exchange.context = context
        exchange.in_pipeline = True
        events = services.pipeline.generate(context, generation)
        answer = await while_connected(request.receive, collect(events, 1, exchange))
        usage, model = answer.usage, answer.started.model
        await record(services, request, "cache.warmed", model=model, tenant=tenant, tokens=usage.prompt_tokens)
        cached_tokens = usage.cached_tokens if tenant == own else None
        return tagged(encode(WarmReply("ok", model, tenant, usage.prompt_tokens, cached_tokens)))

    return router


def _shown(view: ModelView, enabled: bool) -> ModelCache:
    stats = view.stats
    queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
    return ModelCache(
        model=view.name,
        enabled=enabled,
        hits=hits,
        misses=queries - hits,
        hit_rate=round(hits / queries, 4) if queries else 0.0,
        matched_tokens=stats.cached_prompt_tokens,
        prompt_tokens=stats.prompt_tokens,
        memory=CacheMemory(KvUsage(stats.kv_cache_usage)),
    )
