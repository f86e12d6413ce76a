"""The half of the backend that lives in the server process: checks files, tokenises, holds no weights and imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from inferflux_backend_torch.files import ModelFolder
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, ModelRunner, Tokenizer


class TorchBackend(Backend):
    """safetensors models with a config.json, as Hugging Face lays them out."""

    formats: ClassVar[tuple[str, ...]] = ("safetensors",)

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings

    def validate(self, files: ModelFiles) -> None:
        ModelFolder.open(files)

    def tokenizer(self, files: ModelFiles) -> Tokenizer:
        from inferflux_backend_torch.tokenizer import HFTokenizer

        return HFTokenizer(Path(files.paths[0]))

    def runner(self, files: ModelFiles, config: EngineConfig) -> ModelRunner:
        from inferflux_backend_torch.loading import load
        from inferflux_backend_torch.runner import TorchRunner

        return TorchRunner(load(files, self._settings, config), config)
