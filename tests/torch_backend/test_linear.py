"""Layouts of weights give the product they stand for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from inferflux_backend_torch.linear import (  # noqa: E402  # after the skip
    Int8Linear,
    PackedLinear,
    PlainLinear,
    linear_factory,
)

CPU = torch.device("cpu")


def operands(rows: int, dtype: torch.dtype, columns: int = 72) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, columns), (131, columns), (131,)))


@pytest.mark.parametrize("rows", [1, 3, 16, 63, 64, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_is_the_plain_product(rows: int, with_bias: bool) -> None:
    x, weight, bias = operands(rows, torch.bfloat16)
    expected = x.float() @ weight.float().T + (bias.float() if with_bias else 0)
    ours = PackedLinear(weight, bias if with_bias else None)(x)
    assert ours.dtype is torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, atol=0.1, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("columns", [64, 72, 90, 101])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_is_the_product_with_the_rounded_weight(rows: int, columns: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, dtype, columns)
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(dtype).float()
    rounded = (weight.float() / scale).round().clamp(-127, 127) * scale
    assert (rounded - weight.float()).abs().max() <= 0.51 * scale.max() + (2 * scale.max() if dtype is torch.bfloat16 else 0)
    expected = x.float() @ rounded.T + (bias.float() if with_bias else 0)
    ours = Int8Linear(weight, bias if with_bias else None)(x)
    assert ours.dtype is dtype
    tolerance = 1e-4 if dtype is torch.float32 else 0.15
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 63, 64])
@pytest.mark.parametrize("columns", [576, 577])
def test_int8_stays_within_float16(rows: int, columns: int) -> None:
    x, weight, _ = operands(rows, torch.float16, columns)
    ours = Int8Linear(weight)(30 * x)
    torch.testing.assert_close(ours.float(), 30 * x.float() @ weight.float().T, atol=40, rtol=0.05)


def test_int8_of_a_row_of_zeros_is_zero() -> None:
    assert Int8Linear(torch.zeros(4, 8))(torch.ones(2, 8)).tolist() == [[0.0] * 4] * 2


def test_the_layout_follows_type_and_settings() -> None:
    assert linear_factory("none", torch.bfloat16, CPU) is PackedLinear
    assert linear_factory("none", torch.float32, CPU) is PlainLinear
    assert linear_factory("int8", torch.bfloat16, CPU) is Int8Linear
    assert linear_factory("none", torch.bfloat16, torch.device("cuda")) is PlainLinear
