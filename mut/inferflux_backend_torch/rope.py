"""Rotary position embedding: the variants of its frequencies, and the table that kernels look up.

The variants follow transformers' `modeling_rope_utils`, and their results equal its to float32 rounding. Two of them, `dynamic`
and `longrope`, change their frequencies there while a sequence grows. Keys in a paged cache are shared between sequences and
stay as they are, so here the frequencies are chosen once, for `max_model_len`, as vLLM does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, get_args

from inferflux_backend_torch.config_reader import MAX_POSITIONS, ConfigReader, finite
from inferflux_core.errors import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies of one kind of layer.

    Attributes:
        rope_type: default (arXiv 2104.09864); linear (position interpolation, arXiv 2306.15595); dynamic (NTK-aware scaling);
            yarn (arXiv 2309.00071); longrope (arXiv 2402.13753); llama3 (arXiv 2407.21783).
        dim: entries of a head that are rotated, even.
        factor: by which the context is longer than in pretraining.
        original_max_position_embeddings: context of pretraining.
        attention_factor: of cosines and sines.
        short_factor, long_factor: dim / 2 divisors of the frequencies, for contexts up to the original one and beyond.
    """

    rope_type: RopeType
    theta: float
    dim: int
    max_position_embeddings: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


_SCALED_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale",
            "mscale_all_dim",
        }
    ),
    "longrope": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}  # fmt: skip
_SMALLEST = 1e-6  # of factors: what is smaller leads out of the range of float32
_COMMON_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})


class RopeReader:
    """Reads rope settings in the spelling of transformers 5 (`rope_parameters`) and of 4 (`rope_theta`, `rope_scaling`).

    Args:
        reader: of config.json.
        head_dim: size of a head.
        partial: whether the architecture can rotate a part of each head only.
    """

    def __init__(self, reader: ConfigReader, head_dim: int, *, partial: bool = False) -> None:
        self._reader = reader
        self._head_dim = head_dim
        self._partial = partial
        self._max_position = reader.integer("max_position_embeddings", high=MAX_POSITIONS)
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(reader.value(key), Mapping | None):
                reader.fail(key, "it must be an object")
        # Where a file has both, the older key holds what was changed after training; transformers gives it precedence too.
        self._key = "rope_scaling" if reader.value("rope_scaling") else "rope_parameters"
        self._parameters: Mapping[str, Any] = reader.value(self._key) or {}

    def read(self) -> RopeConfig:
        """Settings of all layers.

        Raises:
            ModelFileError: unknown type or setting, or a value of the wrong kind or size. Names it.
        """
        return self._config(self._parameters, self._default_theta("rope_theta"))

    def read_by_layer_type(self) -> Mapping[str, RopeConfig]:
        """Settings of `full_attention` and `sliding_attention` layers, which differ (Gemma 3)."""
        nested = {"full_attention", "sliding_attention"} & set(self._parameters)
        full, sliding = (
            (self._parameters.get("full_attention") or {}, self._parameters.get("sliding_attention") or {})
            if nested
            else (self._parameters, {})
        )
        if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
            self._fail("full_attention", "settings of each layer type must be objects")
        if nested and set(self._parameters) - nested:
            self._fail(min(set(self._parameters) - nested), "it stands beside settings by layer type; move it into them")
        return {
            "full_attention": self._config(full, self._default_theta("rope_theta")),
            "sliding_attention": self._config(sliding, self._default_theta("rope_local_base_freq")),
        }

    def _default_theta(self, key: str) -> float:
        return self._reader.number(key, low=1.0, high=1e12)

    def _config(self, parameters: Mapping[str, Any], default_theta: float) -> RopeConfig:
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type == "su" or (rope_type == "yarn" and parameters.get("long_factor") is not None):
            rope_type = "longrope"  # names under which early Phi-3 files have it
        if not isinstance(rope_type, str) or rope_type not in get_args(RopeType):
            self._fail("rope_type", f"{rope_type!r} is unknown; known are {', '.join(get_args(RopeType))}")
        if unknown := {k for k, v in parameters.items() if v is not None} - _COMMON_KEYS - _SCALED_KEYS[rope_type]:
            self._fail(min(unknown), f"rope of type {rope_type!r} has no such setting here")
        theta = self._number(parameters, "rope_theta", default_theta, low=1.0, high=1e12)
        dim = self._rotary_dim(parameters)
        if rope_type == "default":
            return RopeConfig(rope_type="default", theta=theta, dim=dim, max_position_embeddings=self._max_position)
        original = self._original(parameters)
        factor = self._factor(parameters, rope_type, original)
        config = RopeConfig(
            rope_type=cast(RopeType, rope_type),
            theta=theta,
            dim=dim,
            max_position_embeddings=self._max_position,
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=self._attention_factor(parameters, rope_type, factor, original),
            low_freq_factor=self._number(parameters, "low_freq_factor", 1.0),
            high_freq_factor=self._number(parameters, "high_freq_factor", 4.0),
            beta_fast=self._number(parameters, "beta_fast", 32.0),
            beta_slow=self._number(parameters, "beta_slow", 1.0),
            truncate=parameters.get("truncate", True) is not False,
            short_factor=self._factors(parameters, "short_factor", rope_type, dim),
            long_factor=self._factors(parameters, "long_factor", rope_type, dim),
        )
        if config.high_freq_factor <= config.low_freq_factor:
            self._fail("high_freq_factor", f"it must be above 'low_freq_factor', which is {config.low_freq_factor!r}")
        if rope_type == "dynamic" and dim < 4:
            self._fail("rope_type", f"{rope_type!r} needs at least 4 rotated entries of a head")
        return config

    def _rotary_dim(self, parameters: Mapping[str, Any]) -> int:
        share = self._reader.optional_number("partial_rotary_factor", high=1.0) if self._partial else None
        share = self._number(parameters, "partial_rotary_factor", 1.0 if share is None else share, high=1.0)
        if share != 1 and not self._partial:
            self._fail("partial_rotary_factor", "this architecture rotates whole heads")
        dim = int(self._head_dim * share)
        if dim < 2 or dim % 2:
            self._fail(
                "partial_rotary_factor", f"it rotates {dim} entries of a head of {self._head_dim}; an even number is needed"
            )
        return dim

    def _original(self, parameters: Mapping[str, Any]) -> int:
        key = "original_max_position_embeddings"
        value = self._reader.value(key)
        value = parameters.get(key) if value is None else value
        value = self._max_position if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= MAX_POSITIONS:
            self._fail(key, f"{value!r} is no integer from 2 to {MAX_POSITIONS}")
        return value

    def _factor(self, parameters: Mapping[str, Any], rope_type: str, original: int) -> float:
        if parameters.get("factor") is None and rope_type in ("yarn", "longrope"):
            return self._max_position / original
        if parameters.get("factor") is None:
            self._fail("factor", f"rope of type {rope_type!r} needs it")
        return self._number(parameters, "factor", 1.0)

    def _attention_factor(self, parameters: Mapping[str, Any], rope_type: str, factor: float, original: int) -> float:
        if rope_type not in ("yarn", "longrope"):
            return 1.0
        if parameters.get("attention_factor") is not None:
            return self._number(parameters, "attention_factor", 1.0)
        if factor <= 1:
            return 1.0
        if rope_type == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(original))
        # 0 stands for absent.
        keys = ("mscale", "mscale_all_dim")
        mscale, all_dim = (self._number(parameters, key, 0.0) if parameters.get(key) else 0.0 for key in keys)
        if mscale and all_dim:
            return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1

    def _factors(self, parameters: Mapping[str, Any], key: str, rope_type: str, dim: int) -> tuple[float, ...]:
        if rope_type != "longrope":
            return ()
        values = parameters.get(key)
        if (
            not isinstance(values, list)
            or len(values) != dim // 2
            or not all(finite(v) and _SMALLEST < v < 1e9 for v in values)
        ):
            self._fail(key, f"it must be a list of {dim // 2} positive numbers, one for each frequency")
        return tuple(float(value) for value in values)

    def _number(
        self, parameters: Mapping[str, Any], key: str, default: float, low: float = _SMALLEST, high: float = 1e9
    ) -> float:
        value = parameters.get(key)
        if value is None:
            return default
        if not finite(value) or not low < value <= high:
            self._fail(key, f"{value!r} is no number above {low:g} up to {high:g}")
        return float(value)

    def _fail(self, key: str, problem: str) -> NoReturn:
        raise ModelFileError(f"config.json: {key!r} of {self._key!r}: {problem}")


