"""Triton kernels around attention: norms, gated activation, rotation with the write to the KV cache.

Each replaces one method of `ops.TorchOps`, which defines it. They compute in float32 and round where `TorchOps` rounds. The
launchers below take tensors of a GPU, or of the CPU when Triton interprets (TRITON_INTERPRET=1 set before Triton is imported).
Only features common to Triton 3.6 and later are used.
"""

# Triton ships no types, so its decorator and the kernels under it are untyped; the launchers are checked in full:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 -- constants of a kernel are written in capitals, as Triton itself does

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import Activation, AttentionLayer

# Largest finite e4m3: PyTorch's own conversion makes NaN of what lies above, which would spoil a sequence for good.
FP8_MAX = 448.0
_FP8_MAX = tl.constexpr(FP8_MAX)
# Elements of one program of the elementwise kernels: 8 for each thread of 4 warps, two 16-byte loads in bf16.
_ELEMENTS = 1024


@triton.jit
def _tanh(x):
    """By an exponential that cannot overflow: the interpreter knows no libdevice."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _to_cache(x, FP8: tl.constexpr):
    """What a KV cache keeps of x: fp8 saturates instead of overflowing; NaN stays NaN."""
    if FP8:
        x = x.to(tl.float32)
        x = tl.where(x > _FP8_MAX, _FP8_MAX, tl.where(x < -_FP8_MAX, -_FP8_MAX, x))
    return x


@triton.jit
def _rms_norm_kernel(
    out,  # [T, H]
    x,  # [T, H], rows x_stride apart
    residual,  # [T, H] contiguous; read and written only if ADD
    weight,  # [H] float32
    x_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program a row, which stays in registers between the two passes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * H + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * H + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    normed *= tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * H + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _act_mul_kernel(
    out,  # [T, I]
    gate_up,  # [T, 2 I], rows stride apart
    stride,
    I: tl.constexpr,  # noqa: E741 -- the field's name of the intermediate size
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + I + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        small = tl.exp(-tl.abs(gate))  # cannot overflow
        gate = gate * tl.where(gate < 0.0, small, 1.0) / (1.0 + small)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        gate = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        gate = tl.where(gate < 0.0, 0.0, gate)
    tl.store(out + row * I + column, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scaled(x, scale, weight, inside, chosen):
    """x * scale * weight for the heads chosen, the others as they are."""
    return tl.where(chosen[:, None], x * scale * tl.load(weight, mask=inside, other=0.0)[None, :], x)


@triton.jit
def _rope_and_cache_kernel(
    qkv,  # [T, (HEADS + 2 KV_HEADS) * D] contiguous
    positions,  # [T] int64
    slot_mapping,  # [T] int64
    rope,  # [max_model_len, 2 HALF] float32: cosines, sines
    q_norm,  # [D] float32
    k_norm,  # [D] float32
    keys,  # [slots, KV_HEADS, D], slots slot_stride apart
    values,
    slot_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # entries [0, HALF) rotate with [HALF, 2 HALF); the REST passes
    HALF_BLOCK: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,  # heads of one program
    ROPE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program: one token, BLOCK of its heads, queries, keys and values alike, each masked out of what is not for it."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    exists = head < HEADS + 2 * KV_HEADS

    start = qkv + token * ((HEADS + 2 * KV_HEADS) * D) + head[:, None] * D
    entry = tl.arange(0, HALF_BLOCK)
    in_half = entry < HALF
    in_first = exists[:, None] & in_half[None, :]
    first = tl.load(start + entry[None, :], mask=in_first, other=0.0).to(tl.float32)
    second = tl.load(start + HALF + entry[None, :], mask=in_first, other=0.0).to(tl.float32)
    if REST > 0:
        last = tl.arange(0, REST_BLOCK)
        in_rest = exists[:, None] & (last < REST)[None, :]
        rest = tl.load(start + 2 * HALF + last[None, :], mask=in_rest, other=0.0).to(tl.float32)

    if Q_NORM or K_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        if Q_NORM:
            first = _scaled(first, scale, q_norm + entry, in_half, is_query)
            second = _scaled(second, scale, q_norm + HALF + entry, in_half, is_query)
            if REST > 0:
                rest = _scaled(rest, scale, q_norm + 2 * HALF + last, last < REST, is_query)
        if K_NORM:
            first = _scaled(first, scale, k_norm + entry, in_half, is_key)
            second = _scaled(second, scale, k_norm + HALF + entry, in_half, is_key)
            if REST > 0:
                rest = _scaled(rest, scale, k_norm + 2 * HALF + last, last < REST, is_key)

    if ROPE:
        turn = rope + tl.load(positions + token) * (2 * HALF)
        cos = tl.load(turn + entry, mask=in_half, other=0.0)[None, :]
        sin = tl.load(turn + HALF + entry, mask=in_half, other=0.0)[None, :]
        turned = first * cos - second * sin
        second = tl.where(is_value[:, None], second, second * cos + first * sin)
        first = tl.where(is_value[:, None], first, turned)

    # Rounded to the model's type first: the cache then holds what attention over an unquantised cache would have seen.
    first = first.to(qkv.dtype.element_ty)
    second = second.to(qkv.dtype.element_ty)
    if ROPE or Q_NORM or K_NORM:
        changed = (is_query | is_key)[:, None] & in_half[None, :]
        tl.store(start + entry[None, :], first, mask=changed)
        tl.store(start + HALF + entry[None, :], second, mask=changed)

    slot = tl.load(slot_mapping + token) * slot_stride
    key = keys + slot + (head - HEADS)[:, None] * D
    value = values + slot + (head - HEADS - KV_HEADS)[:, None] * D
    first = _to_cache(first, FP8).to(keys.dtype.element_ty)
    second = _to_cache(second, FP8).to(keys.dtype.element_ty)
    to_keys = is_key[:, None] & in_half[None, :]
    to_values = is_value[:, None] & in_half[None, :]
    tl.store(key + entry[None, :], first, mask=to_keys)
    tl.store(key + HALF + entry[None, :], second, mask=to_keys)
    tl.store(value + entry[None, :], first, mask=to_values)
    tl.store(value + HALF + entry[None, :], second, mask=to_values)
    if REST > 0:
        rest = rest.to(qkv.dtype.element_ty)
        if Q_NORM or K_NORM:
            tl.store(start + 2 * HALF + last[None, :], rest, mask=in_rest & (is_query | is_key)[:, None])
        rest = _to_cache(rest, FP8).to(keys.dtype.element_ty)
        tl.store(key + 2 * HALF + last[None, :], rest, mask=in_rest & is_key[:, None])
        tl.store(value + 2 * HALF + last[None, :], rest, mask=in_rest & is_value[:, None])


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of each row, of x + residual if there is one; `residual` then becomes that sum.

    Args:
        x: [..., H]; rows of a matrix may be apart, as in a slice of fused projections.
        weight: [H] float32.
        residual: [T, H] contiguous, of the type of x.

    Returns:
        Same shape and type as x, contiguous.
    """
    hidden = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, hidden)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            out,
            rows,
            rows if residual is None else residual,
            weight,
            rows.stride(0),
            eps,
            H=hidden,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
        )
    return out


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """act(first half) * second half of each row: [T, 2 I] -> [T, I]."""
    tokens, width = gate_up.shape
    intermediate = width // 2
    out = gate_up.new_empty(tokens, intermediate)
    block = min(triton.next_power_of_2(intermediate), _ELEMENTS)
    if tokens:
        _act_mul_kernel[(tokens, triton.cdiv(intermediate, block))](
            out, gate_up, gate_up.stride(0), I=intermediate, BLOCK=block, ACTIVATION=activation, num_warps=4
        )
    return out


