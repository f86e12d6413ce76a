"""The demo model's file, and a skip where it or the library is absent."""

from __future__ import annotations

import importlib.util

import pytest

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, SourceContext
from inferflux_core.models.sources import DemoSource


def demo_files() -> ModelFiles:
    """Skips the caller when the demo extra or llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed", allow_module_level=True)
    try:
        return DemoSource().resolve("demo", SourceContext())
    except ModelFileError as error:
        pytest.skip(str(error), allow_module_level=True)
