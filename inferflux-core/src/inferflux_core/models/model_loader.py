"""From a model's settings to a running engine, a tokenizer and a chat template."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from inferflux_core.engine.client import EngineClient
from inferflux_core.engine.engine_spec import DraftSpec, EngineSpec, SpeculativeSpec
from inferflux_core.errors import ConfigError, ModelFileError
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, SourceContext, Tokenizer
from inferflux_core.models.chat_format import ChatFormat
from inferflux_core.models.chat_template import OWN_NAMES, ChatTemplate
from inferflux_core.models.reasoning.formats import reasoning_format
from inferflux_core.models.served_model import ServedModel
from inferflux_core.models.sources import resolve_model
from inferflux_core.models.tool_calls.formats import tool_format
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import ModelSettings, Settings

logger = logging.getLogger("inferflux.models")

DRAFT_METHOD = "draft_model"

EngineFactory = Callable[[str, EngineSpec], EngineClient]


class ModelLoader:
    """Loads models; knows nothing of the others that are served."""

    def __init__(self, settings: Settings, registry: PluginRegistry, engine_factory: EngineFactory) -> None:
        self._settings = settings
        self._registry = registry
        self._engine_factory = engine_factory

    async def load(self, model: ServedModel, *, show_progress: bool) -> None:
        """Load a model and return when it is ready. One that fails is marked and logged, and nothing of it is left running.

        A model that is unloaded meanwhile is ended here as soon as that is possible.

        Args:
            show_progress: draw progress bars of downloads on standard error.
        """
        try:
            backend = await asyncio.to_thread(self._find, model, show_progress)
            if model.unloading:
                return
            assert model.files is not None
            model.engine = self._engine_factory(model.name, self._spec(model))
            # The engine process opens the files first: what crashes native code dies there, not here.
            await model.engine.start()
            model.chat, model.tokenizer = await asyncio.to_thread(self._tokenizer, model, backend)
            if model.unloading:
                await model.end()
        except ConfigError as error:
            await model.end()
            model.fail(str(error))
            if not model.unloading:
                logger.error("model %r: %s", model.name, error)

    def _find(self, model: ServedModel, show_progress: bool) -> Backend:
        """Resolve the references, choose the backend, and check the files before native code sees them."""
        own = model.settings
        model.files = files = self._resolve(own.source, show_progress)
        model.backend, backend = self._choose(files, own.backend, own.backend_settings, own.source)
        identity = "|".join((files.ref, files.revision, *files.paths, model.backend))
        model.fingerprint = "fp_" + hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
        model.speculative = self._speculative(own, show_progress)
        return backend

    def _resolve(self, source: str, show_progress: bool) -> ModelFiles:
        hub = self._settings.hub
        context = SourceContext(
            allowed_roots=self._settings.model_roots,
            cache_dir=hub.cache_dir,
            token=None if hub.token is None else hub.token.get_secret_value(),
            offline=hub.offline,
            show_progress=show_progress,
        )
        return resolve_model(self._registry, source, context)

    def _choose(self, files: ModelFiles, name: str, settings: Mapping[str, Any], source: str) -> tuple[str, Backend]:
        """The one backend that serves the files, after it has checked them.

        Args:
            name: of the backend, or `auto`.
            settings: overrides of the backend's, for this model; of `auto` they are checked when the backend is known.
        """
        names = sorted(self._registry.entries["backend"]) if name == "auto" else [name]
        own = {} if name == "auto" else settings
        backends = {each: self._create(each, own) for each in names}
        fitting = [each for each, backend in backends.items() if backend.supports(files)]
        if not fitting:
            raise ModelFileError(
                f"no backend of {', '.join(names)} serves {files.format} files ({source!r}); "
                f"install the package of one that does, e.g. inferflux-backend-llamacpp for GGUF"
            )
        if len(fitting) > 1:
            raise ModelFileError(
                f"several backends serve {files.format} files: {', '.join(fitting)}; set `backend` of the model"
            )
        backend = backends[fitting[0]]
        backend.validate(files)
        return fitting[0], backend

    def _speculative(self, own: ModelSettings, show_progress: bool) -> SpeculativeSpec:
        """How the model speculates, with the files of its draft model if it has one.

        Raises:
            PluginError: no such proposer, or it refuses its settings.
            ConfigError: a draft model where none is used, or none where one is.
        """
        chosen = self._settings.engine.speculative if own.speculative is None else own.speculative
        if (chosen.model is None) == (chosen.method == DRAFT_METHOD):
            raise ConfigError(
                f"speculative.method {DRAFT_METHOD!r} needs speculative.model, the smaller model to ask"
                if chosen.model is None
                else f"speculative.model {chosen.model!r} is of use only with speculative.method {DRAFT_METHOD!r}, not "
                f"{chosen.method!r}; remove one of them or set the other"
            )
        settings: dict[str, Any] = {}
        if chosen.method is not None:
            settings = self._registry.settings("proposer", chosen.method, chosen.settings).model_dump(mode="json")
        draft = None
        if chosen.model is not None:
            try:
                files = self._resolve(chosen.model, show_progress)
                backend, _ = self._choose(files, chosen.backend, chosen.backend_settings, chosen.model)
            except ModelFileError as error:  # which speaks of a model's settings, and means those in `speculative` here
                raise ModelFileError(f"draft model of speculative.model: {error}") from error
            draft = DraftSpec(
                files=files, backend=backend, backend_settings=self._checked_settings(backend, chosen.backend_settings)
            )
        return SpeculativeSpec(
            method=chosen.method, num_speculative_tokens=chosen.num_speculative_tokens, settings=settings, draft=draft
        )

    def _create(self, name: str, own: Mapping[str, Any]) -> Backend:
        backend: Backend = self._registry.create("backend", name, {**self._settings.backends.get(name, {}), **own})
        return backend

    def _checked_settings(self, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        values = {**self._settings.backends.get(name, {}), **own}
        return self._registry.settings("backend", name, values).model_dump(mode="json")

    def _spec(self, model: ServedModel) -> EngineSpec:
        assert model.files is not None
        engine, own = self._settings.engine, model.settings
        return EngineSpec(
            files=model.files,
            backend=model.backend,
            backend_settings=self._checked_settings(model.backend, own.backend_settings),
            scheduler=engine.scheduler,
            scheduler_settings=dict(engine.scheduler_settings),
            config=EngineConfig(
                max_num_seqs=own.max_num_seqs or engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                max_model_len=own.max_model_len or engine.max_model_len,
                enable_prefix_caching=engine.enable_prefix_caching,
                itl_target_ms=engine.itl_target_ms,
            ),
            speculative=model.speculative,
            structured_output=self._settings.structured_output.enabled,
            grammar_cache_entries=self._settings.structured_output.cache_entries,
            grammar_cache_tenants=self._settings.structured_output.cache_tenants,
            blocked_plugins=self._settings.plugins.blocked,
        )

    @staticmethod
    def _tokenizer(model: ServedModel, backend: Backend) -> tuple[ChatFormat | None, Tokenizer]:
        assert model.files is not None
        tokenizer, own = backend.tokenizer(model.files), model.settings
        source = tokenizer.chat_template
        if (file := own.chat_template) is not None:
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelFileError(f"chat template {str(file)!r} cannot be read: {error}") from error
        # Also without a template, so that a name that nobody knows is found out.
        tools, reasoning = tool_format(own.tool_parser, source), reasoning_format(own.reasoning_parser, source)
        if source is None:
            return None, tokenizer
        if taken := sorted(set(own.chat_template_kwargs).intersection(OWN_NAMES)):
            raise ConfigError(f"chat_template_kwargs cannot set {', '.join(taken)}, which the server gives to each template")
        template = ChatTemplate(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
        kwargs = own.chat_template_kwargs
        return ChatFormat(template=template, source=source, tools=tools, reasoning=reasoning, kwargs=kwargs), tokenizer
