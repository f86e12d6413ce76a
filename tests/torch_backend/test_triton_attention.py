"""Paged attention by Triton, interpreted, against TorchOps."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the torch backend is not installed")

import torch

from inferflux_backend_torch.attention_tiles import Tile, choose_segments, choose_tile
from inferflux_backend_torch.ops import TorchOps
from torch_backend.attention_case import AttentionCase, AttentionStep, attention_error, build
from torch_backend.triton_interpreter import isolate, triton_attention, triton_ops

# Without shrinking, which takes minutes in the interpreter.
_INTERPRETED = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
_TILE = Tile(block_m=16, keys=16, num_warps=4, num_stages=2)


def _attend(step: AttentionStep, tile: Tile, segments: int | None, num_sms: int = 1) -> torch.Tensor:
    """All sequences in one launch, as in a graph of mixed steps."""
    out = torch.full((step.qkv.shape[0], step.layer.q_size), torch.nan, dtype=step.qkv.dtype)
    triton_attention.paged_attention(
        step.qkv,
        out,
        step.layer,
        step.inputs,
        step.cache,
        num_sms,
        first_seq=0,
        last_seq=step.inputs.num_seqs,
        max_query_len=step.inputs.max_query_len,
        tile=tile,
        segments=segments,
    )
    return out


def _expected(step: AttentionStep) -> torch.Tensor:
    TorchOps().rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
    return TorchOps().attention(step.qkv, step.layer, step.inputs, step.cache)


@settings(_INTERPRETED, max_examples=25)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 24)), min_size=1, max_size=3),
    group=st.sampled_from([1, 2, 3, 7]),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 20, 64]),
    block_size=st.sampled_from([8, 16, 32]),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.just(5.0),
    keys=st.sampled_from([16, 32]),
    segments=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_any_mixture_in_one_launch(
    sequences: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    keys: int,
    segments: int,
    seed: int,
) -> None:
    step = build(
        AttentionCase(
            sequences=tuple(sequences),
            heads=group * kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            window=window,
            softcap=softcap,
            seed=seed,
        )
    )
    expected = _expected(step)
    tile = Tile(block_m=16, keys=keys, num_warps=4, num_stages=2)
    torch.testing.assert_close(_attend(step, tile, segments), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(sequences=((0, 1),), heads=9, kv_heads=3, head_dim=64, block_size=32),
        AttentionCase(sequences=((37, 1), (0, 1), (63, 1), (200, 1)), heads=9, kv_heads=3, head_dim=64, block_size=32),
        AttentionCase(sequences=((70, 1), (5, 1), (64, 20), (0, 33)), heads=9, kv_heads=3, head_dim=64, block_size=16),
        AttentionCase(sequences=((70, 1), (90, 17)), heads=4, kv_heads=4, head_dim=80, block_size=32, rotary_dim=32),
        AttentionCase(sequences=((70, 1), (90, 17)), heads=4, kv_heads=1, head_dim=96, window=40, softcap=20.0),
        AttentionCase(sequences=((1100, 1), (3, 1)), heads=4, kv_heads=2, head_dim=20, block_size=32),
        AttentionCase(sequences=((1100, 9),), heads=4, kv_heads=2, head_dim=20, block_size=32, window=300),
        AttentionCase(sequences=((40, 1), (3, 1), (50, 5)), heads=4, kv_heads=2, head_dim=32, num_decodes=0),
        AttentionCase(sequences=((40, 1), (33, 4)), heads=32, kv_heads=1, head_dim=16),
        AttentionCase(sequences=((40, 1), (50, 5)), heads=6, kv_heads=2, head_dim=64, dtype=torch.float16),
        AttentionCase(sequences=((40, 1), (50, 5)), dtype=torch.float16, q_norm=True, k_norm=True, rotary_dim=16),
    ],
    ids=lambda case: f"{case.sequences}-{case.heads}/{case.kv_heads}x{case.head_dim}",
)
def test_a_layer_as_the_decoder_calls_it(case: AttentionCase) -> None:
    tolerance = 2e-5 if case.dtype == torch.float32 else 2e-3
    assert attention_error(triton_ops.TritonOps(num_sms=8), case) < tolerance


def test_fp8_cache() -> None:
    step = build(AttentionCase(sequences=((40, 1), (50, 9)), cache_dtype=torch.float8_e4m3fn, block_size=16))
    expected = _expected(step)
    torch.testing.assert_close(_attend(step, _TILE, 2), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("segments", [1, 8])
def test_padded_sequences_of_a_graph_do_no_harm(segments: int) -> None:
    """Behind the real ones, with no token, or with one token and one key; nor is a row without keys NaN."""
    step = build(AttentionCase(sequences=((20, 1), (4, 1), (0, 1), (0, 1))))
    expected = _expected(step)
    step.inputs.seq_lens[2:] = torch.tensor([1, 0], dtype=torch.int32)
    step.inputs.block_table[2:] = 0
    step.cache.data[:, :, 0] = 0
    out = _attend(step, _TILE, segments)
    torch.testing.assert_close(out[:2], expected[:2], rtol=2e-5, atol=2e-5)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))


def test_each_launch_writes_only_its_sequences() -> None:
    step = build(AttentionCase(sequences=((20, 1), (4, 1), (7, 5), (0, 18))))
    expected = _expected(step)
    for first, last, max_query_len in ((0, 2, 1), (2, 3, 5), (3, 4, 18)):
        out = torch.full((step.qkv.shape[0], step.layer.q_size), torch.nan)
        triton_attention.paged_attention(
            step.qkv,
            out,
            step.layer,
            step.inputs,
            step.cache,
            1,
            first_seq=first,
            last_seq=last,
            max_query_len=max_query_len,
            tile=_TILE,
            segments=2,
        )
        start, end = step.inputs.host_query_start[first], step.inputs.host_query_start[last]
        torch.testing.assert_close(out[start:end], expected[start:end], rtol=2e-5, atol=2e-5)
        assert out[:start].isnan().all()
        assert out[end:].isnan().all()


def test_great_scores_stay_finite() -> None:
    step = build(AttentionCase(sequences=((40, 1), (50, 9))))
    step.qkv *= 1e4
    expected = _expected(step)
    torch.testing.assert_close(_attend(step, _TILE, 4), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("programs", "max_seq_len", "decode", "expected"),
    [
        (8, 64, True, 1),  # too short to split
        (8, 300, True, 1),
        (8, 4096, True, 16),
        (8, 131072, True, 64),  # 264 programs are wanted; 64 segments are the most
        (64, 131072, True, 16),
        (2048, 4096, True, 1),  # enough programs
        (2048, 131072, True, 16),  # enough, but the longest context would run alone at the end
        (2048, 131072, False, 1),
        (16, 8192, False, 32),
    ],
)
def test_segments_follow_programs_and_the_longest_context(programs: int, max_seq_len: int, decode: bool, expected: int) -> None:
    assert choose_segments(programs, max_seq_len, 132, decode) == expected


@given(
    max_query_len=st.integers(1, 4096),
    group=st.integers(1, 128),
    head_dim=st.integers(1, 512),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_tiles_hold_a_group_and_are_powers_of_two(max_query_len: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    tile = choose_tile(max_query_len, group, head_dim, dtype)
    assert tile.block_m >= max(16, group)
    for size in (tile.block_m, tile.keys):
        assert size >= 16
        assert size & (size - 1) == 0


isolate(globals())
