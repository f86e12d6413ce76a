"""Norms, gated activation and rotation with the cache write by Triton, interpreted, against TorchOps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the torch backend is not installed")

import torch

from inferflux_backend_torch.ops import Activation, TorchOps
from torch_backend.attention_case import AttentionCase, build
from torch_backend.triton_interpreter import isolate, triton_kernels, triton_ops

# Without shrinking, which takes minutes in the interpreter.
_INTERPRETED = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def _ops() -> triton_ops.TritonOps:
    return triton_ops.TritonOps(num_sms=8)


@settings(_INTERPRETED, max_examples=20)
@given(
    tokens=st.integers(0, 3),
    hidden=st.sampled_from([1, 7, 64, 80, 576, 2304]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    add=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_norms(tokens: int, hidden: int, dtype: torch.dtype, add: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, hidden, generator=generator).to(dtype)
    weight = torch.randn(hidden, generator=generator)
    expected_residual = residual.clone()
    if add:
        out = _ops().add_rms_norm(x, residual, weight, 1e-5)
        expected = TorchOps().add_rms_norm(x, expected_residual, weight, 1e-5)
        assert torch.equal(residual, expected_residual)
    else:
        out, expected = _ops().rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype])


def test_norm_is_of_the_rounded_sum() -> None:
    """What the residual stream keeps, and not what it was rounded from: nearly all outputs are then the same bits."""
    generator = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 4, 576, generator=generator).half()
    out = _ops().add_rms_norm(x, residual.clone(), torch.ones(576), 1e-6)
    expected = TorchOps().add_rms_norm(x, residual.clone(), torch.ones(576), 1e-6)
    assert float((out == expected).float().mean()) > 0.98


def test_norm_of_a_slice_and_of_heads() -> None:
    """Rows may be apart, as in a slice of the fused projections, and there may be more dimensions."""
    x, weight = torch.randn(5, 96), torch.randn(32)
    part = x[:, 32:64]
    torch.testing.assert_close(_ops().rms_norm(part, weight, 1e-6), TorchOps().rms_norm(part, weight, 1e-6))
    heads = x.view(5, 3, 32)[:, 1:]
    torch.testing.assert_close(_ops().rms_norm(heads, weight, 1e-6), TorchOps().rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("tokens", "intermediate"), [(2, 20), (1, 1536), (3, 1025), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_act_mul(activation: Activation, tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(intermediate)
    gate_up = (4 * torch.randn(tokens, 2 * intermediate, generator=generator)).to(dtype)
    out = _ops().act_mul(gate_up, activation)
    torch.testing.assert_close(out, TorchOps().act_mul(gate_up, activation), rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype])


def test_activations_saturate() -> None:
    gate_up = torch.tensor([[100.0, -100.0, 30.0, -30.0, 1.0, 1.0, 1.0, 1.0]])
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        expected = TorchOps().act_mul(gate_up, activation)
        torch.testing.assert_close(_ops().act_mul(gate_up, activation), expected, rtol=1e-5, atol=1e-5)


_ROPE_CASES = [
    AttentionCase(sequences=((3, 1), (0, 5)), rotary_dim=16),
    AttentionCase(sequences=((3, 1), (0, 5)), rotary_dim=16, q_norm=True, k_norm=True),
    AttentionCase(sequences=((40, 3),), heads=9, kv_heads=3, head_dim=64, rotary_dim=64, block_size=32),
    AttentionCase(sequences=((7, 2),), head_dim=80, rotary_dim=32, q_norm=True, k_norm=True),  # partial rotation
    AttentionCase(sequences=((7, 2),), head_dim=20, rotary_dim=20, k_norm=True),
    AttentionCase(sequences=((7, 2),), head_dim=96, rotary_dim=96, q_norm=True, dtype=torch.float16),
    AttentionCase(sequences=((7, 2),), head_dim=24, q_norm=True, k_norm=True),  # no rotation
    AttentionCase(sequences=((7, 2),), head_dim=24),
    AttentionCase(sequences=((7, 2),), heads=71, kv_heads=1, head_dim=8, rotary_dim=4),
]


@pytest.mark.parametrize("case", _ROPE_CASES)
def test_rope_and_cache(case: AttentionCase) -> None:
    ours, theirs = build(case), build(case)
    _ops().rope_and_cache(ours.qkv, ours.layer, ours.inputs, ours.cache)
    TorchOps().rope_and_cache(theirs.qkv, theirs.layer, theirs.inputs, theirs.cache)
    tolerance = _TOLERANCE[case.dtype]
    torch.testing.assert_close(ours.qkv, theirs.qkv, rtol=tolerance, atol=tolerance)
    # Entries of no token are NaN in both: nothing else was written.
    torch.testing.assert_close(ours.cache.data, theirs.cache.data, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_fp8_cache_is_rounded_and_saturates() -> None:
    """Values that e4m3 holds survive; greater ones become its greatest, where torch would make NaN."""
    case = AttentionCase(sequences=((0, 3),), cache_dtype=torch.float8_e4m3fn)
    step, expected = build(case), build(case)
    exact = torch.randint(-15, 16, step.qkv.shape, generator=torch.Generator().manual_seed(1)) / 8
    for each in (step, expected):
        each.qkv.copy_(exact)
    TorchOps().rope_and_cache(expected.qkv, expected.layer, expected.inputs, expected.cache)
    _ops().rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
    torch.testing.assert_close(step.cache.data.float(), expected.cache.data.float(), rtol=0, atol=0, equal_nan=True)

    step.qkv.fill_(1000.0)
    step.qkv[1] = -1000.0
    _ops().rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
    written = step.cache.data[1].flatten(1, 2)[:, step.inputs.slot_mapping].float()
    assert torch.equal(written[:, 0], torch.full_like(written[:, 0], triton_kernels.FP8_MAX))
    assert torch.equal(written[:, 1], torch.full_like(written[:, 1], -triton_kernels.FP8_MAX))


def test_padded_steps_write_to_the_null_block_only() -> None:
    case = AttentionCase(sequences=((3, 1), (5, 1)))
    step, before = build(case), build(case).cache.data
    inputs = replace(step.inputs, slot_mapping=torch.zeros_like(step.inputs.slot_mapping))
    _ops().rope_and_cache(step.qkv, step.layer, inputs, step.cache)
    assert not step.cache.data[1, :, 0, 0].isnan().any()
    torch.testing.assert_close(step.cache.data[:, :, 1:], before[:, :, 1:], rtol=0, atol=0, equal_nan=True)


isolate(globals())
