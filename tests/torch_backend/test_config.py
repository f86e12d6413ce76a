"""What is read from config.json, and which files are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.families import FAMILIES, decoder_config
from inferflux_backend_torch.weights import expected_tensors, weight_bytes
from inferflux_core.errors import ModelFileError

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "max_position_embeddings": 256,
    # of families with experts
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 37,
    "shared_expert_intermediate_size": 53,
    # StableLM rotates a quarter of a head, which has to be even
    "partial_rotary_factor": 1.0,
}
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.experts is not None]


def raw_config(architecture: str, **changes: Any) -> dict[str, Any]:
    raw = {key: value for key, value in SIZES.items() if architecture in WITH_EXPERTS or key not in EXPERTS}
    return {**raw, "architectures": [architecture], **changes}


def read(architecture: str, **changes: Any) -> DecoderConfig:
    config = decoder_config(raw_config(architecture, **changes))
    assert config is not None
    return config


def llama(**changes: Any) -> DecoderConfig:
    return read("LlamaForCausalLM", **changes)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_can_be_read_with_its_defaults(architecture: str) -> None:
    config = read(architecture)
    assert (config.num_layers, len(config.windows), len(config.ropes)) == (4, 4, 4)
    assert weight_bytes(config, 4) == sum(4 * _product(shape) for shape in expected_tensors(config).values())


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize(
    "architectures", [None, [], ["GPT2LMHeadModel"], ["Gemma3ForConditionalGeneration", "LlamaForCausalLM"]]
)
def test_unknown_architectures_are_left_to_others(architectures: list[str] | None) -> None:
    assert decoder_config({**SIZES, "architectures": architectures}) is None


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_that_are_no_list_of_names_are_refused(architectures: object) -> None:
    with pytest.raises(ModelFileError, match="'architectures'"):
        decoder_config({"architectures": architectures})


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "AlienForCausalLM"])
def test_code_of_the_model_is_refused_for_every_architecture(architecture: str) -> None:
    raw = raw_config(architecture, auto_map={"AutoModelForCausalLM": "modeling.Alien"})
    with pytest.raises(ModelFileError, match=r"'auto_map'.*'modeling\.Alien'.*never does\. Remove 'auto_map'"):
        decoder_config(raw)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", "awq", "'awq'"),
        ("compression_config", {}, "'compression_config'"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(key: str, value: object, named: str) -> None:
    with pytest.raises(ModelFileError, match=f"{key}.*{named}" if named not in repr(key) else named):
        llama(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", None),
        ("vocab_size", 0),
        ("vocab_size", 1 << 40),
        ("hidden_size", "72"),
        ("hidden_size", 72.0),
        ("hidden_size", True),
        ("hidden_size", -1),
        ("num_hidden_layers", 1_000_000),
        ("num_attention_heads", 10),
        ("num_key_value_heads", 4),
        ("head_dim", 7),
        ("head_dim", 0),
        ("intermediate_size", []),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", "1e-6"),
        ("hidden_act", "alien"),
        ("hidden_act", None),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
    ],
)
def test_values_of_the_wrong_kind_or_size_are_refused_by_name(key: str, value: object) -> None:
    named = "num_key_value_heads" if key == "num_attention_heads" else key
    with pytest.raises(ModelFileError, match=f"config.json: '{named}' is "):
        llama(**{key: value})


def test_a_size_that_is_missing_is_named() -> None:
    raw = raw_config("LlamaForCausalLM")
    del raw["hidden_size"]
    with pytest.raises(ModelFileError, match="'hidden_size' is missing"):
        decoder_config(raw)


def test_heads_that_do_not_divide_the_hidden_size_need_a_size_of_their_own() -> None:
    with pytest.raises(ModelFileError, match="'num_attention_heads' is 9: it must divide 'hidden_size', which is 70"):
        llama(hidden_size=70, head_dim=None)
    assert llama(hidden_size=70).head_dim == 20


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"sliding_window": 128}),
        ("LlamaForCausalLM", {"layer_types": ["sliding_attention"] * 4}),
        ("LlamaForCausalLM", {"clip_qkv": 8.0}),
        ("LlamaForCausalLM", {"num_local_experts": 8}),
        ("LlamaForCausalLM", {"final_logit_softcapping": 30.0}),
        ("LlamaForCausalLM", {"residual_multiplier": 0.5}),
        ("MistralForCausalLM", {"attention_bias": True}),
        ("Qwen2ForCausalLM", {"mlp_bias": True}),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}),
        ("GraniteForCausalLM", {"position_embedding_type": "nope"}),
        ("Phi3ForCausalLM", {"lm_head_bias": True}),
        ("Qwen3ForCausalLM", {"num_experts": 8}),
    ],
)
def test_settings_that_the_decoder_does_not_implement_are_refused_not_ignored(
    architecture: str, changes: dict[str, Any]
) -> None:
    (key,) = changes
    with pytest.raises(ModelFileError, match=f"'{key}' is .*does not implement it; serve the model with `model_impl"):
        read(architecture, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 4},
        {"residual_multiplier": 1.0, "clip_qkv": None, "alibi": False, "partial_rotary_factor": 1},
        {
            "pretraining_tp": 4,
            "attention_dropout": 0.5,
            "torch_dtype": "bfloat16",
            "unsloth_version": "1",
            "transformers.js": {},
        },
    ],
)
def test_settings_that_change_nothing_are_ignored(changes: dict[str, Any]) -> None:
    assert llama(**changes) == llama()


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {}, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("Phi3ForCausalLM", {"sliding_window": 2047}, [2047] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 2}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 2, "use_sliding_window": True}, [None, None, 7, 7]),
        ("Qwen2ForCausalLM", {"sliding_window": None, "use_sliding_window": True}, [None] * 4),
        ("Qwen2MoeForCausalLM", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, [7, None, 7, None]),
        ("Qwen3MoeForCausalLM", {"sliding_window": 7, "use_sliding_window": True}, [7] * 4),
        ("Gemma2ForCausalLM", {"sliding_window": 7}, [7, None, 7, None]),
        ("Gemma3ForCausalLM", {"sliding_window": 7}, [7] * 4),
        ("Gemma3ForCausalLM", {"sliding_window": 7, "sliding_window_pattern": 3}, [7, 7, None, 7]),
        ("SmolLM3ForCausalLM", {"sliding_window": 7}, [None] * 4),
        ("SmolLM3ForCausalLM", {"sliding_window": 7, "use_sliding_window": True}, [None, None, None, 7]),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 2},
            [None, 7, None, 7],
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True},
            [None, 7, None, 7],
        ),
    ],
)
def test_windows_by_layer(architecture: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    assert list(read(architecture, **changes).windows) == windows


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 3}, "'layer_types' is .*a list of 4"),
        ("Gemma3ForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is unknown"),
        ("Gemma3ForCausalLM", {"layer_types": "full_attention"}, "'layer_types'"),
        ("Gemma3ForCausalLM", {"sliding_window": None}, "'sliding_window' is None: layers with a window need its size"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [2, 1, 1, 1]}, "2 is unknown"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 6}, "'num_experts_per_tok' is 6: there are only 5 experts"),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0.5]}, "'mlp_only_layers'"),
    ],
)
def test_lists_and_experts_that_contradict_the_sizes_are_refused(
    architecture: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelFileError, match=named):
        read(architecture, **changes)


def test_gemma_means_the_tanh_approximation() -> None:
    assert read("GemmaForCausalLM", hidden_act="gelu").activation == "gelu_tanh"
    assert read("LlamaForCausalLM", hidden_act="gelu").activation == "gelu"


@pytest.mark.parametrize(
    ("step", "dense", "sparse"),
    [(1, [], [True] * 4), (2, [], [False, True, False, True]), (1, [1, 2], [True, False, False, True])],
)
def test_layers_with_experts(step: int, dense: list[int], sparse: list[bool]) -> None:
    moe = read("Qwen3MoeForCausalLM", decoder_sparse_step=step, mlp_only_layers=dense).moe
    assert moe is not None
    assert list(moe.sparse) == sparse


NUMBERS = st.one_of(st.integers(-2, 1 << 50), st.floats(), st.none(), st.booleans())
JSON = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
KEYS = sorted(
    {*SIZES, "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"}
    | {"use_sliding_window", "mlp_only_layers", "no_rope_layers", "architectures", "auto_map", "quantization_config"}
    | {"tie_word_embeddings", "max_window_layers", "decoder_sparse_step", "query_pre_attn_scalar", "residual_multiplier"}
)


@settings(deadline=None, max_examples=300)
@given(architecture=st.sampled_from(sorted(FAMILIES)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_file_is_read_or_refused_with_its_reason(architecture: str, changes: dict[str, Any]) -> None:
    try:
        config = decoder_config(raw_config(architecture, **changes))
    except ModelFileError as error:
        assert str(error).startswith("config.json: '")  # noqa: PT017  both outcomes are right
    else:
        assert config is None or len(config.windows) == config.num_layers


# As on the hub, less what says nothing about the maths.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-0.5B-Instruct": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 21,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    raw, parameters = PUBLISHED[name]
    config = decoder_config(raw)
    assert config is not None
    assert weight_bytes(config, 4) == 4 * parameters
