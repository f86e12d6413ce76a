"""One model of the server, from before it is loaded until it is unloaded or the server stops."""

from __future__ import annotations

import asyncio
import time

from inferflux_core.engine.client import EngineClient, EngineState
from inferflux_core.engine.engine_spec import SpeculativeSpec
from inferflux_core.engine.types import EngineStats
from inferflux_core.errors import InvalidRequestError, ModelLoadingError
from inferflux_core.interfaces import ModelFiles, Tokenizer
from inferflux_core.models.chat_format import ChatFormat
from inferflux_core.settings import ModelSettings

UNLOADING = "unloading"
"""State of a model that finishes the requests it has and takes no more."""

RETRY_SECONDS = 2.0


class ServedModel:
    """What is known of a model, and the parts that serve it.

    Attributes:
        chat: how it is talked with; None before it is loaded, and for a model without a chat template.
        unloading: it takes no more requests; its engine ends when those it has are done, or when their time is up.
    """

    def __init__(self, name: str, settings: ModelSettings, is_default: bool = False) -> None:
        self.name = name
        self.settings = settings
        self.aliases = settings.aliases
        self.is_default = is_default
        self.created = int(time.time())
        self.backend = settings.backend
        self.files: ModelFiles | None = None
        self.speculative = SpeculativeSpec()
        self.engine: EngineClient | None = None
        self.tokenizer: Tokenizer | None = None
        self.chat: ChatFormat | None = None
        self.fingerprint = "fp_inferflux"
        self.unloading = False
        self._failure: str | None = None

    def fail(self, reason: str) -> None:
        """It could not be loaded; the other models go on."""
        self._failure = reason
        self.engine = None

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical name, then the aliases."""
        return (self.name, *self.aliases)

    @property
    def state(self) -> str:
        """`loading`, `ready`, `restarting`, `failed`, `unloading`, or `stopped` at the end of the server."""
        if self.unloading:
            return UNLOADING
        if self._failure is not None:
            return EngineState.FAILED
        if self.engine is None or (self.tokenizer is None and self.engine.state is EngineState.READY):
            return EngineState.LOADING
        return self.engine.state

    @property
    def max_model_len(self) -> int | None:
        info = None if self.engine is None else self.engine.model_info
        return None if info is None else info.max_model_len

    @property
    def details(self) -> dict[str, str]:
        info = None if self.engine is None else self.engine.model_info
        if info is None:
            return {}
        formats = () if self.chat is None else (("tool_parser", self.chat.tools), ("reasoning_parser", self.chat.reasoning))
        return {**info.details, **{key: format.name for key, format in formats if format is not None}}

    @property
    def restarts(self) -> int:
        return 0 if self.engine is None else self.engine.restarts

    @property
    def stats(self) -> EngineStats:
        return EngineStats() if self.engine is None else self.engine.stats

    @property
    def last_error(self) -> str | None:
        return self._failure if self.engine is None else self.engine.last_error

    @property
    def load_seconds(self) -> float | None:
        return None if self.engine is None else self.engine.load_seconds

    @property
    def making_progress(self) -> bool:
        return self.engine is not None and self.engine.making_progress

    @property
    def is_idle(self) -> bool:
        """Whether its engine has no request, running or waiting."""
        return self.engine is None or self.engine.num_requests == 0

    def ready_engine(self) -> EngineClient:
        """Raises ModelLoadingError unless requests are taken now."""
        if self.engine is None or self.state != EngineState.READY:
            reason = "could not be loaded" if self._failure is not None else f"is not ready ({self.state})"
            raise ModelLoadingError(f"The model {self.name!r} {reason}. Please retry later.", retry_after=RETRY_SECONDS)
        return self.engine

    def ready_tokenizer(self) -> Tokenizer:
        """Raises ModelLoadingError before it is loaded. It stays while the engine restarts."""
        if self.tokenizer is None:
            raise ModelLoadingError(f"The model {self.name!r} is not loaded. Please retry later.", retry_after=RETRY_SECONDS)
        return self.tokenizer

    def ready_chat(self) -> ChatFormat:
        """Raises ModelLoadingError before it is loaded, and InvalidRequestError if it has no chat template."""
        self.ready_tokenizer()
        if self.chat is None:
            raise InvalidRequestError(
                f"The model {self.name!r} has no chat template; use /v1/completions, or set `chat_template` of the model.",
                param="messages",
            )
        return self.chat

    async def end(self) -> None:
        """End the engine and the template's process. Requests still running fail with ModelLoadingError."""
        if self.engine is not None:
            await self.engine.stop()
        if self.chat is not None:
            chat, self.chat = self.chat, None
            await asyncio.to_thread(chat.template.close)
