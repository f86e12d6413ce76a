"""Matrix products with the weights. How a weight is laid out is decided once, at load."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# A product of so many rows or more is bound by arithmetic: int8 weights are widened first and multiplied as a whole.
_MANY_ROWS = 64
# torch's int8 product reads past the end of rows of other lengths, and crashes (torch 2.13: 72 and 90 columns).
_INT8_COLUMNS = 32
# oneDNN lays a weight out for a number of rows; measured with 1 to 1,024 rows, this layout is the best or close to it for all.
_PACKED_FOR_ROWS = 16


class Linear(Protocol):
    """x @ weight.T + bias. x: [T, in_features] contiguous -> [T, out_features]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LinearFactory(Protocol):
    """Makes a Linear of weight [out_features, in_features] and bias [out_features]; it may keep or copy them."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> Linear: ...


class PlainLinear:
    """torch's own product: cuBLAS on a GPU, MKL for float32 on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class PackedLinear:
    """A weight in oneDNN's own blocked layout, so that no product has to rearrange it (CPU, bfloat16).

    Measured on two cores with AMX: 1.6 times as fast as `PlainLinear` for 1 to 32 rows, and 97% of the memory bandwidth.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        return out


class Int8Linear:
    """A weight in 8 bits with one scale for each output channel, rounded to nearest; activations stay as they are (CPU)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        largest = weight.float().abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
        self._scales = (largest / 127).to(weight.dtype)
        # Divided by the scale as it is stored, so that its own rounding does not add to the error.
        self._weight = (weight.float() / self._scales.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
        self._bias = bias
        self._product = torch.ops.aten._weight_int8pack_mm.default
        self._narrow_rows = _MANY_ROWS if weight.shape[1] % _INT8_COLUMNS == 0 else 0

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor
        if x.shape[0] < self._narrow_rows:
            out = self._product(x, self._weight, self._scales)
        else:
            # Scaled before the product, whose sums float16 could not hold otherwise.
            out = functional.linear(x, self._weight.to(x.dtype).mul_(self._scales.unsqueeze(1)))
        return out if self._bias is None else out.add_(self._bias)


def linear_factory(quantization: str, dtype: torch.dtype, device: torch.device) -> LinearFactory:
    """The layout for these settings."""
    if quantization == "int8":
        return Int8Linear
    if device.type == "cpu" and dtype is torch.bfloat16 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # of torch
        return PackedLinear
    return PlainLinear
