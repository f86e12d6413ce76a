"""The torch backend holds to the contract, exactly in float32, and within rounding in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from inferflux_backend_torch.backend import TorchBackend
from inferflux_backend_torch.inputs import KVCache
from inferflux_backend_torch.loading import Loaded, load
from inferflux_backend_torch.runner import TorchRunner
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from inferflux_core.testing.driver import make_request
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


@cache
def weights(dtype: str, quantization: str) -> Loaded:
    """Loaded once for all tests; each runner gets a cache of its own."""
    settings = TorchSettings.model_validate(
        {
            "device": "cpu",
            "dtype": dtype,
            "quantization": quantization,
            "kv_cache_mib": 64,
            "block_size": 16,
            "num_threads": 1,  # threads that wait for each other are slow where other tests run beside
        }
    )
    return load(FILES, settings, EngineConfig(max_model_len=256))


class TorchConformance(BackendConformance):
    dtype = "bfloat16"
    quantization = "none"
    output_tokens = 8
    logprob_noise = 0.5

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        loaded = weights(self.dtype, self.quantization)
        layers, _, blocks, block_size, heads, width = loaded.cache.data.shape
        cache = KVCache(layers, blocks, block_size, heads, width, loaded.cache.data.dtype, torch.device("cpu"))
        return TorchRunner(replace(loaded, cache=cache), config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        cycle = TOKENIZER.encode(_SENTENCES[variant % len(_SENTENCES)], add_special=False, parse_special=False)
        return (cycle * (length // len(cycle) + 1))[:length]


class TestFloat32(TorchConformance):
    dtype = "float32"
    logprob_noise = 0.01


class TestBfloat16(TorchConformance):
    pass


class TestInt8(TorchConformance):
    quantization = "int8"
    output_tokens = 6

    def test_a_seed_reproduces_in_any_company(self) -> None:
        """As long as batches stay below 64 rows: larger ones are multiplied in another way, and round otherwise."""
        prompt, params = self.prompt(9, 1), {"temperature": 1.0, "seed": 7, "max_tokens": self.output_tokens}
        driver = self.driver()
        alone = driver.generate(make_request(prompt, **params))[0]
        company = [make_request(self.prompt(9, v), temperature=1.0, seed=v, max_tokens=20) for v in (2, 3, 4)]
        together = driver.generate(*company, make_request(prompt, **params))[-1]
        assert together.token_ids == alone.token_ids
