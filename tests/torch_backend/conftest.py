"""Imports Triton with its interpreter before any other test module can import it without: transformers does, for one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

import pytest

if importlib.util.find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():  # where there is a GPU, the process of the tests keeps its kernels compiled
        with contextlib.suppress(pytest.skip.Exception):
            importlib.import_module("torch_backend.triton_interpreter")
