"""The GPU's runner on the CPU: kernels through Triton's interpreter, recorded steps repeated by calling, one step ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch backend is not installed")

from dataclasses import dataclass, replace

import numpy as np
import torch

from inferflux_backend_torch.graphs import NoRecorder
from inferflux_backend_torch.inputs import KVCache
from inferflux_backend_torch.linear import PlainLinear
from inferflux_backend_torch.loader import load_decoder
from inferflux_backend_torch.loading import Loaded
from inferflux_backend_torch.ops import TorchOps
from inferflux_backend_torch.runner import TorchRunner
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.engine.types import EngineRequest, GrammarMask, SamplingParams
from inferflux_core.interfaces import EngineConfig, ModelInfo, ModelRunner
from inferflux_core.testing.driver import Answer, EngineDriver, make_request
from torch_backend.draft_case import generate
from torch_backend.reference_step import open_checkpoint, read_config
from torch_backend.tiny_models import RECIPES, build
from torch_backend.triton_interpreter import isolate, triton_ops

CPU = torch.device("cpu")
CONFIG = EngineConfig(max_num_seqs=3, max_num_batched_tokens=24, max_model_len=64)


@dataclass(frozen=True)
class Model:
    folder: Path

    def loaded(self, ops: TorchOps) -> Loaded:
        config = read_config(self.folder)
        decoder = load_decoder(
            config,
            open_checkpoint(self.folder),
            dtype=torch.float32,
            device=CPU,
            linear=PlainLinear,
            ops=ops,
            max_model_len=64,
        )
        layer = decoder.layers[0]
        cache = KVCache(len(decoder.layers), 17, 16, layer.num_kv_heads, layer.head_dim, torch.float32, CPU)
        info = ModelInfo(vocab_size=config.vocab_size, max_model_len=64, eos_token_ids=frozenset({5}))
        return Loaded(model=decoder, cache=cache, num_blocks=17, device=CPU, model_info=info, capturable=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    recipe = RECIPES["qwen3"]
    build(replace(recipe, settings={**recipe.settings, "num_hidden_layers": 2}), folder)  # one more takes the interpreter long
    return Model(folder)


def requests() -> list[EngineRequest]:
    """Greedy and drawn, short and chunked, more than there are slots, sharing a prefix, one with penalties."""
    shared = [7 + i % 50 for i in range(20)]
    return [
        make_request([*shared, 3], max_tokens=6, logprobs=2),
        make_request([*shared, 4, 9, 11], max_tokens=8, temperature=0.8, top_p=0.9, seed=5),
        make_request([1, 2], max_tokens=1),
        make_request([9, 8, 7], max_tokens=9, temperature=1.0, seed=3, frequency_penalty=0.5, ignore_eos=True),
        make_request(list(range(30)), max_tokens=4, top_k=5, temperature=0.7, seed=11),
    ]


def answers(runner: ModelRunner) -> list[Answer]:
    runner.warm_up()
    driver = EngineDriver(runner, CONFIG)
    try:
        return driver.generate(*requests())
    finally:
        driver.core.close()


@pytest.mark.parametrize(("graphs", "one_ahead"), [(True, True)])
def test_it_answers_as_the_plain_runner_does(model: Model, graphs: bool, one_ahead: bool) -> None:
    from inferflux_backend_torch.gpu_runner import GpuRunner

    settings = TorchSettings(cuda_graphs=graphs, async_scheduling=one_ahead)
    runner = GpuRunner(model.loaded(triton_ops.TritonOps(num_sms=2)), settings, CONFIG, recorder=NoRecorder())
    assert runner.caps.depth == (2 if one_ahead else 1)
    ours = answers(runner)
    expected = answers(TorchRunner(model.loaded(TorchOps()), CONFIG))
    for answer, reference in zip(ours, expected, strict=True):
        assert answer.token_ids == reference.token_ids
        assert answer.finish_reason == reference.finish_reason
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx([e.logprob for e in reference.logprobs], abs=1e-4)


def test_drafts_and_masks_change_what_they_change_in_the_plain_runner(model: Model) -> None:
    """Drafts no token, masks the same tokens; and a step with drafts goes beside the recorded ones."""
    from inferflux_backend_torch.gpu_runner import GpuRunner

    settings = TorchSettings(cuda_graphs=True, async_scheduling=True)
    runner = GpuRunner(model.loaded(triton_ops.TritonOps(num_sms=2)), settings, CONFIG, recorder=NoRecorder())
    plain = TorchRunner(model.loaded(TorchOps()), CONFIG)
    vocab_size = plain.model_info.vocab_size
    odd = np.full((4, -(-vocab_size // 32)), 0xAAAAAAAA, dtype=np.uint32).view(np.int32)
    mask = {count: GrammarMask(odd, {0: 0}) for count in range(9)}
    sequences = [
        ([9, 8, 7], SamplingParams(max_tokens=9, temperature=1.0, seed=3, logprobs=1)),
        (list(range(11)), SamplingParams(max_tokens=7, temperature=0.0)),
        ([1, 2], SamplingParams(max_tokens=8, temperature=0.8, seed=5, presence_penalty=0.3)),
    ]
    expected = generate(plain, sequences, mask=mask)
    assert all(token % 2 for token in expected[0].drawn)
    ours = generate(runner, sequences, [run.drawn for run in expected], most=3, mask=mask)
    assert [run.drawn for run in ours] == [run.drawn for run in expected]
    assert {0, 1, 3} <= {held for run in ours for held in run.drafts}
    for run, reference in zip(ours, expected, strict=True):
        assert [e.logprob for e in run.logprobs] == pytest.approx([e.logprob for e in reference.logprobs], abs=1e-4)


isolate(globals())
