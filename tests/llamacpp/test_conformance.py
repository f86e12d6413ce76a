"""The llama.cpp backend holds to the contract, with streams of its own and with one shared pool."""

from __future__ import annotations

from collections.abc import Sequence

from cyclic_prompts import cyclic_prompt
from inferflux_backend_llamacpp.backend import LlamaCppBackend
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from llamacpp.demo_model import demo_files

FILES = demo_files()
TOKENIZER = LlamaCppBackend(LlamaCppSettings()).tokenizer(FILES)


class LlamaCppConformance(BackendConformance):
    settings = LlamaCppSettings(n_threads=1)
    output_tokens = 8
    logprob_noise = 0.5  # seen: up to 0.2 between a batch of one and a batch of four

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return LlamaCppBackend(self.settings).runner(FILES, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return cyclic_prompt(TOKENIZER, length, variant)


class TestPerStream(LlamaCppConformance):
    pass


class TestUnified(LlamaCppConformance):
    settings = LlamaCppSettings(n_threads=1, kv_layout="unified")


class TestRetainedStreams(LlamaCppConformance):
    settings = LlamaCppSettings(n_threads=1, retained_streams=3, flash_attn="off")
