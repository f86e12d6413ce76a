"""The half of the backend that lives in the server process: checks files, tokenises, holds no weights and imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from inferflux_backend_torch.files import ModelFolder
from inferflux_backend_torch.followers import Followers
from inferflux_backend_torch.openmp import limit_spinning
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.shard import Shard
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, ModelRunner, Tokenizer

if TYPE_CHECKING:
    from inferflux_backend_torch.loading import Loaded


class TorchBackend(Backend):
    """safetensors models with a config.json, as Hugging Face lays them out."""

    formats: ClassVar[tuple[str, ...]] = ("safetensors",)

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings

    def validate(self, files: ModelFiles) -> None:
        ModelFolder.open(files, self._settings.model_impl)

    def tokenizer(self, files: ModelFiles) -> Tokenizer:
        from inferflux_backend_torch.tokenizer import HFTokenizer

        return HFTokenizer(Path(files.paths[0]))

    def runner(self, files: ModelFiles, config: EngineConfig) -> ModelRunner:
        limit_spinning()
        size = self._settings.tensor_parallel_size
        if size == 1:
            from inferflux_backend_torch.loading import load

            return make_runner(load(files, self._settings, config), self._settings, config)
        decoder = ModelFolder.open(files, self._settings.model_impl).decoder
        if decoder is not None:
            Shard(0, size).check(decoder)
        # Started first, so that all ranks import torch at the same time.
        followers = Followers(files, self._settings, config)
        from inferflux_backend_torch.tensor_parallel import TensorParallelRunner

        return TensorParallelRunner.start(files, self._settings, config, followers)


def make_runner(loaded: Loaded, settings: TorchSettings, config: EngineConfig) -> ModelRunner:
    """The runner for where the model, or the part of it, was loaded."""
    from inferflux_backend_torch.devices import has_triton

    if has_triton(loaded.device):
        from inferflux_backend_torch.gpu_runner import GpuRunner

        return GpuRunner(loaded, settings, config)
    from inferflux_backend_torch.runner import TorchRunner

    return TorchRunner(loaded, config)
