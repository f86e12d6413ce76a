"""What can differ between the architectures that the decoder knows; `families` holds the entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferflux_backend_torch.config import QKNorm
from inferflux_backend_torch.config_reader import ConfigReader
from inferflux_backend_torch.weights import WeightNames

Windows = Callable[[ConfigReader, int], list[bool]]
"""Which of so many layers have a window."""

LAYER_TYPES = ("full_attention", "sliding_attention")


def never(reader: ConfigReader, num_layers: int) -> list[bool]:
    """No layer has a window."""
    return [False] * num_layers


def always(reader: ConfigReader, num_layers: int) -> list[bool]:
    """If there is a window at all."""
    return [reader.value("sliding_window") is not None] * num_layers


def upper_layers(reader: ConfigReader, num_layers: int) -> list[bool]:
    """Qwen 2 and 3: from `max_window_layers` on."""
    first = reader.integer("max_window_layers", low=0)
    return [layer >= first for layer in range(num_layers)]


def lower_even_layers(reader: ConfigReader, num_layers: int) -> list[bool]:
    """Qwen 2 MoE."""
    end = reader.integer("max_window_layers", low=0)
    return [layer % 2 == 0 and layer < end for layer in range(num_layers)]


def all_but_each(default: int) -> Windows:
    """Gemma 2 and 3: each so many layers, one sees everything."""

    def windows(reader: ConfigReader, num_layers: int) -> list[bool]:
        period = reader.optional_integer("sliding_window_pattern") or default
        return [(layer + 1) % period != 0 for layer in range(num_layers)]

    return windows


def without_rope(reader: ConfigReader, num_layers: int) -> list[bool]:
    """SmolLM 3: in layers without rope."""
    return [not rope for rope in rope_layers(reader, num_layers)]


def rope_layers(reader: ConfigReader, num_layers: int) -> list[bool]:
    """SmolLM 3: the layers that rotate queries and keys."""
    listed = reader.layers("no_rope_layers", num_layers, (0, 1))  # 1 stands for a layer that has rope
    if listed is not None:
        return [bool(rope) for rope in listed]
    interval = reader.optional_integer("no_rope_layer_interval")
    return [interval is None or (layer + 1) % interval != 0 for layer in range(num_layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Keys of config.json that describe the experts of a family.

    Attributes:
        norm_topk_prob: fixed for the family; None reads the key of this name.
    """

    intermediate_size: str = "moe_intermediate_size"
    norm_topk_prob: bool | None = None
    shared_intermediate_size: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How an architecture differs from Llama. The defaults are Llama's.

    Strings are keys of config.json, tuples of them spellings of one setting.

    Attributes:
        defaults: of keys that its files may leave out, as in its configuration class.
        activation: the key.
        gelu_is_tanh: files say `gelu` and mean its tanh approximation.
        layer_norm: layer norm instead of RMS norm.
        norm_offset, pre_norms, post_norms, qk_norm: as in DecoderConfig.
        parallel_residual, qk_norm_switch: key of a flag; None means never and always.
        qkv_bias, o_bias, mlp_bias: key of a flag, or the flag itself.
        sliding: which layers have a window, where `layer_types` does not say it.
        partial_rotary: a part of each head can be rotated.
        local_rope: layers with a window have rope settings of their own.
        scaled_embedding: embedded tokens are multiplied by the root of the hidden size.
        multipliers: has factors of embedding, scores, residuals and logits.
        query_scalar: scores are divided by the root of `query_pre_attn_scalar`, not of the size of a head.
        attention_softcap, logits_softcap: has them.
    """

    names: WeightNames = field(default_factory=WeightNames)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "hidden_act"
    gelu_is_tanh: bool = False
    layer_norm: bool = False
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    parallel_residual: str | None = None
    qk_norm: QKNorm = "none"
    qk_norm_switch: str | None = None
    qkv_bias: bool | tuple[str, ...] = ("attention_bias",)
    o_bias: bool | tuple[str, ...] = ("attention_bias",)
    mlp_bias: bool | tuple[str, ...] = False
    sliding: Windows = never
    partial_rotary: bool = False
    local_rope: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    query_scalar: bool = False
    attention_softcap: bool = False
    logits_softcap: bool = False
    experts: Experts | None = None