def rope_table(config: RopeConfig, max_model_len: int) -> Tensor:
    """Cosines and sines of all positions, on the CPU.

    Args:
        max_model_len: positions, and the length that `dynamic` and `longrope` choose their frequencies for.

    Returns:
        [max_model_len, dim] float32: cosines in the first half of a row, sines in the second.
    """
    import torch

    # float32 throughout, like the models were trained with: position * frequency is off by up to 1e-7 of itself.
    angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * _frequencies(config, max_model_len)
    return torch.cat((angles.cos(), angles.sin()), 1) * config.attention_factor


def _frequencies(config: RopeConfig, max_model_len: int) -> Tensor:
    """[dim / 2] float32, in radians per position."""
    import torch

    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    theta, factor = config.theta, config.factor
    if config.rope_type == "dynamic":
        length = max(max_model_len, config.max_position_embeddings)
        stretch = factor * length / config.max_position_embeddings - (factor - 1)
        theta *= stretch ** (config.dim / (config.dim - 2))
    frequencies = 1.0 / theta**exponents
    if config.rope_type == "linear":
        return frequencies / factor
    if config.rope_type == "longrope":
        long = max_model_len > config.original_max_position_embeddings
        return frequencies / torch.tensor(config.long_factor if long else config.short_factor)
    if config.rope_type == "llama3":
        turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the context of pretraining
        kept = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies
    if config.rope_type == "yarn":
        first, last = (_turning_index(config, turns) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.dim - 1)
        ramp = (torch.arange(config.dim // 2, dtype=torch.float32) - first) / (last - first or 0.001)
        interpolated = ramp.clamp(0, 1)
        return interpolated * frequencies / factor + (1 - interpolated) * frequencies
    return frequencies


def _turning_index(config: RopeConfig, turns: float) -> float:
    """Index of the frequency that turns so many times over the context of pretraining."""
    return config.dim * math.log(config.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