def rope_and_cache(qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> None:
    """One launch for `TorchOps.rope_and_cache`; an fp8 cache saturates at +-448."""
    tokens = qkv.shape[0]
    keys, values = cache.keys[layer.index], cache.values[layer.index]
    half = (layer.head_dim if layer.rope is None else layer.rope.shape[-1]) // 2
    rest = layer.head_dim - 2 * half
    heads = layer.num_heads + 2 * layer.num_kv_heads
    half_block = triton.next_power_of_2(half)
    block = min(max(_ELEMENTS // (2 * half_block), 1), triton.next_power_of_2(heads))
    if tokens:
        _rope_and_cache_kernel[(tokens, triton.cdiv(heads, block))](
            qkv,
            inputs.positions,
            inputs.slot_mapping,
            qkv if layer.rope is None else layer.rope,
            qkv if layer.q_norm is None else layer.q_norm,
            qkv if layer.k_norm is None else layer.k_norm,
            keys,
            values,
            keys.stride(1),
            layer.norm_eps,
            HEADS=layer.num_heads,
            KV_HEADS=layer.num_kv_heads,
            D=layer.head_dim,
            HALF=half,
            HALF_BLOCK=half_block,
            REST=rest,
            REST_BLOCK=triton.next_power_of_2(rest) if rest else 1,
            BLOCK=block,
            ROPE=layer.rope is not None,
            Q_NORM=layer.q_norm is not None,
            K_NORM=layer.k_norm is not None,
            FP8=keys.dtype == torch.float8_e4m3fn,
            num_warps=4,
        )
