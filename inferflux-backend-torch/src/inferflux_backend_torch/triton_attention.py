"""Paged attention on GPUs: one Triton kernel for any mixture of prefill chunks and decodes, and one that merges split contexts.

The queries of a launch are cut into blocks of BLOCK_Q tokens; all query heads that share a KV head lie in one tile, so that a
key is read once for the group:

    group 3, BLOCK_Q 5           row of the tile    0   1   2   3   4   5  ...  14   15
                                 token of block     0   0   0   1   1   1        4   (masked)
                                 head of group      0   1   2   0   1   2        2

Sequence s owns the blocks from query_start[s] // BLOCK_Q + s on: at least as many as it needs, so the number of programs
follows from the counts of tokens and sequences alone (a CUDA graph can hold it), and a program finds its sequence by binary
search. Programs without work leave at once. With few programs, or a long context, the keys of a block are split into segments,
whose partial results the second kernel merges (flash-decoding). Design: vLLM's unified kernel, arXiv 2511.11581.
"""

# Triton ships no types, so its decorator and the kernels under it are untyped; the launchers are checked in full:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 -- constants of a kernel are written in capitals, as Triton itself does

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferflux_backend_torch.attention_tiles import Tile, choose_segments, choose_tile
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import AttentionLayer

_LOG2E = tl.constexpr(1.4426950408889634)
# float32 models on tensor cores with three products each, as exact as float32 sums are; AMD's compiler has no such mode.
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
# Programs that keep a multiprocessor of a GPU busy when each waits for memory.
_PROGRAMS_PER_SM = 2


