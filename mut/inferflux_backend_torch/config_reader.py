"""Typed, bounded access to config.json. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from inferflux_core.errors import ModelFileError

if TYPE_CHECKING:
    from inferflux_backend_torch.ops import Activation

MAX_LAYERS = 1024
MAX_SIZE = 1 << 20  # of hidden and intermediate dimensions
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 27

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}


def _none(value: object) -> bool:
    return value is None


def _off(value: object) -> bool:
    return value is None or value is False


def _one(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and value == 1)


# Settings that change what a model computes, with the values that change nothing. A family reads those that it has; the others
# must be neutral. Taken from the configurations of the decoder-only models of transformers 4.40 to 5.23.
_NEUTRAL: Final[Mapping[str, Callable[[object], bool]]] = {
    **dict.fromkeys(
        (
            "attention_bias", "mlp_bias", "bias", "qkv_bias", "use_qkv_bias", "use_bias", "lm_head_bias", "alibi",
            "qk_layernorm", "use_qk_norm", "qk_norm", "use_parallel_residual", "parallel_attn", "use_bidirectional_attention",
            "use_mrope", "use_sliding_window", "is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx",
            "rope_interleave", "rope_interleaved", "attn_temperature_tuning", "attention_sinks", "scale_embedding",
            "normalize_embedding", "multi_query",
        ),
        _off,
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "logits_scaling", "residual_multiplier", "logit_scale", "scale_emb", "partial_rotary_factor"),
        _one,
    ),
    **dict.fromkeys(
        (
            "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "attention_multiplier", "query_pre_attn_scalar",
            "sliding_window", "no_rope_layers", "num_experts", "num_local_experts", "n_routed_experts",
            "kv_lora_rank", "mup_width_multiplier", "q_lora_rank", "scale_depth", "dim_model_base", "rope_local_base_freq",
            "text_config", "vision_config", "mlp_only_layers", "per_layer_config", "swiglu_limit", "interleaved_sliding_window",
        ),
        _none,
    ),
    "position_embedding_type": lambda value: value in (None, "rope", "rotary"),
    "layer_types": lambda value: value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"}),
}  # fmt: skip


class ConfigReader:
    """Typed, bounded access to config.json that remembers which settings were read.

    Args:
        raw: the object in config.json.
        defaults: of this architecture, for keys that the file leaves out.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw = raw
        self._defaults = defaults
        self._read: set[str] = set()

    def fail(self, key: str, problem: str) -> NoReturn:
        """Refuse the model for the value of `key`."""
        value = repr(self.raw[key]) if key in self.raw else "missing"
        value = value if len(value) <= 200 else f"{value[:200]}..."
        raise ModelFileError(f"config.json: {key!r} is {value}: {problem}")

    def value(self, key: str) -> Any:
        """The value as it is; the family's default where it is missing; None without one."""
        self._read.add(key)
        value = self.raw.get(key)
        return self._defaults.get(key) if key not in self.raw else value

    def has(self, *keys: str) -> str:
        """The first of the keys that the file has, or else the first: spellings of one setting."""
        self._read.update(keys)
        return next((key for key in keys if self.raw.get(key) is not None), keys[0])

    def integer(self, key: str, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.optional_integer(key, low, high)
        if value is None:
            self.fail(key, f"an integer from {low} to {high} is needed")
        return value

    def optional_integer(self, key: str, low: int = 1, high: int = MAX_SIZE) -> int | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, f"it must be an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float = 0.0, high: float = 1e9) -> float:
        value = self.optional_number(key, low, high)
        if value is None:
            self.fail(key, f"a number above {low:g} up to {high:g} is needed")
        return value

    def optional_number(self, key: str, low: float = 0.0, high: float = 1e9) -> float | None:
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            self.fail(key, f"it must be a number above {low:g} up to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.fail(key, "it must be true or false")
        return value

    def activation(self, key: str) -> Activation:
        value = self.value(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.fail(key, f"this activation is unknown; known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def layers(self, key: str, num_layers: int, allowed: Collection[object]) -> list[Any] | None:
        """A list with one of the allowed values for each layer; None where the file has none."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != num_layers:
            self.fail(key, f"it must be a list of {num_layers}, one for each of 'num_hidden_layers'")
        for item in value:
            if not isinstance(item, str | int) or item not in allowed:
                self.fail(key, f"{item!r} is unknown; known are {', '.join(map(repr, allowed))}")
        return value

    def refuse_unread(self) -> None:
        """Refuse settings that change what the model computes and that nothing has read.

        Raises:
            ModelFileError: names the setting.
        """
        for key, is_neutral in _NEUTRAL.items():
            if key not in self._read and not is_neutral(self.raw.get(key)):
                self.fail(
                    key,
                    "the decoder for this architecture does not implement it; serve the model with `model_impl: transformers`, "
                    "or remove the setting if the model was trained without it",
                )


def finite(value: object) -> bool:
    """Whether the value is a number, and none of NaN and the infinities that Python's JSON admits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
