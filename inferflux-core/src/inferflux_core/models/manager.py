"""The models that are served: loading them, finding them by name, and turning prompts into their tokens."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from inferflux_core.config import served_name
from inferflux_core.engine.client import EngineClient, EngineState
from inferflux_core.engine.loop import EngineSpec
from inferflux_core.engine.types import EngineStats
from inferflux_core.errors import ConfigError, InvalidRequestError, ModelFileError, ModelLoadingError, ModelNotFoundError
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, SourceContext, Tokenizer
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.prompts import ChatPrompt, Prompt
from inferflux_core.models.sources import resolve_model
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import ModelSettings, Settings

logger = logging.getLogger("inferflux.models")

EngineFactory = Callable[[str, EngineSpec], EngineClient]

Segments = Sequence[tuple[str, bool]]  # text, and whether control tokens in it are meant

# Shorter texts are tokenised in the event loop: handing them to a thread would take longer.
_INLINE_CHARACTERS = 2048


class ServedModel:
    """One configured model, from before it is loaded until the server stops."""

    def __init__(self, name: str, settings: ModelSettings, is_default: bool) -> None:
        self.name = name
        self.settings = settings
        self.aliases = settings.aliases
        self.is_default = is_default
        self.created = int(time.time())
        self.backend = settings.backend
        self.files: ModelFiles | None = None
        self.engine: EngineClient | None = None
        self.tokenizer: Tokenizer | None = None
        self.template: ChatTemplate | None = None
        self.fingerprint = "fp_inferflux"
        self._failure: str | None = None

    def fail(self, reason: str) -> None:
        """It could not be loaded; the other models go on."""
        self._failure = reason
        self.engine = None

    @property
    def state(self) -> str:
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
        return {} if info is None else dict(info.details)

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

    def ready_engine(self) -> EngineClient:
        """Raises ModelLoadingError unless requests are taken now."""
        if self.engine is None or self.state != EngineState.READY:
            reason = "could not be loaded" if self._failure is not None else f"is not ready ({self.state})"
            raise ModelLoadingError(f"The model {self.name!r} {reason}. Please retry later.", retry_after=2.0)
        return self.engine

    def ready_tokenizer(self) -> Tokenizer:
        """Raises ModelLoadingError before it is loaded. It stays while the engine restarts."""
        if self.tokenizer is None:
            raise ModelLoadingError(f"The model {self.name!r} is not loaded. Please retry later.", retry_after=2.0)
        return self.tokenizer


class ModelManager:
    """All configured models."""

    def __init__(self, settings: Settings, registry: PluginRegistry, engine_factory: EngineFactory) -> None:
        self._settings = settings
        self._registry = registry
        self._engine_factory = engine_factory
        chosen = next((m for m in settings.models if m.default), settings.models[0])
        self._models = [ServedModel(served_name(m), m, m is chosen) for m in settings.models]
        self._by_name = {name: model for model in self._models for name in (model.name, *model.aliases)}

    def get(self, name: str | None) -> ServedModel:
        """The model of this name or alias; None means the default one. Raises ModelNotFoundError."""
        if name is None:
            return next(model for model in self._models if model.is_default)
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"The model {name[:128]!r} does not exist; GET /v1/models lists the models there are.", param="model"
            )
        return model

    # --- loading ------------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load all models side by side. One that fails is marked and logged; the others go on.

        Raises:
            ConfigError: not a single model could be loaded.
        """
        await asyncio.gather(*(self._load(model) for model in self._models))
        failed = [model for model in self._models if model.state == EngineState.FAILED]
        if len(failed) == len(self._models):
            raise ConfigError("\n".join(f"model {model.name!r}: {model.last_error}" for model in failed))

    async def _load(self, model: ServedModel) -> None:
        try:
            backend = await asyncio.to_thread(self._find, model)
            assert model.files is not None
            model.engine = self._engine_factory(model.name, self._spec(model))
            # The engine process opens the files first: what crashes native code dies there, not here.
            await model.engine.start()
            model.template, model.tokenizer = await asyncio.to_thread(self._tokenizer, model, backend)
        except ConfigError as error:
            if model.engine is not None:
                await model.engine.stop()
            model.fail(str(error))
            logger.error("model %r: %s", model.name, error)

    def _find(self, model: ServedModel) -> Backend:
        """Resolve the reference, choose the backend, and check the files before native code sees them."""
        hub = self._settings.hub
        context = SourceContext(
            allowed_roots=self._settings.model_roots,
            cache_dir=hub.cache_dir,
            token=None if hub.token is None else hub.token.get_secret_value(),
            offline=hub.offline,
            show_progress=True,
        )
        model.files = files = resolve_model(self._registry, model.settings.source, context)
        names = [model.settings.backend]
        if model.settings.backend == "auto":
            names = sorted(self._registry.entries["backend"])
        backends = {name: self._create(name, model.settings) for name in names}
        fitting = [name for name, backend in backends.items() if backend.supports(files)]
        if not fitting:
            raise ModelFileError(
                f"no backend of {', '.join(names)} serves {files.format} files ({model.settings.source!r}); "
                f"install the package of one that does, e.g. inferflux-backend-llamacpp for GGUF"
            )
        if len(fitting) > 1:
            raise ModelFileError(
                f"several backends serve {files.format} files: {', '.join(fitting)}; set `backend` of the model"
            )
        model.backend = fitting[0]
        backend = backends[fitting[0]]
        backend.validate(files)
        identity = "|".join((files.ref, files.revision, *files.paths, model.backend))
        model.fingerprint = "fp_" + hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
        return backend

    def _backend_settings(self, name: str, settings: ModelSettings) -> dict[str, Any]:
        return {**self._settings.backends.get(name, {}), **settings.backend_settings}

    def _create(self, name: str, settings: ModelSettings) -> Backend:
        own = self._settings.backends.get(name, {}) if settings.backend == "auto" else self._backend_settings(name, settings)
        backend: Backend = self._registry.create("backend", name, own)
        return backend

    def _spec(self, model: ServedModel) -> EngineSpec:
        assert model.files is not None
        engine, own = self._settings.engine, model.settings
        return EngineSpec(
            files=model.files,
            backend=model.backend,
            backend_settings=self._registry.settings(
                "backend", model.backend, self._backend_settings(model.backend, own)
            ).model_dump(mode="json"),
            scheduler=engine.scheduler,
            scheduler_settings=dict(engine.scheduler_settings),
            config=EngineConfig(
                max_num_seqs=own.max_num_seqs or engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                max_model_len=own.max_model_len or engine.max_model_len,
                enable_prefix_caching=engine.enable_prefix_caching,
                itl_target_ms=engine.itl_target_ms,
            ),
            blocked_plugins=self._settings.plugins.blocked,
        )

    @staticmethod
    def _tokenizer(model: ServedModel, backend: Backend) -> tuple[ChatTemplate | None, Tokenizer]:
        assert model.files is not None
        tokenizer = backend.tokenizer(model.files)
        source = tokenizer.chat_template
        if (file := model.settings.chat_template) is not None:
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelFileError(f"chat template {str(file)!r} cannot be read: {error}") from error
        if source is None:
            return None, tokenizer
        template = ChatTemplate(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
        return template, tokenizer

    async def stop(self) -> None:
        """End all engines and template processes."""
        await asyncio.gather(*(model.engine.stop() for model in self._models if model.engine is not None))
        for model in self._models:
            if model.template is not None:
                await asyncio.to_thread(model.template.close)

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
        view.ready_tokenizer()
        if view.template is None:
            raise InvalidRequestError(
                f"The model {view.name!r} has no chat template; use /v1/completions, or set `chat_template` of the model.",
                param="messages",
            )
        return view.template.render(
            [dict(message) for message in prompt.messages],
            add_generation_prompt=prompt.add_generation_prompt,
            tools=None if prompt.tools is None else [dict(tool) for tool in prompt.tools],
            **prompt.template_kwargs,
        )

    def list(self) -> Sequence[ServedModel]:
        """All of them, in the order of the configuration."""
        return self._models
