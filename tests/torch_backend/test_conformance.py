"""The torch backend holds to the contract, exactly in float32, and within rounding in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

from inferflux_backend_torch.backend import TorchBackend
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from torch_backend.twin import twin_files

FILES = twin_files()
TOKENIZER = TorchBackend(TorchSettings()).tokenizer(FILES)
# Sentences that go round and round: the model is sure how they go on, so a wrong block would show.
_SENTENCES = [
    "One two three four five six seven eight nine ten. ",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday. ",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z ",
    "January February March April May June July August September October November December. ",
    "red orange yellow green blue indigo violet ",
    "do re mi fa sol la ti do re mi fa sol la ti ",
    "2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34 36 38 40 ",
]


class TorchConformance(BackendConformance):
    settings = TorchSettings(device="cpu", kv_cache_mib=64, block_size=16)
    output_tokens = 8

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return TorchBackend(self.settings).runner(FILES, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        cycle = TOKENIZER.encode(_SENTENCES[variant % len(_SENTENCES)], add_special=False, parse_special=False)
        return (cycle * (length // len(cycle) + 1))[:length]


class TestFloat32(TorchConformance):
    settings = TorchSettings(device="cpu", dtype="float32", kv_cache_mib=64, block_size=16)
    logprob_noise = 0.01


class TestBfloat16(TorchConformance):
    logprob_noise = 0.5
