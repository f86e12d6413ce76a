"""The torch backend holds to the contract, exactly in float32, and within rounding in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from cyclic_prompts import cyclic_prompt
from inferflux_backend_torch.backend import TorchBackend
from inferflux_backend_torch.inputs import KVCache
from inferflux_backend_torch.loading import Loaded, load
from inferflux_backend_torch.runner import TorchRunner
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from inferflux_core.testing.driver import make_request
from torch_backend.tiny_models import VOCAB, tiny_files
from torch_backend.twin import twin_files

FILES = twin_files()
TOKENIZER = TorchBackend(TorchSettings()).tokenizer(FILES)


@cache
def weights(files: ModelFiles, dtype: str, quantization: str) -> Loaded:
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
    return load(files, settings, EngineConfig(max_model_len=256))


class TorchConformance(BackendConformance):
    files = FILES
    dtype = "bfloat16"
    quantization = "none"
    output_tokens = 8
    logprob_noise = 0.5

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        loaded = weights(self.files, self.dtype, self.quantization)
        layers, _, blocks, block_size, heads, width = loaded.cache.data.shape
        cache = KVCache(layers, blocks, block_size, heads, width, loaded.cache.data.dtype, torch.device("cpu"))
        return TorchRunner(replace(loaded, cache=cache), config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return cyclic_prompt(TOKENIZER, length, variant)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files("llama", tmp_path_factory.mktemp("models"))


class TestFloat32(TorchConformance):
    """Random weights, with nothing left to rounding: the tokens are equal."""

    dtype = "float32"
    logprob_noise = 0.0
    output_tokens = 12

    @pytest.fixture(autouse=True)
    def _files(self, llama: ModelFiles) -> None:
        self.files = llama

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(variant)).tolist()


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
