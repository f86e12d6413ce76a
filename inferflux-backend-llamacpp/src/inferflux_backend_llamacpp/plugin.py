"""Registers the llama.cpp backend. Imports in milliseconds: llama_cpp itself only when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.hookspecs import hookimpl
from inferflux_core.interfaces import Backend, Registration


def _make(settings: LlamaCppSettings) -> Backend:
    from inferflux_backend_llamacpp.backend import LlamaCppBackend

    return LlamaCppBackend(settings)


@hookimpl
def inferflux_backends() -> Iterable[Registration[Backend]]:
    return [
        Registration(
            name="llamacpp",
            factory=_make,
            settings=LlamaCppSettings,
            summary="GGUF models on CPU and GPU through llama.cpp",
        )
    ]
