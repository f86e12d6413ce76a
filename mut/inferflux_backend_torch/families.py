"""The architectures with a decoder of their own here: what each changes against Llama. A new family is a new entry of FAMILIES.

Sources: each family's modelling file in transformers 5.23, and for InternLM 2 the one in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferflux_backend_torch.config import DecoderConfig, MoEConfig
from inferflux_backend_torch.config_reader import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, ConfigReader
from inferflux_backend_torch.family import (
    LAYER_TYPES,
    Experts,
    Family,
    all_but_each,
    always,
    lower_even_layers,
    never,
    rope_layers,
    upper_layers,
    without_rope,
)
from inferflux_backend_torch.rope import RopeConfig, RopeReader
from inferflux_backend_torch.weights import WeightNames
from inferflux_core.errors import ModelFileError

_GEMMA_SANDWICH = WeightNames(mlp_norm="pre_feedforward_layernorm")
_GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_MIXTRAL_NAMES = WeightNames(
    router="block_sparse_moe.gate",
    expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(mlp_bias=("mlp_bias",)),
    "MistralForCausalLM": Family(defaults={"sliding_window": 4096}, qkv_bias=False, o_bias=False, sliding=always),
    "Qwen2ForCausalLM": Family(defaults=_WINDOWED, qkv_bias=True, o_bias=False, sliding=upper_layers),
    "Qwen3ForCausalLM": Family(
        defaults={**_WINDOWED, "head_dim": 128},
        qk_norm="head",
        sliding=upper_layers,
    ),
    "GemmaForCausalLM": Family(
        defaults={"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
        gelu_is_tanh=True,
        norm_offset=1.0,
        scaled_embedding=True,
    ),
    "Gemma2ForCausalLM": Family(
        names=_GEMMA_SANDWICH,
        defaults={
            **_GEMMA,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation="hidden_activation",
        norm_offset=1.0,
        post_norms=True,
        sliding=all_but_each(2),
        scaled_embedding=True,
        query_scalar=True,
        attention_softcap=True,
        logits_softcap=True,
    ),
    "Gemma3ForCausalLM": Family(
        names=_GEMMA_SANDWICH,
        defaults={
            **_GEMMA,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        activation="hidden_activation",
        norm_offset=1.0,
        post_norms=True,
        qk_norm="head",
        sliding=all_but_each(6),
        local_rope=True,
        scaled_embedding=True,
        query_scalar=True,
        logits_softcap=True,
    ),
    "Phi3ForCausalLM": Family(
        names=WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        qkv_bias=False,
        o_bias=False,
        sliding=always,
        partial_rotary=True,
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
        },
        mlp_bias=("mlp_bias",),
        sliding=without_rope,
    ),
    "Olmo2ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5},
        pre_norms=False,
        post_norms=True,
        qk_norm="full",
    ),
    "GraniteForCausalLM": Family(mlp_bias=("mlp_bias",), multipliers=True),
    "StableLmForCausalLM": Family(
        names=WeightNames(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
        defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
        layer_norm=True,
        parallel_residual="use_parallel_residual",
        qk_norm="head_layer",
        qk_norm_switch="qk_layernorm",
        qkv_bias=("use_qkv_bias",),
        o_bias=False,
        partial_rotary=True,
    ),
    "InternLM2ForCausalLM": Family(
        names=WeightNames(
            embedding="model.tok_embeddings",
            head="output",
            qkv=("attention.wqkv",),
            qkv_grouped=True,
            o="attention.wo",
            gate_up=("feed_forward.w1", "feed_forward.w3"),
            down="feed_forward.w2",
            attention_norm="attention_norm",
            mlp_norm="ffn_norm",
        ),
        defaults={"bias": True},
        qkv_bias=("bias",),
        o_bias=("bias",),
    ),
    "InternLM3ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128},
        qkv_bias=("qkv_bias", "attention_bias"),
        o_bias=("bias", "mlp_bias"),
        mlp_bias=("bias", "mlp_bias"),
    ),
    "MixtralForCausalLM": Family(
        names=_MIXTRAL_NAMES,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8},
        qkv_bias=False,
        o_bias=False,
        sliding=always,
        experts=Experts(intermediate_size="intermediate_size", norm_topk_prob=True),
    ),
    "Qwen2MoeForCausalLM": Family(
        defaults={**_WINDOWED, "qkv_bias": True, "decoder_sparse_step": 1},
        qkv_bias=("qkv_bias",),
        o_bias=False,
        sliding=lower_even_layers,
        experts=Experts(shared_intermediate_size="shared_expert_intermediate_size"),
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={**_WINDOWED, "decoder_sparse_step": 1},
        qk_norm="head",
        sliding=always,
        experts=Experts(),
    ),
    "OlmoeForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5},
        qk_norm="full",
        experts=Experts(intermediate_size="intermediate_size"),
    ),
    "GraniteMoeForCausalLM": Family(
        names=WeightNames(
            router="block_sparse_moe.router.layer",
            expert_gate_up=("block_sparse_moe.input_linear",),
            expert_down="block_sparse_moe.output_linear",
        ),
        multipliers=True,
        experts=Experts(intermediate_size="intermediate_size", norm_topk_prob=True),
    ),
}


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig | None:
    """Read the content of config.json.

    Returns:
        what the decoder needs; None for an architecture that has no decoder of its own here.

    Raises:
        ModelFileError: the file wants remote code or quantized weights; a setting is missing, of the wrong kind or size,
            contradicts another, or changes what the model computes in a way that the decoder doesn't implement. Names it.
    """
    if raw.get("auto_map") is not None:
        raise ModelFileError(
            f"config.json: 'auto_map' is {raw['auto_map']!r}: the model wants code of its own to be run, which this server "
            "never does. Remove 'auto_map' from config.json if 'architectures' names one that is known here: "
            f"{', '.join(FAMILIES)}"
        )
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            method = raw[key].get("quant_method") if isinstance(raw[key], Mapping) else raw[key]
            raise ModelFileError(
                f"config.json: {key!r} says that the weights are quantized by {method!r}, which this backend doesn't read; "
                "take the original checkpoint, and `quantization: int8` to quantize it here"
            )
    architectures = raw.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)):
        raise ModelFileError(f"config.json: 'architectures' is {architectures!r}: it must be a list of names")
    family = FAMILIES.get(architectures[0]) if architectures else None
    if family is None:
        return None
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, **family.defaults}
    reader = ConfigReader(raw, defaults)
    config = _read(reader, family)
    reader.refuse_unread()
    return config


def _read(reader: ConfigReader, family: Family) -> DecoderConfig:
    num_layers = reader.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden_size = reader.integer("hidden_size")
    num_heads, num_kv_heads, head_dim = _heads(reader, hidden_size)
    multipliers = family.multipliers
    activation = reader.activation(family.activation)
    scalar = reader.number("query_pre_attn_scalar") if family.query_scalar else float(head_dim)
    scaled_embedding = float(hidden_size) ** 0.5 if family.scaled_embedding else 1.0
    return DecoderConfig(
        vocab_size=reader.integer("vocab_size", high=MAX_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.integer("max_position_embeddings", high=MAX_POSITIONS),
        norm="layer" if family.layer_norm else "rms",
        norm_eps=reader.number("layer_norm_eps" if family.layer_norm else "rms_norm_eps", high=1.0),
        norm_offset=family.norm_offset,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        parallel_residual=family.parallel_residual is not None and reader.flag(family.parallel_residual),
        qk_norm=family.qk_norm if family.qk_norm_switch is None or reader.flag(family.qk_norm_switch) else "none",
        qkv_bias=_bias(reader, family.qkv_bias),
        o_bias=_bias(reader, family.o_bias),
        mlp_bias=_bias(reader, family.mlp_bias),
        activation="gelu_tanh" if family.gelu_is_tanh and activation == "gelu" else activation,
        attention_scale=_multiplier(reader, "attention_multiplier") if multipliers else scalar**-0.5,
        attention_softcap=reader.optional_number("attn_logit_softcapping") if family.attention_softcap else None,
        logits_softcap=reader.optional_number("final_logit_softcapping") if family.logits_softcap else None,
        embedding_multiplier=_multiplier(reader, "embedding_multiplier") if multipliers else scaled_embedding,
        residual_multiplier=_multiplier(reader, "residual_multiplier") if multipliers else 1.0,
        logits_divisor=_multiplier(reader, "logits_scaling") if multipliers else 1.0,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        windows=_windows(reader, family, num_layers),
        ropes=_ropes(reader, family, num_layers, head_dim),
        moe=None if family.experts is None else _moe(reader, family.experts, num_layers),
        names=family.names,
    )


def _heads(reader: ConfigReader, hidden_size: int) -> tuple[int, int, int]:
    """Query heads, KV heads and the size of a head."""
    num_heads = reader.integer("num_attention_heads", high=4096)
    num_kv_heads = reader.optional_integer("num_key_value_heads", high=4096) or num_heads
    if num_heads % num_kv_heads:
        reader.fail("num_key_value_heads", f"it must divide 'num_attention_heads', which is {num_heads}")
    head_dim = reader.optional_integer("head_dim", high=1024)
    if head_dim is None:
        if hidden_size % num_heads:
            reader.fail(
                "num_attention_heads", f"it must divide 'hidden_size', which is {hidden_size}, unless 'head_dim' is given"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        reader.fail("head_dim", f"heads of {head_dim} can't be rotated by halves; it must be even")
    return num_heads, num_kv_heads, head_dim


def _bias(reader: ConfigReader, bias: bool | tuple[str, ...]) -> bool:
    return bias if isinstance(bias, bool) else reader.flag(reader.has(*bias))


def _multiplier(reader: ConfigReader, key: str) -> float:
    value = reader.optional_number(key)
    return 1.0 if value is None else value


def _windows(reader: ConfigReader, family: Family, num_layers: int) -> tuple[int | None, ...]:
    none = (None,) * num_layers
    if family.sliding is never:
        return none
    layer_types = reader.layers("layer_types", num_layers, LAYER_TYPES)
    window = reader.optional_integer("sliding_window", high=MAX_POSITIONS)
    if "use_sliding_window" in family.defaults and not (reader.flag("use_sliding_window") and window):
        return none
    if layer_types is None:
        sliding = family.sliding(reader, num_layers)
    else:
        sliding = [layer_type == "sliding_attention" for layer_type in layer_types]
    if any(sliding) and window is None:
        reader.fail("sliding_window", "layers with a window need its size")
    return tuple(window if slides else None for slides in sliding)


def _ropes(reader: ConfigReader, family: Family, num_layers: int, head_dim: int) -> tuple[RopeConfig | None, ...]:
    ropes = RopeReader(reader, head_dim, partial=family.partial_rotary)
    if family.local_rope:
        by_type = ropes.read_by_layer_type()
        windows = _windows(reader, family, num_layers)
        return tuple(by_type[LAYER_TYPES[window is not None]] for window in windows)
    rope = ropes.read()
    if "no_rope_layer_interval" not in family.defaults:
        return (rope,) * num_layers
    return tuple(rope if has_rope else None for has_rope in rope_layers(reader, num_layers))


def _moe(reader: ConfigReader, experts: Experts, num_layers: int) -> MoEConfig:
    num_experts = reader.integer(reader.has("num_experts", "num_local_experts"), high=4096)
    top_k = reader.integer("num_experts_per_tok", high=4096)
    if top_k > num_experts:
        reader.fail("num_experts_per_tok", f"there are only {num_experts} experts")
    step = reader.optional_integer("decoder_sparse_step") or 1
    dense = reader.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        reader.fail("mlp_only_layers", "it must be a list of layers")
    shared = experts.shared_intermediate_size
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        norm_topk_prob=reader.flag("norm_topk_prob") if experts.norm_topk_prob is None else experts.norm_topk_prob,
        intermediate_size=reader.integer(experts.intermediate_size),
        shared_intermediate_size=0 if shared is None else reader.integer(shared),
        sparse=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers)),
    )
