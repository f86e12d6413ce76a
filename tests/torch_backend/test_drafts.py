"""Rows with drafts draw what they would draw one token at a time, in one step of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers builds the models")

import torch

from inferflux_backend_torch.loading import load
from inferflux_backend_torch.runner import TorchRunner
from inferflux_backend_torch.settings import TorchSettings
from inferflux_core.engine.types import GrammarMask, SamplingParams
from inferflux_core.interfaces import EngineConfig, ModelFiles
from torch_backend.draft_case import Run, generate
from torch_backend.sampler_case import check_logprobs
from torch_backend.tiny_models import VOCAB, tiny_files

pytestmark = [
    # transformers deprecates parts of itself and of torch at its own pace; its warnings say nothing about this code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIG = EngineConfig(max_num_seqs=6, max_num_batched_tokens=256, max_model_len=128)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files("llama", tmp_path_factory.mktemp("models"))


@cache
def runner(files: ModelFiles, impl: str, config: EngineConfig = CONFIG) -> TorchRunner:
    values = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 8, "block_size": 8, "num_threads": 1, "model_impl": impl}
    return TorchRunner(load(files, TorchSettings.model_validate(values), config), config)


def prompt(length: int, variant: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(variant)).tolist()


def params_of(**values: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 30, "temperature": 0.0, **values})


SEQUENCES = [
    (prompt(9, 1), params_of()),
    (prompt(21, 2), params_of(temperature=1.0, seed=5, logprobs=2, max_tokens=37)),
    (prompt(1, 3), params_of(temperature=0.7, seed=6, top_p=0.9, logit_bias={7: 3.0}, logprobs=0)),
    (prompt(14, 4), params_of(temperature=0.9, seed=8, frequency_penalty=0.4)),
    (prompt(5, 5), params_of(min_tokens=20, ignore_eos=True, stop_token_ids=frozenset(range(60)), logprobs=1)),
]


def assert_same(ours: list[Run], expected: list[Run]) -> None:
    for run, reference in zip(ours, expected, strict=True):
        assert run.drawn == reference.drawn
        for entry, other in zip(run.logprobs, reference.logprobs, strict=True):
            check_logprobs(entry, other)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_drafts_change_no_token_and_no_logprob(files: ModelFiles, impl: str) -> None:
    model = runner(files, impl)
    expected = generate(model, SEQUENCES)
    assert [len(run.drawn) for run in expected] == [30, 37, 30, 30, 30]
    ours = generate(model, SEQUENCES, [run.drawn for run in expected])
    assert_same(ours, expected)
    held = [count for run in ours for count in run.drafts]
    assert {0, 1, 2, 3, 4, 5, 6} <= set(held), "drafts of all lengths, right and wrong"
    assert [bool(run.drafts) for run in ours] == [True, True, True, False, True], "and none with penalties"


def test_logits_of_many_drafts_are_made_in_parts(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner(files, "auto")
    words = -(-VOCAB // 32)
    bits = np.array([[0x55555555] * words, [0xAAAAAAAA] * words] * 5, dtype=np.uint32).view(np.int32)
    mask = {count: GrammarMask(bits, {0: count % 2}) for count in range(30)}
    expected = generate(model, SEQUENCES, mask=mask)
    made: list[int] = []
    logits = model._model.logits
    monkeypatch.setattr(model, "_at_once", 4)
    monkeypatch.setattr(model._model, "logits", lambda hidden: made.append(len(hidden)) or logits(hidden))
    assert_same(generate(model, SEQUENCES, [run.drawn for run in expected], mask=mask), expected)
    assert max(made) == 4
    assert len(made) > max(len(run.drawn) for run in expected) / 2


def test_masks_along_a_draft(files: ModelFiles) -> None:
    """Each position of a draft has a mask of its own: even tokens at even places, odd ones at odd places."""
    model = runner(files, "auto")
    words = -(-VOCAB // 32)
    bits = np.array([[0x55555555] * words, [0xAAAAAAAA] * words] * 5, dtype=np.uint32).view(np.int32)
    mask = {count: GrammarMask(bits, {0: count % 2}) for count in range(30)}
    for kind in ({}, {"temperature": 1.0, "seed": 3, "logprobs": 1}, {"logit_bias": {3: 1.0}, "ignore_eos": True}):
        sequences = [(prompt(9, 1), params_of(**kind)), SEQUENCES[1]]
        expected = generate(model, sequences, mask=mask)
        assert [token % 2 for token in expected[0].drawn] == [0, 1] * 15
        assert expected[1].drawn == generate(model, SEQUENCES[1:2])[0].drawn
        ours = generate(model, sequences, [run.drawn for run in expected], mask=mask)
        assert_same(ours, expected)
        assert max(ours[0].drafts) > 3


def test_a_prompt_may_end_in_a_draft(files: ModelFiles) -> None:
    model = runner(files, "auto")
    expected = generate(model, SEQUENCES[:2])
    for seed in range(20):
        ours = generate(model, SEQUENCES[:2], [run.drawn for run in expected], seed=seed)
        assert_same(ours, expected)


def test_it_says_what_it_can_verify(files: ModelFiles) -> None:
    caps = runner(files, "auto").caps
    assert (caps.max_draft, caps.grammar) == (255, True)
    assert runner(files, "auto", replace(CONFIG, max_num_batched_tokens=1000)).caps.max_draft == 256


def test_warming_up_leaves_no_trace(files: ModelFiles, tmp_path: Path) -> None:
    model = runner(files, "auto")
    before = generate(model, SEQUENCES[:1])
    model.warm_up()
    assert_same(generate(model, SEQUENCES[:1]), before)
