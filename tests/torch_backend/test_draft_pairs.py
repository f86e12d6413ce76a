"""Real draft models on both backends, every proposal of which is verified: what is said is what the target says alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferflux_core.engine import make_speculation
from inferflux_core.engine.engine_spec import DraftSpec, EngineSpec, SpeculativeSpec
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.types import EngineRequest, SamplingParams
from inferflux_core.engine.verify_cost import VerifyCost
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelRunner, SourceContext
from inferflux_core.models.sources import PathSource
from inferflux_core.plugins import load_plugins
from llamacpp.demo_model import demo_files
from torch_backend.twin import first_layers, twin_files

DEMO = demo_files()
TWIN = twin_files()
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=256)
TORCH = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 64, "num_threads": 1}
GREEDY_AND_DRAWN: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "n": 2})
STORY = "Once upon a time there was a little"
NUMBERS = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"


def cut(folder: Path) -> ModelFiles:
    return PathSource().resolve(str(first_layers(folder, 28)), SourceContext())


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to what a step costs nothing else does, so that drafts are as long as may be."""

    def dear(runner: ModelRunner, max_draft: int) -> VerifyCost:
        return VerifyCost((1, 2), (1e9, 1e9))

    monkeypatch.setattr(make_speculation.verify_cost, "measure", dear)


class Pair:
    """A target with its draft."""

    def __init__(self, target: tuple[ModelFiles, str, dict[str, Any]], draft: tuple[ModelFiles, str, dict[str, Any]]) -> None:
        files, backend, settings = target
        speculative = SpeculativeSpec(
            method="draft_model",
            num_speculative_tokens=4,
            draft=DraftSpec(files=draft[0], backend=draft[1], backend_settings=draft[2]),
        )
        spec = EngineSpec(files=files, backend=backend, backend_settings=settings, config=CONFIG, speculative=speculative)
        registry = load_plugins()
        self.core = EngineCore.build(spec, registry)
        self._tokenizer = registry.create("backend", backend, settings).tokenizer(files)
        self._count = 0

    def answers(self, guesses: int, prompt: str, *, n: int = 1, **params: Any) -> list[list[int]]:
        tokens = self._tokenizer.encode(prompt, add_special=False, parse_special=False)
        said: dict[str, list[int]] = {}
        for choice in range(n):
            self._count += 1
            values: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "seed": choice, **params}
            said[str(self._count)] = []
            refused = self.core.add(
                EngineRequest(
                    request_id=str(self._count),
                    prompt_token_ids=tokens,
                    params=SamplingParams(**values),
                    num_speculative_tokens=guesses,
                )
            )
            assert refused is None
        while self.core.has_requests():
            for output in self.core.step():
                said[output.request_id] += output.token_ids
        return list(said.values())

    def accepted(self) -> tuple[int, int]:
        """Of the tokens drafted so far."""
        stats = self.core.stats()
        return stats.spec_accepted_tokens, stats.spec_draft_tokens


@pytest.mark.usefixtures("free_drafts")
def test_first_layers_draft_for_the_whole(tmp_path: Path) -> None:
    pair = Pair((TWIN, "torch", TORCH), (cut(tmp_path / "draft"), "torch", {**TORCH, "dtype": "bfloat16"}))
    try:
        for params in GREEDY_AND_DRAWN:
            before = pair.accepted()
            assert pair.answers(4, STORY, **params) == pair.answers(0, STORY, **params)
            accepted, drafted = (now - then for now, then in zip(pair.accepted(), before, strict=True))
            assert 0.05 < accepted / drafted < 0.6, "far from none and from all"
    finally:
        pair.core.close()


@pytest.mark.usefixtures("free_drafts")
def test_llama_cpp_drafts_for_torch() -> None:
    """The same weights but for the 4 bits, so that nearly all holds, at any temperature."""
    pair = Pair((TWIN, "torch", TORCH), (DEMO, "llamacpp", {"n_threads": 1}))
    try:
        for params in GREEDY_AND_DRAWN:
            before = pair.accepted()
            assert pair.answers(4, STORY, **params) == pair.answers(0, STORY, **params)
            accepted, drafted = (now - then for now, then in zip(pair.accepted(), before, strict=True))
            assert accepted / drafted > 0.75
    finally:
        pair.core.close()


@pytest.mark.usefixtures("free_drafts")
def test_torch_drafts_for_llama_cpp(tmp_path: Path) -> None:
    """Of numbers, about which there is no doubt: with 4 bits llama.cpp rounds rows with drafts otherwise."""
    draft = (cut(tmp_path / "draft"), "torch", {**TORCH, "dtype": "bfloat16"})
    pair = Pair((DEMO, "llamacpp", {"n_threads": 1}), draft)
    try:
        assert pair.answers(4, NUMBERS) == pair.answers(0, NUMBERS)
        pair.answers(4, STORY, n=2, temperature=1.0)
        accepted, drafted = pair.accepted()
        assert 0 < accepted < drafted
    finally:
        pair.core.close()
