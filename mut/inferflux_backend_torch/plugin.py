"""Registers the torch backend. Imports in milliseconds: torch itself only when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.hookspecs import hookimpl
from inferflux_core.interfaces import Backend, Registration


def _make(settings: TorchSettings) -> Backend:
    from inferflux_backend_torch.backend import TorchBackend

    return TorchBackend(settings)


@hookimpl
def inferflux_backends() -> Iterable[Registration[Backend]]:
    return [
        Registration(
            name="torch",
            factory=_make,
            settings=TorchSettings,
            summary="safetensors models on CPU, CUDA, ROCm and MPS through PyTorch",
        )
    ]
