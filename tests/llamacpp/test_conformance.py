"""The llama.cpp backend holds to the contract, with streams of its own and with one shared pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cyclic_prompts import cyclic_prompt
from inferflux_backend_llamacpp.backend import LlamaCppBackend
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from llamacpp.demo_model import demo_files
from llamacpp.tiny_gguf import FIRST_BYTE, VOCABULARY, write_tiny

FILES = demo_files()
TOKENIZER = LlamaCppBackend(LlamaCppSettings()).tokenizer(FILES)


class TestDemoModel(BackendConformance):
    """Real weights, quantised, in streams of their own."""

    output_tokens = 8
    logprob_noise = 0.5  # seen: up to 0.2 between a batch of one and a batch of four

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return LlamaCppBackend(LlamaCppSettings(n_threads=1)).runner(FILES, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return cyclic_prompt(TOKENIZER, length, variant)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


class TinyConformance(BackendConformance):
    """Random weights in float32: another layout of the cache shows more sharply, and takes less time."""

    settings = LlamaCppSettings(n_threads=1)
    logprob_noise = 0.02

    @pytest.fixture(autouse=True)
    def _files(self, tiny: ModelFiles) -> None:
        self.files = tiny

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return LlamaCppBackend(self.settings).runner(self.files, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return np.random.default_rng(variant).integers(FIRST_BYTE, len(VOCABULARY), length).tolist()


class TestUnified(TinyConformance):
    settings = LlamaCppSettings(n_threads=1, kv_layout="unified")


class TestRetainedStreams(TinyConformance):
    settings = LlamaCppSettings(n_threads=1, retained_streams=3, flash_attn="off")