@triton.jit
def _tanh(x):
    """By an exponential that cannot overflow: the interpreter knows no libdevice."""
    small = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _attend_tiles(
    acc,
    highest,
    total,
    query,
    position,  # [BLOCK_M] of each row in its sequence
    first,  # keys [first, last); first is a multiple of TILE
    last,
    limit,  # keys of the sequence
    keys,
    values,
    table,
    block_stride,
    token_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,  # False where each row sees each key
):
    """Online softmax (arXiv 1805.02867) over tiles of keys, in base 2."""
    entry = tl.arange(0, D_BLOCK)
    if BLOCK_SIZE % TILE == 0:
        # One turn ahead: the pipeliner would otherwise halve the depth of its prefetches for the sake of this load.
        following = tl.load(table + tl.minimum(first, limit - 1) // BLOCK_SIZE)
    for tile in range(first, last, TILE):
        token = tile + tl.arange(0, TILE)
        if BLOCK_SIZE % TILE == 0:
            block = following
            following = tl.load(table + tl.minimum(tile + TILE, limit - 1) // BLOCK_SIZE)
        else:
            block = tl.load(table + token // BLOCK_SIZE, mask=token < limit, other=0)
        offset = block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * token_stride
        key_at = keys + offset[None, :] + entry[:, None]
        value_at = values + offset[:, None] + entry[None, :]
        if MASKED:
            key = tl.load(key_at, mask=(entry < D)[:, None] & (token < limit)[None, :], other=0.0)
            value = tl.load(value_at, mask=(token < limit)[:, None] & (entry < D)[None, :], other=0.0)
        elif D == D_BLOCK:
            key = tl.load(key_at)
            value = tl.load(value_at)
        else:
            key = tl.load(key_at, mask=(entry < D)[:, None], other=0.0)
            value = tl.load(value_at, mask=(entry < D)[None, :], other=0.0)
        scores = tl.dot(query, key.to(query.dtype), input_precision=PRECISION)
        if SOFTCAP:
            scores = (softcap * _LOG2E) * _tanh(scores * (scale / softcap))
        else:
            scores *= scale * _LOG2E
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (token[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet must not make -inf - -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weight = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(query.dtype), value.to(query.dtype), acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return acc, highest, total


@triton.jit(do_not_specialize=["first_seq", "last_seq"])
def _attention_kernel(
    out,  # [T, HEADS, D], rows out_stride apart; with SEGMENTS > 1 untouched
    partial,  # [tokens of the launch, HEADS, SEGMENTS, D] float32, with SEGMENTS > 1
    partial_highest,  # the same without D: greatest score, in base 2
    partial_total,  # and the sum of weights relative to it
    query,  # [T, HEADS, D], rows query_stride apart
    keys,  # [blocks, BLOCK_SIZE, KV_HEADS, D]
    values,
    block_table,
    query_start,
    seq_lens,
    scale,
    softcap,
    window,
    query_stride,
    out_stride,
    table_stride,
    block_stride,
    token_stride,
    first_seq,  # sequences [first_seq, last_seq) of the step
    last_seq,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32; others are exact
    DECODE: tl.constexpr,  # each sequence has one token: that of its own index
):
    kv_head = tl.program_id(1)
    if DECODE:
        base = first_seq
        seq = first_seq + tl.program_id(0)
        start = seq
        num_queries = 1
        in_block = 0
    else:
        # Later blocks of a sequence see more keys: they go first, so that none starts late.
        index = tl.num_programs(0) - 1 - tl.program_id(0)
        base = tl.load(query_start + first_seq)
        seq = first_seq
        bound = last_seq - 1
        while seq < bound:
            middle = (seq + bound + 1) // 2
            if (tl.load(query_start + middle) - base) // BLOCK_Q + middle - first_seq <= index:
                seq = middle
            else:
                bound = middle - 1
        start = tl.load(query_start + seq)
        num_queries = tl.load(query_start + seq + 1) - start
        in_block = (index - ((start - base) // BLOCK_Q + seq - first_seq)) * BLOCK_Q
    if in_block >= num_queries:
        return

    seq_len = tl.load(seq_lens + seq)
    computed = seq_len - num_queries
    row = tl.arange(0, BLOCK_M)
    local = in_block + row // GROUP
    valid = (row < BLOCK_Q * GROUP) & (local < num_queries)
    position = computed + local
    token = (start + local).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    entry = tl.arange(0, D_BLOCK)
    loaded = valid[:, None] & (entry < D)[None, :]
    q = tl.load(query + token[:, None] * query_stride + head[:, None] * D + entry[None, :], mask=loaded, other=0.0)

    # Keys [low, high) are seen by some row, [full_low, full_high) by all; all but high are multiples of TILE.
    #     low    full_low             full_high    high
    #      | window  |  no mask needed   |  causal  |
    last_local = tl.minimum(in_block + BLOCK_Q, num_queries) - 1
    high = computed + last_local + 1
    full_high = (computed + in_block + 1) // TILE * TILE
    if WINDOW:
        low = tl.maximum(computed + in_block - window + 1, 0) // TILE * TILE
        full_low = (tl.maximum(computed + last_local - window + 1, 0) + TILE - 1) // TILE * TILE
    else:
        low = 0
        full_low = 0
    if SEGMENTS > 1:
        segment = tl.program_id(2)
        share = tl.cdiv(tl.cdiv(high - low, TILE), SEGMENTS) * TILE
        low = low + segment * share
        high = tl.minimum(low + share, high)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_M, D_BLOCK], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    keys += kv_head * D
    values += kv_head * D
    if DECODE:  # bound by memory: masks cost nothing, and one loop does not run dry in the middle
        full_low = low
        full_high = low
    elif WINDOW:
        acc, highest, total = _attend_tiles(
            acc, highest, total, q, position, low, full_low, seq_len, keys, values, table, block_stride, token_stride,
            scale, softcap, window, D, D_BLOCK, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, PRECISION, MASKED=True,
        )  # fmt: skip
    if not DECODE:
        acc, highest, total = _attend_tiles(
            acc, highest, total, q, position, full_low, full_high, seq_len, keys, values, table, block_stride, token_stride,
            scale, softcap, window, D, D_BLOCK, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, PRECISION, MASKED=False,
        )  # fmt: skip
    acc, highest, total = _attend_tiles(
        acc, highest, total, q, position, full_high, high, seq_len, keys, values, table, block_stride, token_stride,
        scale, softcap, window, D, D_BLOCK, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, PRECISION, MASKED=True,
    )  # fmt: skip

    if SEGMENTS > 1:
        place = ((token - base) * HEADS + head) * SEGMENTS + segment
        tl.store(partial_highest + place, highest, mask=valid)
        tl.store(partial_total + place, total, mask=valid)
        if low < high:
            tl.store(partial + place[:, None] * D + entry[None, :], acc, mask=loaded)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = out + token[:, None] * out_stride + head[:, None] * D + entry[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=loaded)


@triton.jit(do_not_specialize=["first_token"])
def _merge_kernel(
    out,  # [T, HEADS, D], rows out_stride apart
    partial,
    partial_highest,
    partial_total,
    first_token,
    out_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """One program: one head of one token. Segments without a key it sees have a highest score of -inf."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = (token * HEADS + head) * SEGMENTS + tl.arange(0, SEGMENTS)
    highest = tl.load(partial_highest + place)
    used = highest > float("-inf")
    base = tl.max(highest, 0)
    weight = tl.where(used, tl.exp2(highest - tl.where(base == float("-inf"), 0.0, base)), 0.0)
    total = tl.sum(weight * tl.load(partial_total + place), 0)
    entry = tl.arange(0, D_BLOCK)
    inside = used[:, None] & (entry < D)[None, :]
    acc = tl.load(partial + place[:, None] * D + entry[None, :], mask=inside, other=0.0)
    merged = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    at = out + (first_token + token) * out_stride + head * D + entry
    tl.store(at, merged.to(out.dtype.element_ty), mask=entry < D)


def paged_attention(
    query: Tensor,
    out: Tensor,
    layer: AttentionLayer,
    inputs: StepInputs,
    cache: KVCache,
    num_sms: int,
    *,
    first_seq: int,
    last_seq: int,
    max_query_len: int,
    tile: Tile | None = None,
    segments: int | None = None,
) -> None:
    """Attention of the sequences [first_seq, last_seq) of a step.

    Args:
        query: [T, at least q_size], entries of a row contiguous.
        out: [T, q_size] contiguous; only rows of these sequences are written.
        max_query_len: longest query of these sequences; 1 only for leading sequences, whose token has their own index.
        tile, segments: instead of the chosen ones.
    """
    num_seqs = last_seq - first_seq
    decode = max_query_len == 1
    first_token = first_seq if decode else inputs.host_query_start[first_seq]
    num_tokens = num_seqs if decode else inputs.host_query_start[last_seq] - first_token
    group = layer.num_heads // layer.num_kv_heads
    tile = tile or choose_tile(max_query_len, group, layer.head_dim, query.dtype)
    block_q = tile.block_m // group
    blocks = num_seqs if decode else num_tokens // block_q + num_seqs
    if segments is None:
        programs = blocks * layer.num_kv_heads
        segments = choose_segments(programs, inputs.max_seq_len, num_sms, max_query_len <= block_q)
    keys, values = cache.keys[layer.index], cache.values[layer.index]
    head_block = max(16, triton.next_power_of_2(layer.head_dim))
    partial = highest = total = out
    if segments > 1:
        places = (num_tokens, layer.num_heads, segments)
        partial = out.new_empty(*places, layer.head_dim, dtype=torch.float32)
        highest, total = out.new_empty(2, *places, dtype=torch.float32)
    _attention_kernel[(blocks, layer.num_kv_heads, segments)](
        out,
        partial,
        highest,
        total,
        query,
        keys,
        values,
        inputs.block_table,
        inputs.query_start,
        inputs.seq_lens,
        layer.scale,
        layer.softcap or 1.0,
        layer.window or 0,
        query.stride(0),
        out.stride(0),
        inputs.block_table.stride(0),
        keys.stride(0),
        keys.stride(1),
        first_seq,
        last_seq,
        HEADS=layer.num_heads,
        GROUP=group,
        D=layer.head_dim,
        D_BLOCK=head_block,
        BLOCK_SIZE=cache.block_size,
        BLOCK_M=tile.block_m,
        BLOCK_Q=block_q,
        TILE=tile.keys,
        SEGMENTS=segments,
        WINDOW=layer.window is not None,
        SOFTCAP=layer.softcap is not None,
        PRECISION=_PRECISION,
        DECODE=decode,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if segments > 1:
        _merge_kernel[(num_tokens, layer.num_heads)](
            out,
            partial,
            highest,
            total,
            first_token,
            out.stride(0),
            HEADS=layer.num_heads,
            D=layer.head_dim,
            D_BLOCK=head_block,
            SEGMENTS=segments,
            num_warps=2,
        )
