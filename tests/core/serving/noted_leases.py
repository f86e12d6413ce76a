"""A pipeline over an engine in a thread, with a limiter that notes what is done with each lease."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from inferflux_core.access.admission import Admission
from inferflux_core.access.audit.log import NoAudit
from inferflux_core.access.audit.strangers import Strangers
from inferflux_core.access.limits.failures import FailureLimit
from inferflux_core.access.limits.quotas import Demand, Lease, Limiter, LimitRules, LimitTable
from inferflux_core.access.services import AccessServices
from inferflux_core.engine.client import EngineClient
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.inprocess import InProcessEngineClient
from inferflux_core.engine.types import EngineRequest
from inferflux_core.errors import AccessUnavailableError, RateLimitError, RequestError
from inferflux_core.identity import Principal
from inferflux_core.models.manager import ModelManager
from inferflux_core.plugins import load_plugins
from inferflux_core.serving.generation import Event, GenerationRequest, RequestContext
from inferflux_core.serving.grammars import RequestGrammars
from inferflux_core.serving.pipeline import Pipeline
from inferflux_core.serving.services import ServerState
from inferflux_core.settings import Settings
from inferflux_core.telemetry.metrics import Metrics

ENDLESS = 4000
PROMPT = "twelve bytes"
KEY = Principal(subject="key:k1", tenant="acme", method="api_keys")


class Watched(InProcessEngineClient):
    """An engine in a thread that says what it was given, and fails when it is told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given: list[EngineRequest] = []

    def _send(self, requests: list[EngineRequest]) -> None:
        self.given += requests
        super()._send(requests)

    def crash(self) -> None:
        self._on_crash("a test")


@dataclass
class Book(Limiter):
    """Lets everything pass unless told otherwise, and notes what is done with each lease."""

    entries: list[str] = field(default_factory=list)
    refuse: str = ""
    demands: Sequence[Demand] = ()

    async def acquire(self, demands: Sequence[Demand], model: str, slots: int = 1) -> Lease:
        self.demands = demands
        if self.refuse == "acquire":
            raise RateLimitError("no", kind="requests", retry_after=1.0, limit_headers={"x-ratelimit-remaining-requests": "0"})
        self.entries.append(f"acquire {model}")
        return _Noted(self)


class _Noted(Lease):
    def __init__(self, book: Book) -> None:
        self._book = book

    @property
    def headers(self) -> dict[str, str]:
        return {"x-ratelimit-remaining-tokens": str(len(self._book.entries))}

    async def reserve_tokens(self, tokens: int) -> None:
        if self._book.refuse == "reserve":
            raise RateLimitError("no", kind="tokens", retry_after=1.0)
        if self._book.refuse == "store":
            raise AccessUnavailableError("no", code="limits_unavailable")
        self._book.entries.append(f"reserve {tokens}")

    async def settle(self, used_tokens: int) -> None:
        self._book.entries.append(f"settle {used_tokens}")


@dataclass
class Remembering(NoAudit):
    enabled = True
    keeps_content: bool = True

    def content(self, text: str) -> dict[str, Any]:
        return {"prompt": text}


@dataclass
class Stand:
    pipeline: Pipeline
    book: Book
    models: ModelManager
    state: ServerState
    metrics: Metrics

    @property
    def engine(self) -> Watched:
        engine = self.models.get(None).ready_engine()
        assert isinstance(engine, Watched)
        return engine

    async def idle(self) -> None:
        """Wait until nothing runs any more, in the engine either."""
        await self.pipeline.wait_until_idle()
        assert self.engine.num_requests == 0

    async def ask(self, principal: Principal = KEY, **fields: Any) -> tuple[list[Event], RequestContext]:
        context = made(principal)
        return [event async for event in self.pipeline.generate(context, request(**fields))], context

    async def refused(self, error: type[RequestError], **fields: Any) -> RequestContext:
        context = made(KEY)
        with pytest.raises(error):
            await exhaust(self.pipeline.generate(context, request(**fields)))
        return context


def made(principal: Principal, seconds: float = 30.0) -> RequestContext:
    return RequestContext(endpoint="/test", deadline=time.monotonic() + seconds, principal=principal)


def request(**fields: Any) -> GenerationRequest:
    values = {"model": "tiny", "prompts": [PROMPT], "max_tokens": 4, "temperature": 0.0, "add_special_tokens": False, **fields}
    return GenerationRequest(**{"ignore_eos": True, **values})


@contextlib.asynccontextmanager
async def standing(
    table: LimitTable | None = None, grammars: RequestGrammars | None = None, **groups: Any
) -> AsyncIterator[Stand]:
    models = [{"source": "fake", "name": "tiny", "aliases": ["small"]}]
    settings = Settings.model_validate({"models": models, **groups})
    registry, metrics, book, state = load_plugins(), Metrics(), Book(), ServerState()

    def engine(name: str, spec: EngineSpec) -> EngineClient:
        return Watched(name, spec, settings.engine, registry)

    rules = LimitRules(table or LimitTable())
    admission = Admission(
        providers=(),
        metadata_url=None,
        policy=None,
        limiter=book,
        limit_rules=rules,
        failures=FailureLimit(20),
        metrics=metrics,
    )
    audit = Remembering()
    access = AccessServices(
        admission=admission, limiter=book, limit_rules=rules, audit=audit, strangers=Strangers(audit, lambda: None)
    )
    manager = ModelManager(settings, registry, engine)
    await manager.load()
    try:
        yield Stand(Pipeline(manager, access, metrics, state, grammars), book, manager, state, metrics)
    finally:
        await manager.stop()


async def exhaust(events: AsyncGenerator[Event, None]) -> None:
    """Read all events."""
    async for _ in events:
        pass
