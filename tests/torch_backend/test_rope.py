"""Every rope variant, and both spellings of its settings, against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers is the reference")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, StableLmConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.families import decoder_config
from inferflux_backend_torch.rope import RopeConfig, rope_table
from inferflux_core.errors import ModelFileError

HEAD_DIM = 20
MAX_POSITION = 64

PLAIN: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 180,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": MAX_POSITION,
}
FACTORS = [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)]

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "attention_factor": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn-short": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 32,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 32,
        "factor": 3.0,
    },
}


def read(architecture: str, settings: Mapping[str, Any]) -> DecoderConfig:
    config = decoder_config({**PLAIN, **settings, "architectures": [architecture]})
    assert config is not None
    return config


def read_rope(architecture: str, settings: Mapping[str, Any]) -> RopeConfig:
    (rope,) = set(read(architecture, settings).ropes)
    assert rope is not None
    return rope


def reference_table(module: Any, length: int, *layer_type: str) -> torch.Tensor:
    """transformers' cosines and sines in the layout of `rope_table`: theirs hold each half twice."""
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(length).unsqueeze(0), *layer_type)
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), 1)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the rounding of float32 angles."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("length", [20, 100])  # on both sides of the context of training
@pytest.mark.parametrize("name", SETTINGS)
def test_each_type_equals_transformers(name: str, length: int) -> None:
    settings = {"rope_parameters": {**SETTINGS[name], "rope_theta": 5000.0}}
    theirs = reference_table(LlamaRotaryEmbedding(LlamaConfig(**PLAIN, **settings)), length)
    assert_equal(rope_table(read_rope("LlamaForCausalLM", settings), length), theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_spelling_of_transformers_4_means_the_same(name: str) -> None:
    old = dict(SETTINGS[name])
    old["type"] = old.pop("rope_type")
    expected = read_rope("LlamaForCausalLM", {"rope_parameters": {**SETTINGS[name], "rope_theta": 5000.0}})
    assert read_rope("LlamaForCausalLM", {"rope_theta": 5000.0, "rope_scaling": old}) == expected


def test_files_without_rope_settings_have_the_base_of_their_family() -> None:
    bases = {name: read_rope(f"{name}ForCausalLM", {}).theta for name in ("Llama", "Qwen2", "Granite")}
    assert bases == {"Llama": 10000.0, "Qwen2": 10000.0, "Granite": 10000.0}
    assert read("SmolLM3ForCausalLM", {}).ropes[0] == RopeConfig(
        rope_type="default", theta=2e6, dim=HEAD_DIM, max_position_embeddings=MAX_POSITION
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.3}},
        {"rope_theta": 500.0, "hidden_size": 9 * 24},  # the family's default, a quarter
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
    ],
)
def test_partial_rotation_equals_transformers(settings: dict[str, Any]) -> None:
    config = StableLmConfig(**{**PLAIN, **settings})
    theirs = reference_table(StableLmRotaryEmbedding(config), 20)
    assert_equal(rope_table(read_rope("StableLmForCausalLM", settings), 20), theirs)


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("old_type", ["su", "yarn", "longrope"])  # of which the first two are early names for the third
def test_phi3_longrope_equals_transformers(old_type: str, length: int) -> None:
    settings: dict[str, Any] = {
        "rope_theta": 5000.0,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": old_type, "short_factor": FACTORS, "long_factor": [2 * f for f in FACTORS]},
    }
    ours = rope_table(read_rope("Phi3ForCausalLM", settings), length)
    config = Phi3Config(
        **{**PLAIN, **settings, "rope_scaling": dict(settings["rope_scaling"], type="longrope"), "pad_token_id": None}
    )
    assert_equal(ours, reference_table(Phi3RotaryEmbedding(config), length))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope_theta": 2e5, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    ],
)
def test_gemma3_has_frequencies_of_its_own_for_layers_with_a_window(settings: dict[str, Any]) -> None:
    settings = {**settings, "head_dim": HEAD_DIM, "layer_types": ["sliding_attention", "full_attention"]}
    local, full = read("Gemma3ForCausalLM", settings).ropes
    assert local is not None
    assert full is not None
    module = Gemma3RotaryEmbedding(Gemma3TextConfig(**{**PLAIN, **settings}))
    assert_equal(rope_table(local, 100), reference_table(module, 100, "sliding_attention"))
    assert_equal(rope_table(full, 100), reference_table(module, 100, "full_attention"))


def test_smollm3_rotates_nothing_in_the_layers_that_say_so() -> None:
    listed = read("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}).ropes
    counted = read("SmolLM3ForCausalLM", {"num_hidden_layers": 5}).ropes
    assert [rope is not None for rope in listed] == [False, True]
    assert [rope is not None for rope in counted] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"type": "alien", "factor": 2.0}}, "'alien'"),
        ({"rope_parameters": {"rope_type": 3}}, "'rope_type'"),
        ({"rope_parameters": [1]}, "'rope_parameters'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 4, 4]}}, "'mrope_section'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "'beta_fast'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"rope_theta": 0}, "'rope_theta'"),
        ({"rope_theta": float("nan")}, "'rope_theta'"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "'rope_theta'"),
        ({"rope_parameters": {**SETTINGS["longrope"], "short_factor": [1.0]}}, "'short_factor'"),
        ({"rope_parameters": {**SETTINGS["longrope"], "long_factor": [0.0] * 10}}, "'long_factor'"),
        ({"rope_parameters": {**SETTINGS["llama3"], "high_freq_factor": 0.5}}, "'high_freq_factor'"),
        (
            {"rope_parameters": {**SETTINGS["yarn"], "original_max_position_embeddings": 0}},
            "'original_max_position_embeddings'",
        ),
        ({"rope_parameters": {**SETTINGS["yarn"], "rope_theta": 0.5}}, "'rope_theta'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFileError, match=named):
        read("LlamaForCausalLM", settings)


def test_a_setting_beside_those_by_layer_type_is_refused() -> None:
    settings = {"rope_parameters": {"full_attention": {"rope_type": "default"}, "factor": 2.0}, "head_dim": HEAD_DIM}
    with pytest.raises(ModelFileError, match="'factor'"):
        read("Gemma3ForCausalLM", settings)


def test_an_odd_number_of_rotated_entries_is_refused() -> None:
    with pytest.raises(ModelFileError, match="rotates 5 entries of a head of 20"):
        read("StableLmForCausalLM", {})


NUMBERS = st.one_of(st.integers(-3, 10**9), st.floats(), st.none(), st.booleans(), st.text(max_size=3))
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=11))
KEYS = sorted({key for settings in SETTINGS.values() for key in settings} | {"rope_theta", "partial_rotary_factor", "type"})


@settings(deadline=None)
@given(name=st.sampled_from(sorted(SETTINGS)), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_settings_are_refused_by_name_or_give_a_finite_table(name: str, changes: dict[str, Any]) -> None:
    try:
        rope = read_rope("LlamaForCausalLM", {"rope_parameters": {**SETTINGS[name], **changes}})
    except ModelFileError as error:
        assert str(error).startswith("config.json: '")  # noqa: PT017  both outcomes are right
    else:
        table = rope_table(rope, 70)
        assert table.shape == (70, HEAD_DIM)
        assert bool(table.isfinite().all())
