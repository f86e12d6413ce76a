"""From a model's settings to a running engine, a tokenizer and a chat template."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Any

from inferflux_core.engine.client import EngineClient
from inferflux_core.engine.loop import EngineSpec
from inferflux_core.errors import ConfigError, ModelFileError
from inferflux_core.interfaces import Backend, EngineConfig, SourceContext, Tokenizer
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.served_model import ServedModel
from inferflux_core.models.sources import resolve_model
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import ModelSettings, Settings

logger = logging.getLogger("inferflux.models")

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
            model.template, model.tokenizer = await asyncio.to_thread(self._tokenizer, model, backend)
            if model.unloading:
                await model.end()
        except ConfigError as error:
            await model.end()
            model.fail(str(error))
            if not model.unloading:
                logger.error("model %r: %s", model.name, error)

    def _find(self, model: ServedModel, show_progress: bool) -> Backend:
        """Resolve the reference, choose the backend, and check the files before native code sees them."""
        hub = self._settings.hub
        context = SourceContext(
            allowed_roots=self._settings.model_roots,
            cache_dir=hub.cache_dir,
            token=None if hub.token is None else hub.token.get_secret_value(),
            offline=hub.offline,
            show_progress=show_progress,
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
