"""What the loader makes of a checkpoint, and which it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers builds the models")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferflux_backend_torch.families import FAMILIES
from inferflux_backend_torch.linear import PlainLinear
from inferflux_backend_torch.weights import expected_tensors, ignored_tensors, weight_bytes
from inferflux_core.errors import ModelFileError
from torch_backend.reference_step import ReferenceRunner, load, open_checkpoint, read_config
from torch_backend.tiny_models import HEAD_DIM, HEADS, KV_HEADS, RECIPES, VOCAB, TinyModel, build, tiny_model

pytestmark = [
    # transformers deprecates parts of itself and of torch at its own pace; its warnings say nothing about this code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(getattr(request, "param", "llama"), tmp_path_factory.getbasetemp() / "tiny")


def changed(tiny: TinyModel, folder: Path, change: Change) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(tiny.folder, folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    return folder


def prompt_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    runner = ReferenceRunner(load(folder, dtype=dtype))
    return runner.step({"a": list(range(3, 20))}, all_tokens=True)["a"]


@pytest.mark.parametrize("tiny", RECIPES, indirect=True)
def test_expected_tensors_are_those_that_transformers_saves(tiny: TinyModel) -> None:
    config, checkpoint = read_config(tiny.folder), open_checkpoint(tiny.folder)
    assert expected_tensors(config) == {name: tuple(entry.shape) for name, entry in checkpoint.tensors.items()}
    assert weight_bytes(config, 4) == checkpoint.num_bytes


def test_norms_count_as_float32_in_smaller_models(tiny: TinyModel) -> None:
    config = read_config(tiny.folder)
    norms = 4 * (2 * config.num_layers + 1) * config.hidden_size
    assert weight_bytes(config, 2) == norms + (weight_bytes(config, 4) - norms) // 2


def test_every_family_has_a_recipe() -> None:
    assert {recipe.architecture for recipe in RECIPES.values()} == set(FAMILIES)


def test_a_layer_has_four_products_and_the_model_one_more(tiny: TinyModel) -> None:
    shapes: list[tuple[int, ...]] = []

    def recorded(weight: Tensor, bias: Tensor | None = None) -> PlainLinear:
        shapes.append(tuple(weight.shape))
        return PlainLinear(weight, bias)

    load(tiny.folder, linear=recorded)
    layer = [((HEADS + 2 * KV_HEADS) * HEAD_DIM, 72), (72, HEADS * HEAD_DIM), (2 * 101, 72), (72, 101)]
    assert sorted(shapes) == sorted([*layer, *layer, (VOCAB, 72)])


def test_a_checkpoint_in_several_files_is_the_same_model(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(prompt_logits(tmp_path), prompt_logits(tiny.folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiny", ["llama", "gemma3", "stablelm-parallel", "olmo2", "qwen2-moe"], indirect=True)
def test_smaller_types_lose_no_more_than_in_transformers(tiny: TinyModel, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    exact, rounded = prompt_logits(tiny.folder), prompt_logits(tiny.folder, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        tiny.folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode():
        theirs = model(torch.arange(3, 20).unsqueeze(0)).logits[0]
    assert rounded.dtype == dtype
    assert float((rounded - exact).std()) < 1.4 * float((theirs - exact).std())


def test_only_the_tokens_asked_for_get_logits_in_the_order_asked(tiny: TinyModel) -> None:
    decoder = load(tiny.folder)
    runner = ReferenceRunner(decoder)
    every = runner.step({"all": [5, 6, 7, 8]}, all_tokens=True)["all"]
    inputs = runner._inputs({"some": [5, 6, 7, 8]})
    inputs.logits_indices = torch.tensor([3, 0])
    with torch.inference_mode():
        some = decoder.logits(decoder.forward(inputs, runner._cache))
    torch.testing.assert_close(some, every[[3, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiny", ["llama", "stablelm-parallel", "mixtral"], indirect=True)
def test_a_chunk_without_logits_leaves_its_keys_and_values(tiny: TinyModel) -> None:
    runner = ReferenceRunner(load(tiny.folder))
    hidden = runner.fill({"chunked": list(range(30, 41))})
    chunked = runner.step({"chunked": [41, 42]})["chunked"]
    whole = ReferenceRunner(load(tiny.folder)).step({"whole": list(range(30, 43))})["whole"]
    assert hidden.shape == (0, load(tiny.folder).hidden_size)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_windows_that_never_close_are_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    mistral = tiny_model("mistral", tmp_path_factory.getbasetemp() / "tiny")
    windows = {length: load(mistral.folder, max_model_len=length).layers[0].window for length in (7, 8)}
    assert windows == {7: None, 8: 7}


def test_the_weights_of_a_tied_head_and_old_buffers_may_be_there(tiny: TinyModel, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(10)

    assert torch.equal(prompt_logits(changed(tiny, tmp_path, add)), prompt_logits(tiny.folder))


@pytest.mark.parametrize("name", ["lm_head.weights", "xlm_head.weight", "model.rotary_emb.inv_freq2", "inv_freq"])
def test_no_other_names_are_ignored(tiny: TinyModel, name: str) -> None:
    assert not any(pattern.match(name) for pattern in ignored_tensors(read_config(tiny.folder)))


def _set(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _damage(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1).__setitem__(4, value)


Q, NORM, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(Q), f"missing: {Q!r}"),
        (_set("model.layers.2.mlp.up_proj.weight", torch.ones(2)), "unexpected: 'model.layers.2.mlp.up_proj.weight'"),
        (_set("model.layers.1.self_attn.q_proj.bias", torch.ones(180)), "unexpected: 'model.layers.1.self_attn.q_proj.bias'"),
        (_set(Q, torch.ones(180, 71)), re.escape(f"{Q!r} is (180, 71) instead of (180, 72)")),
        (_set(Q, torch.ones(180, 72, dtype=torch.int8)), "I8"),
        (_damage(Q, math.nan), f"{Q!r} is nan"),
        (_damage(DOWN, math.inf), f"{DOWN!r} is inf"),
        (_damage(NORM, -math.inf), f"{NORM!r} is -inf"),
        (_damage("model.embed_tokens.weight", math.nan), "'model.embed_tokens.weight' is nan"),
    ],
)
def test_checkpoints_that_contradict_their_configuration_or_are_damaged_are_refused(
    tiny: TinyModel, tmp_path: Path, change: Change, named: str
) -> None:
    folder = changed(tiny, tmp_path, change)
    with pytest.raises(ModelFileError, match=named):
        load(folder)


@pytest.mark.parametrize(
    ("tiny", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("granite-moe", "model.layers.1.block_sparse_moe.output_linear.weight"),
        ("internlm2", "model.layers.1.attention.wqkv.weight"),
        ("stablelm-parallel", "model.layers.1.self_attn.k_layernorm.norms.2.weight"),
        ("qwen2-moe", "model.layers.1.mlp.shared_expert_gate.weight"),
    ],
    indirect=["tiny"],
)
def test_damage_in_any_kind_of_tensor_is_found(tiny: TinyModel, tmp_path: Path, name: str) -> None:
    folder = changed(tiny, tmp_path, _damage(name, math.nan))
    with pytest.raises(ModelFileError, match=re.escape(f"{name!r} is nan")):
        load(folder)


def test_an_untied_head_must_be_there(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFileError, match=r"missing: 'lm_head\.weight'"):
        load(tmp_path)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(tiny, tmp_path, lambda tensors: tensors.pop(NORM))

    def allocate(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("allocated")

    for function in ("empty", "zeros"):
        monkeypatch.setattr(torch, function, allocate)
    with pytest.raises(ModelFileError, match="missing"):
        load(folder)


def test_sizes_that_are_no_multiples_of_anything_load(tmp_path: Path) -> None:
    recipe = RECIPES["llama"]
    odd = {**recipe.settings, "num_hidden_layers": 3, "num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 77}
    model = build(
        type(recipe)(recipe.config_class, {**odd, "head_dim": 6, "intermediate_size": 1}, recipe.architecture), tmp_path
    )
    with torch.inference_mode():
        theirs = model(torch.arange(3, 20).unsqueeze(0)).logits[0]
    torch.testing.assert_close(prompt_logits(tmp_path), theirs, rtol=1e-4, atol=1e-4)
