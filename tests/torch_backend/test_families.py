"""Every family's decoder computes what transformers' does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers is the reference")

import torch

from torch_backend.reference_step import ReferenceRunner, load
from torch_backend.tiny_models import RECIPES, VOCAB, TinyModel, tiny_model
from torch_backend.twin import demo_twin

pytestmark = [
    # transformers deprecates parts of itself and of torch at its own pace; its warnings say nothing about this code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def prompt(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def reference_generate(model: Any, tokens: list[int], count: int) -> list[int]:
    inputs = torch.tensor([tokens])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False)
    generated: list[int] = output[0, len(tokens) :].tolist()
    return generated


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of two sets of logits, relative to their spread."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.fixture(params=RECIPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.getbasetemp() / "tiny")


def test_logits_equal_those_of_transformers(tiny: TinyModel) -> None:
    tokens = prompt(23)
    runner = ReferenceRunner(load(tiny.folder, max_model_len=128))
    logits = runner.step({"a": tokens}, all_tokens=True)["a"]
    assert difference(logits, reference_logits(tiny.reference, tokens)) < 1e-4


def test_64_greedy_tokens_equal_those_of_generate_for_a_batch_of_prompts_of_different_lengths(tiny: TinyModel) -> None:
    prompts = {"a": prompt(23), "b": prompt(1, seed=4), "c": prompt(6, seed=5)}
    outputs = ReferenceRunner(load(tiny.folder, max_model_len=128)).generate(prompts, 64)
    assert outputs == {name: reference_generate(tiny.reference, tokens, 64) for name, tokens in prompts.items()}


def test_chunks_of_a_prompt_mixed_with_decodes_equal_the_whole(tiny: TinyModel) -> None:
    runner = ReferenceRunner(load(tiny.folder, max_model_len=128))
    long, other = prompt(23), prompt(9, seed=6)
    runner.step({"other": other[:5]})
    runner.step({"other": other[5:6], "long": long[:10]})
    runner.step({"long": long[10:17], "other": other[6:7]})
    mixed = runner.step({"other": other[7:9], "long": long[17:]})
    for name, tokens in (("long", long), ("other", other)):
        assert difference(mixed[name], reference_logits(tiny.reference, tokens)[-1]) < 1e-4


def test_the_demo_model_generates_what_it_does_in_transformers() -> None:
    from transformers import AutoModelForCausalLM

    folder = demo_twin()
    prompts = {"france": [504, 3575, 282, 4649, 314], "code": [1604, 26843, 24, 96, 731]}
    ours = ReferenceRunner(load(folder)).generate(prompts, 32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # which would end the comparison early
    inputs = torch.tensor(list(prompts.values()))
    theirs = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=32, do_sample=False, pad_token_id=0)
    assert list(ours.values()) == theirs[:, 5:].tolist()
