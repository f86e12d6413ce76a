"""What the protocol adapters may use of the rest of the server: the pipeline, the models, settings, metrics and state.

The two protocols say what adapters need, not who provides it, so that an adapter can be tested with scripted ones.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from inferflux_core.access.services import AccessServices
from inferflux_core.engine.types import EngineStats
from inferflux_core.interfaces import Tokenizer
from inferflux_core.serving.generation import (
    ChatPrompt,
    Event,
    GenerationRequest,
    Prompt,
    ReasoningOptions,
    RequestContext,
    ToolRequest,
)
from inferflux_core.settings import Settings
from inferflux_core.telemetry.metrics import Metrics


class ModelView(Protocol):
    """One configured model as clients and operators may see it.

    Attributes:
        name: canonical name.
        aliases: further names that lead to this model.
        is_default: whether requests that name no model go here.
        state: `loading`, `ready`, `restarting`, `failed` or `unloading`.
        created: Unix seconds at which the server was told about it.
        backend: name of the backend that serves it.
        max_model_len: most tokens of one sequence; None until it is loaded.
        details: free text for people, such as architecture and quantisation.
        restarts: how often its engine process was replaced.
        stats: gauges and counters of its engine, of the last report.
        tokenizer: None until it is loaded.
        last_error: why it failed or restarted last, for people; None if it never did.
        load_seconds: how long the last load took; None until it is loaded.
        making_progress: False when work is queued and no step has finished for too long.
    """

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def is_default(self) -> bool: ...
    @property
    def state(self) -> str: ...
    @property
    def created(self) -> int: ...
    @property
    def backend(self) -> str: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def details(self) -> dict[str, str]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def last_error(self) -> str | None: ...
    @property
    def load_seconds(self) -> float | None: ...
    @property
    def making_progress(self) -> bool: ...


ViewT = TypeVar("ViewT", bound=ModelView)


class Models(Protocol[ViewT]):
    """The configured models. Views go back to where they came from, so their concrete type is the provider's affair."""

    def list(self) -> Sequence[ViewT]:
        """All of them, in the order of the configuration."""

    def get(self, name: str | None) -> ViewT:
        """The model of this name or alias; None means the default one.

        Raises:
            ModelNotFoundError: no model has this name.
        """

    async def tokenize(self, view: ViewT, prompt: Prompt, add_special: bool, parse_special: bool) -> Sequence[int]:
        """Token ids of a prompt, off the event loop.

        Raises:
            ModelLoadingError: the tokenizer is not there yet.
            InvalidRequestError: the chat template refused the messages.
        """

    def chat_prompt(
        self, view: ViewT, prompt: ChatPrompt, tools: ToolRequest | None, reasoning: ReasoningOptions
    ) -> ChatPrompt:
        """A conversation as the model's chat template wants it, with tools and what was said of thoughts.

        Raises:
            ModelLoadingError: the model is not there yet.
            InvalidRequestError: there is no template, it does not know a variable of the request, or the model calls no tools.
        """

    def render_chat(self, view: ViewT, prompt: ChatPrompt) -> str:
        """The text that the model's chat template makes of messages. Blocks; call it in a thread.

        Raises:
            ModelLoadingError: the tokenizer is not there yet.
            InvalidRequestError: the chat template refused the messages, or there is none.
        """


class Generation(Protocol):
    """The one generation path (`serving/pipeline.py`)."""

    def generate(self, context: RequestContext, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answer a request: `Started`, then `Delta`s, then `Done`.

        A `RequestError` before the first event means that nothing was generated. Closing the generator, or cancelling the
        task that waits for its next event, aborts the request in the engine.
        """


@dataclass(slots=True)
class ServerState:
    """What the server process is doing.

    Attributes:
        draining: a shutdown began; no new work is taken.
        started: `time.monotonic()` when the process began to serve.
    """

    draining: bool = False
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything an adapter needs, handed to `create_app`.

    Attributes:
        configuration: the effective configuration as JSON, with origins and without secrets; None where there is none.
    """

    pipeline: Generation
    models: Models[Any]
    access: AccessServices
    settings: Settings
    metrics: Metrics
    state: ServerState
    configuration: Callable[[], str] | None = None
