"""A server whose pipeline follows a script and whose models are in whatever state a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute

from inferflux_core.access.services import AccessServices
from inferflux_core.engine.types import EngineStats
from inferflux_core.errors import ModelLoadingError, ModelNotFoundError
from inferflux_core.interfaces import Tokenizer
from inferflux_core.serving.app import create_app
from inferflux_core.serving.generation import (
    ChatPrompt,
    Delta,
    Done,
    Event,
    GenerationRequest,
    Prompt,
    ReasoningOptions,
    RequestContext,
    Started,
    TokenEntry,
    TokenText,
    ToolRequest,
    Usage,
)
from inferflux_core.serving.services import ModelView, ServerState, Services
from inferflux_core.settings import ServerSettings, Settings
from inferflux_core.telemetry.metrics import Metrics

STARTED = Started("tiny", "fp_test", ["Say hi"])
USAGE = Usage(prompt_tokens=9, completion_tokens=3, cached_tokens=8, reasoning_tokens=1)
HELLO: tuple[Event, ...] = (STARTED, Delta(0, "Hel"), Delta(0, "lo", finish_reason="stop"), Done(USAGE))
CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "Say hi"}]}

Step = Event | BaseException | asyncio.Event


@dataclass
class ScriptedPipeline:
    """Yields events, raises exceptions and waits for gates, in the order of the script.

    Attributes:
        requests: what it was called with.
        closed: set when a generator ended, by whatever means.
        completed: generators that reached the end of the script.
    """

    steps: Sequence[Step] = HELLO
    requests: list[tuple[RequestContext, GenerationRequest]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    completed: int = 0

    async def generate(self, context: RequestContext, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append((context, request))
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
            self.completed += 1
        finally:
            self.closed.set()


class ByteTokenizer(Tokenizer):
    """Token id = byte; 256 is `<s>`."""

    vocab_size = 257
    eos_token_ids = frozenset({256})
    bos_token = "<s>"
    eos_token = "<s>"
    chat_template = None
    special_tokens = frozenset({"<s>"})

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = [256] if add_special else []
        for index, piece in enumerate(text.split("<s>") if parse_special else [text]):
            ids += [256] if index else []
            ids += piece.encode()
        return ids

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<s>" if special else b""


@dataclass
class FakeModel:
    name: str = "tiny"
    aliases: tuple[str, ...] = ()
    is_default: bool = True
    state: str = "ready"
    created: int = 1763900000
    backend: str = "fake"
    max_model_len: int | None = 4096
    details: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    stats: EngineStats = field(default_factory=EngineStats)
    tokenizer: Tokenizer | None = field(default_factory=ByteTokenizer)
    last_error: str | None = None
    load_seconds: float | None = 1.5
    making_progress: bool = True


@dataclass
class FakeModels:
    views: list[FakeModel] = field(default_factory=lambda: [FakeModel()])

    def list(self) -> Sequence[FakeModel]:
        return self.views

    def get(self, name: str | None) -> FakeModel:
        for view in self.views:
            if name in (view.name, *view.aliases) or (name is None and view.is_default):
                return view
        raise ModelNotFoundError(f"The model {name!r} does not exist.", param="model")

    async def tokenize(self, view: ModelView, prompt: Prompt, add_special: bool, parse_special: bool) -> Sequence[int]:
        if view.tokenizer is None:
            raise ModelLoadingError(f"Model {view.name!r} is loading.", param="model", retry_after=2.5)
        if isinstance(prompt, list):
            return prompt
        text = self.render_chat(view, prompt) if isinstance(prompt, ChatPrompt) else prompt
        return view.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def chat_prompt(
        self, view: ModelView, prompt: ChatPrompt, tools: ToolRequest | None, reasoning: ReasoningOptions
    ) -> ChatPrompt:
        shown = None if tools is None else [{"type": "function", "function": {"name": f.name}} for f in tools.functions]
        return replace(prompt, tools=shown)

    def render_chat(self, view: ModelView, prompt: ChatPrompt) -> str:
        names = "".join(f"[{tool['function']['name']}]" for tool in prompt.tools or ())
        return names + "".join(f"<{message['role']}>{message['content']}" for message in prompt.messages)


@dataclass
class Stand:
    """One application with everything around it, for a test to look at."""

    pipeline: ScriptedPipeline
    models: FakeModels
    settings: Settings
    metrics: Metrics
    state: ServerState
    access: AccessServices
    app: FastAPI

    def routes(self) -> list[APIRoute]:
        """Every route of the application."""
        return [route for route in self.app.routes if isinstance(route, APIRoute)]

    def client(self, base_url: str = "http://127.0.0.1") -> httpx.AsyncClient:
        """A client that calls the application without a network."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=base_url)

    def sample(self, line: str) -> float:
        """Value of one sample, e.g. `inferflux_errors_total{reason="x"}`; 0 if it is not there."""
        page = self.metrics.scrape()[0].decode()
        values = [text.removeprefix(line + " ") for text in page.splitlines() if text.startswith(line + " ")]
        return float(values[0]) if values else 0.0


def stand(
    *steps: Step,
    models: FakeModels | None = None,
    settings: Settings | None = None,
    access: AccessServices | None = None,
    metrics: Metrics | None = None,
    **server: object,
) -> Stand:
    """An application whose pipeline follows `steps`; keyword arguments are server settings."""
    pipeline = ScriptedPipeline(steps or HELLO)
    models = models or FakeModels()
    settings = settings or Settings(server=ServerSettings.model_validate(server))
    metrics, state = metrics or Metrics(), ServerState()
    access = access or AccessServices.open(settings, metrics)
    app = create_app(Services(pipeline=pipeline, models=models, access=access, settings=settings, metrics=metrics, state=state))
    return Stand(pipeline, models, settings, metrics, state, access, app)


class _Server(uvicorn.Server):
    """uvicorn that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """A real server for the application on a free loopback port."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Requests that should have ended and did not are cancelled after two seconds, so that a test fails instead of hanging.
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None, timeout_graceful_shutdown=2
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    await server.listening.wait()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


def entry(token: str, logprob: float, *top: tuple[str, float]) -> TokenEntry:
    """A token entry whose bytes are the UTF-8 of its text."""
    texts = [TokenText(text, text.encode(), value) for text, value in top]
    return TokenEntry(TokenText(token, token.encode(), logprob), texts)
