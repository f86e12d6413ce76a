"""The half of the backend that lives in the server process: checks files, reads the vocabulary, holds no weights."""

from __future__ import annotations

from typing import ClassVar

from inferflux_backend_llamacpp.gguf import read_adapter, read_split
from inferflux_backend_llamacpp.openmp import limited_spinning
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, ModelRunner, Tokenizer


class LlamaCppBackend(Backend):
    """GGUF models, whole or split."""

    formats: ClassVar[tuple[str, ...]] = ("gguf",)

    def __init__(self, settings: LlamaCppSettings) -> None:
        self._settings = settings

    def validate(self, files: ModelFiles) -> None:
        read_split(files.paths)
        for adapter in self._settings.lora:
            if not adapter.path.is_file():
                raise ModelFileError(f"LoRA adapter {str(adapter.path)!r} is not a file; correct backends.llamacpp.lora")
            read_adapter(adapter.path)

    def tokenizer(self, files: ModelFiles) -> Tokenizer:
        with limited_spinning():
            from inferflux_backend_llamacpp.tokenizer import LlamaCppTokenizer

        return LlamaCppTokenizer(files)

    def runner(self, files: ModelFiles, config: EngineConfig) -> ModelRunner:
        with limited_spinning():
            from inferflux_backend_llamacpp.runner import LlamaCppRunner

        self.validate(files)
        return LlamaCppRunner(files, self._settings, config)
