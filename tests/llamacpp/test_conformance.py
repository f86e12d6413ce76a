"""The llama.cpp backend holds to the contract, with streams of its own and with one shared pool."""

from __future__ import annotations

from collections.abc import Sequence

from inferflux_backend_llamacpp.backend import LlamaCppBackend
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from llamacpp.demo_model import demo_files

FILES = demo_files()
TOKENIZER = LlamaCppBackend(LlamaCppSettings()).tokenizer(FILES)
# Sentences that go round and round: the model is sure how they go on, so a wrong cell would show.
_SENTENCES = [
    "One two three four five six seven eight nine ten. ",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday. ",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z ",
    "January February March April May June July August September October November December. ",
    "red orange yellow green blue indigo violet ",
    "do re mi fa sol la ti do re mi fa sol la ti ",
    "2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34 36 38 40 ",
]


class LlamaCppConformance(BackendConformance):
    settings = LlamaCppSettings(n_threads=2)
    output_tokens = 8
    logprob_noise = 0.5  # seen: up to 0.2 between a batch of one and a batch of four

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return LlamaCppBackend(self.settings).runner(FILES, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        cycle = TOKENIZER.encode(_SENTENCES[variant % len(_SENTENCES)], add_special=False, parse_special=False)
        return (cycle * (length // len(cycle) + 1))[:length]


class TestPerStream(LlamaCppConformance):
    pass


class TestUnified(LlamaCppConformance):
    settings = LlamaCppSettings(n_threads=2, kv_layout="unified")


class TestRetainedStreams(LlamaCppConformance):
    settings = LlamaCppSettings(n_threads=2, retained_streams=3, flash_attn="off")
