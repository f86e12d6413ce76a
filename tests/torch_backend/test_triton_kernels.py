"""Norms, gated activation, rotation with the cache write, and the step buffer by Triton, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_backend.attention_case import AttentionCase, build
from torch_backend.triton_interpreter import isolate, triton_kernels, triton_ops, triton_prepare

from inferflux_backend_torch.inputs import StepInputs
from inferflux_backend_torch.ops import Activation, TorchOps

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def _ops() -> triton_ops.TritonOps:
    return triton_ops.TritonOps(num_sms=8)


@settings(max_examples=20, deadline=None, derandomize=True)
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
    torch.testing.assert_close(
        out, TorchOps().act_mul(gate_up, activation), rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]
    )


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


def _empty_inputs(tokens: int, seqs: int, width: int) -> StepInputs:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, -7, dtype=dtype)

    return StepInputs(
        token_ids=empty(tokens),
        positions=empty(tokens),
        slot_mapping=empty(tokens),
        query_start=empty(seqs + 1, dtype=torch.int32),
        seq_lens=empty(seqs, dtype=torch.int32),
        block_table=empty(seqs, width, dtype=torch.int32),
        logits_indices=empty(seqs),
        num_decodes=0,
        max_query_len=0,
        max_seq_len=0,
        host_query_start=[],
        host_seq_lens=[],
    )


def test_prepare_over_several_steps() -> None:
    """Two prefills, a step that decodes both from the device's tokens, and a mixture in other slots' order."""
    size, width = 16, 20
    tables = torch.zeros(4, width, dtype=torch.int32)
    last_token = torch.tensor([100, 101, 102, 103])
    row = triton_prepare.StepRow

    def prepare(rows: list[triton_prepare.StepRow], tokens: int) -> StepInputs:
        into = _empty_inputs(tokens + 1, len(rows) + 1, width)
        triton_prepare.prepare(triton_prepare.PackedStep.pack(rows), tables, last_token, size, into)
        # What lies behind the step is left alone.
        assert into.token_ids[-1] == into.positions[-1] == into.slot_mapping[-1] == into.seq_lens[-1] == -7
        return into

    long = list(range(1000, 1300))  # more than one turn of the kernel's loop
    blocks = list(range(30, 49))
    got = prepare(
        [
            row(slot=2, start=0, tokens=[5], num_blocks=0, new_blocks=[9]),
            row(slot=1, start=0, tokens=long, num_blocks=0, new_blocks=blocks),
        ],
        301,
    )
    assert got.token_ids[:301].tolist() == [5, *long]
    assert got.positions[:301].tolist() == [0, *range(300)]
    assert got.slot_mapping[:301].tolist() == [9 * 16, *(blocks[p // 16] * 16 + p % 16 for p in range(300))]
    assert got.query_start[:3].tolist() == [0, 1, 301]
    assert got.seq_lens[:2].tolist() == [1, 300]
    assert got.block_table[:2].tolist() == [[9, *[0] * 19], [*blocks, 0]]

    got = prepare(
        [row(slot=1, start=300, tokens=None, num_blocks=19), row(slot=2, start=1, tokens=None, num_blocks=1)], 2
    )
    assert got.token_ids[:2].tolist() == [101, 102]
    assert got.positions[:2].tolist() == [300, 1]
    assert got.slot_mapping[:2].tolist() == [48 * 16 + 12, 9 * 16 + 1]
    assert got.seq_lens[:2].tolist() == [301, 2]

    got = prepare(
        [
            row(slot=2, start=2, tokens=None, num_blocks=1),
            row(slot=3, start=16, tokens=[7, 8, 9], num_blocks=0, new_blocks=[3, 4]),  # its first block came from a cache
        ],
        4,
    )
    assert got.token_ids[:4].tolist() == [102, 7, 8, 9]
    assert got.positions[:4].tolist() == [2, 16, 17, 18]
    assert got.slot_mapping[:4].tolist() == [9 * 16 + 2, 64, 65, 66]
    assert got.block_table[:2].tolist() == [[9, *[0] * 19], [3, 4, *[0] * 18]]
    assert tables[3].tolist() == [3, 4, *[0] * 18]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_prepare_gives_what_the_host_would(sequences: list[tuple[int, int]], seed: int) -> None:
    step = build(AttentionCase(sequences=tuple(sequences), block_size=8, seed=seed))
    expected, width = step.inputs, step.inputs.block_table.shape[1]
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(8, generator=generator)[: len(sequences)].tolist()
    tables = torch.zeros(8, width, dtype=torch.int32)
    tokens = torch.randint(1000, (expected.positions.numel(),), generator=generator)
    rows = []
    for i, (computed, n) in enumerate(sequences):
        before, after = -(-computed // 8), -(-(computed + n) // 8)
        tables[slots[i], :before] = expected.block_table[i, :before]
        rows.append(
            triton_prepare.StepRow(
                slot=slots[i],
                start=computed,
                tokens=tokens[expected.host_query_start[i] : expected.host_query_start[i + 1]].tolist(),
                num_blocks=before,
                new_blocks=expected.block_table[i, before:after].tolist(),
            )
        )
    got = _empty_inputs(len(tokens), len(sequences), width)
    last_token = torch.zeros(8, dtype=torch.int64)
    triton_prepare.prepare(triton_prepare.PackedStep.pack(rows), tables, last_token, 8, got)
    assert torch.equal(got.token_ids, tokens)
    for name in ("positions", "slot_mapping", "query_start", "seq_lens", "block_table"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for i, slot in enumerate(slots):
        assert torch.equal(tables[slot], expected.block_table[i])


def test_padded_steps_write_to_the_null_block_only() -> None:
    case = AttentionCase(sequences=((3, 1), (5, 1)))
    step, before = build(case), build(case).cache.data
    inputs = replace(step.inputs, slot_mapping=torch.zeros_like(step.inputs.slot_mapping))
    _ops().rope_and_cache(step.qkv, step.layer, inputs, step.cache)
    assert not step.cache.data[1, :, 0, 0].isnan().any()
    torch.testing.assert_close(step.cache.data[:, :, 1:], before[:, :, 1:], rtol=0, atol=0, equal_nan=True)


isolate(globals())
