"""The models that are served: loading and unloading them, finding them by name, and turning prompts into their tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from inferflux_core.config import served_name
from inferflux_core.engine.client import EngineState
from inferflux_core.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
)
from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.model_loader import EngineFactory, ModelLoader
from inferflux_core.models.prompts import ChatPrompt, Prompt
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.models.routing import Routing
from inferflux_core.models.served_model import RETRY_SECONDS, ServedModel
from inferflux_core.models.sources import HUB_PREFIX
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.plugins import PluginRegistry
from inferflux_core.setting_paths import is_path
from inferflux_core.settings import ModelSettings, Settings

__all__ = ["EngineFactory", "ModelManager", "ServedModel"]

logger = logging.getLogger("inferflux.models")

Segments = Sequence[tuple[str, bool]]  # text, and whether control tokens in it are meant

# Shorter texts are tokenised in the event loop: handing them to a thread would take longer.
_INLINE_CHARACTERS = 2048
# Engines change their state without an event: how often, in seconds, those who wait for one look.
_LOOK_SECONDS = 0.05
_WAITED_FOR = (EngineState.LOADING, EngineState.RESTARTING)


class ModelManager:
    """All models: those of the configuration, and those that administrators load while the server runs.

    Call it in the event loop. What it lists changes as a whole: a list that was handed out stays as it was.

    Attributes:
        routing: rules for requests that name no model or one that is not ready; may be replaced at any time.
    """

    def __init__(self, settings: Settings, registry: PluginRegistry, engine_factory: EngineFactory) -> None:
        self.routing = Routing()
        self._settings = settings
        self._registry = registry
        self._loader = ModelLoader(settings, registry, engine_factory)
        chosen = next((m for m in settings.models if m.default), settings.models[0])
        self._models: tuple[ServedModel, ...] = ()
        self._by_name: dict[str, ServedModel] = {}
        self._set(tuple(ServedModel(served_name(m), m, m is chosen) for m in settings.models))
        self._loads: dict[ServedModel, asyncio.Task[None]] = {}
        self._unloads: set[asyncio.Task[None]] = set()
        self._waiting = 0

    def _set(self, models: tuple[ServedModel, ...]) -> None:
        self._models = models
        self._by_name = {name: model for model in models for name in model.names}

    def get(self, name: str | None) -> ServedModel:
        """The model of this name or alias; None means the default one.

        Raises:
            ModelNotFoundError: no model has this name.
            InvalidRequestError: None, and the routing rules want a name.
        """
        if name is None:
            if not self.routing.allow_default_fallback:
                raise InvalidRequestError(
                    "Missing required parameter: 'model'. This server has no default for it (allow_default_fallback is "
                    "off); GET /v1/models lists the models there are.",
                    param="model",
                )
            return next(model for model in self._models if model.is_default)
        return self._named(name)

    def _named(self, name: str) -> ServedModel:
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"The model {name[:128]!r} does not exist; GET /v1/models lists the models there are.", param="model"
            )
        return model

    async def wait_ready(self, model: ServedModel, deadline: float) -> None:
        """Returns at once, or, if the routing rules say that requests wait for a model, when it is not loading any more.

        Whether it is ready then, `ServedModel.ready_engine` tells.

        Args:
            deadline: `time.monotonic()` up to which to wait.

        Raises:
            RequestTimeoutError: the deadline came first.
            OverloadedError: as many wait already as may (`engine.max_waiting_requests`).
        """
        if self.routing.require_ready_backend or model.state not in _WAITED_FOR:
            return
        if self._waiting >= self._settings.engine.max_waiting_requests:
            raise OverloadedError(
                f"{self._waiting} requests are waiting for models that are not ready. Please retry later.",
                retry_after=RETRY_SECONDS,
            )
        self._waiting += 1
        try:
            while model.state in _WAITED_FOR:
                if time.monotonic() >= deadline:
                    raise RequestTimeoutError(
                        f"The model {model.name!r} did not become ready ({model.state}) in the time of this request. Please "
                        f"retry later."
                    )
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._waiting -= 1

    # --- loading and unloading ----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load all models of the configuration side by side. One that fails is marked and logged; the others go on.

        Raises:
            ConfigError: not a single model could be loaded.
        """
        models = self._models
        await asyncio.gather(*(self._loader.load(model, show_progress=True) for model in models))
        failed = [model for model in models if model.state == EngineState.FAILED]
        if len(failed) == len(models):
            raise ConfigError("\n".join(f"model {model.name!r}: {model.last_error}" for model in failed))

    def add(self, settings: ModelSettings) -> ServedModel:
        """Take one more model and begin to load it; `loaded` waits for the end. With `settings.default` it becomes the
        default once it is ready. A model of the same name that had failed is replaced.

        Until a restart: what is loaded here is not written into the configuration.

        Raises:
            ConflictError: a name is taken.
            ModelFileError: the source may not be loaded while the server runs.
            PluginError: there is no such backend, or it refuses the settings.
        """
        self._check_source(settings)
        if settings.backend != "auto":
            values = {**self._settings.backends.get(settings.backend, {}), **settings.backend_settings}
            self._registry.settings("backend", settings.backend, values)
        model = ServedModel(served_name(settings), settings)
        before = self._by_name.get(model.name)
        replaced = before if before is not None and before.name == model.name and before.state == EngineState.FAILED else None
        for name in model.names:
            owner = self._by_name.get(name)
            if owner is not None and owner is not replaced:
                raise ConflictError(
                    f"The name {name!r} belongs to the model {owner.name!r} ({owner.state}). Choose another, or unload that "
                    f"model first.",
                    param="id",
                )
        model.is_default = replaced is not None and replaced.is_default
        self._set((*(m for m in self._models if m is not replaced), model))
        task = self._loads[model] = asyncio.create_task(self._load_added(model), name=f"load {model.name}")
        task.add_done_callback(lambda _: self._loads.pop(model, None))
        return model

    def _check_source(self, settings: ModelSettings) -> None:
        """The configuration is trusted with any path; who calls the API is not."""
        source = settings.source
        if is_path(source) and self._settings.model_roots is None:
            raise ModelFileError(
                "models can be loaded from a path only if the configuration says from which folders; set model_roots"
            )
        if source.startswith(HUB_PREFIX) and self._settings.hub.offline:
            raise ModelFileError(f"{source!r} would have to be downloaded, and hub.offline is on; load it from a path")

    async def _load_added(self, model: ServedModel) -> None:
        try:
            await self._loader.load(model, show_progress=False)
        except Exception:  # of a plugin, say: this model fails, and the server goes on
            logger.exception("model %r could not be loaded", model.name)
            await model.end()
            model.fail("an unexpected error, which the server's log tells")
        if model.settings.default and model.state == EngineState.READY:
            self.set_default(model.name)

    async def loaded(self, model: ServedModel) -> None:
        """Returns when a model that was added is ready, has failed or was unloaded."""
        if (task := self._loads.get(model)) is not None:
            await asyncio.wait([task])

    async def remove(self, name: str, *, drain_s: float) -> ServedModel:
        """Unload a model: it takes no more requests, and those it has get `drain_s` seconds before they fail with 503.

        Goes on to the end even if the caller is cancelled. Returns at once if it is being unloaded already.

        Raises:
            ModelNotFoundError: no model has this name.
            ConflictError: it is the default one.
        """
        model = self._named(name)
        if model.is_default:
            raise ConflictError(
                f"{model.name!r} is the default model and cannot be unloaded. Make another one the default first.", param="id"
            )
        if not model.unloading:
            model.unloading = True
            task = asyncio.create_task(self._unload(model, drain_s), name=f"unload {model.name}")
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)
            await asyncio.shield(task)
        return model

    async def _unload(self, model: ServedModel, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        while not model.is_idle and time.monotonic() < deadline:  # noqa: ASYNC110  # engines have no event for this
            await asyncio.sleep(_LOOK_SECONDS)
        if model.engine is not None:
            await model.end()
            await self.loaded(model)  # one that was still loading clears up after itself
        # Without an engine it may be downloading, which cannot be interrupted; nothing comes of it then.
        self._set(tuple(other for other in self._models if other is not model))
        logger.info("model %r was unloaded", model.name)

    def set_default(self, name: str) -> ServedModel:
        """Make a model the one for requests that name none.

        Raises:
            ModelNotFoundError: no model has this name.
            ConflictError: it is not ready.
        """
        model = self._named(name)
        if model.state not in (EngineState.READY, EngineState.RESTARTING):
            raise ConflictError(
                f"The model {model.name!r} cannot become the default one, because it is {model.state}. Wait until it is ready.",
                param="id",
            )
        for other in self._models:
            other.is_default = other is model
        return model

    async def stop(self) -> None:
        """End all engines and template processes, and whatever is being loaded."""
        tasks = [*self._loads.values(), *self._unloads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.end() for model in self._models))

    # --- prompts ------------------------------------------------------------------------------------------------------

    async def tokenize(self, view: ServedModel, prompt: Prompt, add_special: bool, parse_special: bool) -> Sequence[int]:
        """Token ids of a prompt, off the event loop.

        Raises:
            ModelLoadingError: the tokenizer is not there yet.
            InvalidRequestError: the chat template refused the messages, or token ids are out of range.
        """
        tokenizer = view.ready_tokenizer()
        if isinstance(prompt, ChatPrompt):
            return await asyncio.to_thread(self._encode_chat, view, tokenizer, prompt)
        if isinstance(prompt, str):
            if len(prompt) <= _INLINE_CHARACTERS:
                return tokenizer.encode(prompt, add_special=add_special, parse_special=parse_special)
            return await asyncio.to_thread(tokenizer.encode, prompt, add_special=add_special, parse_special=parse_special)
        for token in prompt:
            if not 0 <= token < tokenizer.vocab_size:
                raise InvalidRequestError(
                    f"token id {token} is outside this model's vocabulary of {tokenizer.vocab_size}", param="prompt"
                )
        return prompt

    def _encode_chat(self, view: ServedModel, tokenizer: Tokenizer, prompt: ChatPrompt) -> list[int]:
        ids: list[int] = []
        for text, trusted in self._render(view, prompt):
            # The template itself writes BOS where the model wants one, so none is added.
            ids += tokenizer.encode(text, add_special=False, parse_special=trusted)
        return ids

    def render_chat(self, view: ServedModel, prompt: ChatPrompt) -> str:
        """The text that the model's chat template makes of messages. Blocks; call it in a thread.

        Raises:
            ModelLoadingError: the tokenizer is not there yet.
            InvalidRequestError: the chat template refused the messages, or there is none.
        """
        return "".join(text for text, _ in self._render(view, prompt))

    @staticmethod
    def _render(view: ServedModel, prompt: ChatPrompt) -> Segments:
        return view.ready_chat().template.render(
            [dict(message) for message in prompt.messages],
            add_generation_prompt=prompt.add_generation_prompt,
            tools=None if prompt.tools is None else [dict(tool) for tool in prompt.tools],
            **prompt.template_kwargs,
        )

    def chat_prompt(
        self, view: ServedModel, prompt: ChatPrompt, tools: ToolRequest | None, reasoning: ReasoningOptions
    ) -> ChatPrompt:
        """A conversation as the model's chat template wants it, with tools and what was said of thoughts.

        Raises:
            ModelLoadingError: the model is not there yet.
            InvalidRequestError: there is no template, it does not know a variable of the request, or the model calls no tools.
        """
        return view.ready_chat().prompt(prompt, tools, reasoning)

    def list(self) -> Sequence[ServedModel]:
        """All of them, in the order of the configuration, then in that of loading."""
        return self._models
