"""Drawing tokens by Triton: `device_draw`'s functions, which define them, with a few passes over the logits in all.

A row of logits is cut into blocks, so that one row alone still occupies the GPU: a first kernel takes the best of each block, a
second the best of those. Noise is computed where it is used and never stored; nothing is sorted.
"""

# Triton ships no types, so its decorator and the kernels under it are untyped; the launchers are checked in full:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 -- constants of a kernel are written in capitals, as Triton itself does

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferflux_backend_torch.device_draw import DeviceDraw
from inferflux_backend_torch.penalties import upload

_BLOCK = 2048  # tokens of one program
_SEARCH_BLOCK = 4096  # tokens at a time of the threshold search, which has one program a row
_INFINITY_BITS = tl.constexpr(0x7F800000)
_LEAST_V_GAP = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _possible(logits):
    """NaN is an impossible token."""
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def _gumbel_noise(seed, position, group):
    """Noise of the tokens 4 g .. 4 g + 3 of each group, [4 G] float32: `philox.device_noise`."""
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + position, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [G, 2, 2]: word 2 i + j of a group at [i, j]
    v = (tl.reshape(words, [4 * group.shape[0]]).to(tl.float32) + 0.5) * (2.0**-32)
    v = tl.minimum(v, _LEAST_V_GAP)
    # -log1p(-v) to full precision from a plain logarithm: what rounding took from u = 1 - v, the quotient gives back.
    u = 1.0 - v
    exponential = tl.where(u == 1.0, v, -tl.log(u) * (v / tl.where(u == 1.0, 1.0, 1.0 - u)))
    return -tl.log(exponential)


@triton.jit
def _block_max_kernel(
    logits,  # [R, V], rows stride apart
    best,  # [R, blocks] float32
    best_index,  # [R, blocks] int32
    stride,
    V,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = _possible(tl.load(logits + row * stride + token, mask=token < V, other=float("-inf")).to(tl.float32))
    highest, index = tl.max(value, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + block, highest)
    tl.store(best_index + row * tl.num_programs(1) + block, block * BLOCK + index)


@triton.jit
def _best_kernel(
    token,  # [R] int64
    best,  # [R, blocks] float32
    best_index,  # [R, blocks] int32
    blocks,
    BLOCKS: tl.constexpr,
):
    """Of equals the first, as the blocks are in order."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    _, index = tl.max(tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf")), 0, return_indices=True)
    tl.store(token + row, tl.load(best_index + row * blocks + index).to(tl.int64))


@triton.jit
def _scale_kernel(
    scaled,  # [R, V] float32
    logits,  # [R, V], rows stride apart
    temperature,  # [R] float32
    best,  # [R, blocks] float32
    stride,
    V,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    highest = tl.max(tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf")), 0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _possible(tl.load(logits + row * stride + token, mask=token < V, other=float("-inf")).to(tl.float32))
    if (highest == float("inf")) | (highest == float("-inf")):
        value = tl.where(value == highest, 0.0, float("-inf"))
    else:
        value = (value - highest) / tl.load(temperature + row)
    tl.store(scaled + row * V + token, value, mask=token < V)


@triton.jit
def _least_limit(start, V, needed, most, kept, COUNT: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """Least distance below the best token, as bits, within which there are `needed` tokens (COUNT), or as much probability.

    Each pass tells between WAYS parts of what is left. Only tokens within `kept` count; `most` if there is too little.
    """
    low = tl.full([], 0, tl.int32)
    high = most
    while low < high:
        # Limits at low + 1 step - 1, low + 2 steps - 1, ..., none past high.
        step = (high - low) // WAYS + 1
        limit = low.to(tl.int64) + step * (tl.arange(0, WAYS) + 1).to(tl.int64) - 1
        limit = tl.minimum(limit, high.to(tl.int64)).to(tl.int32)
        amount = tl.zeros([WAYS], tl.float64)
        for first in range(0, V, BLOCK):
            token = first + tl.arange(0, BLOCK)
            value = tl.load(start + token, mask=token < V, other=float("-inf"))
            distance = tl.abs(value).to(tl.int32, bitcast=True)
            weight = tl.where(token < V, 1.0, 0.0) if COUNT else tl.where(distance <= kept, tl.exp(value), 0.0)
            within = distance[None, :] <= limit[:, None]
            amount += tl.sum(tl.where(within, weight[None, :], 0.0), 1).to(tl.float64)
        short = tl.sum(((amount < needed) & (limit < high)).to(tl.int32), 0)  # amounts ascend
        low = low + short * step
        high = tl.minimum(high, low + step - 1)
    return high


@triton.jit
def _filter_kernel(
    thresholds,  # [R] float32
    scaled,  # [R, V] float32
    top_k,  # [R] int64
    top_p,  # [R] floating
    log_min_p,  # [R] float32
    V,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """One program a row. Bits of nonnegative floats are ordered like their values, so limits are searched as integers."""
    row = tl.program_id(0).to(tl.int64)
    start = scaled + row * V
    everything = tl.full([], _INFINITY_BITS, tl.int32)
    kept = everything
    k = tl.load(top_k + row)
    if k < V:
        kept = _least_limit(start, V, k.to(tl.float64), everything, everything, True, BLOCK, WAYS)
    p = tl.load(top_p + row).to(tl.float64)
    limit = kept
    if p < 1.0:
        mass = tl.full([], 0.0, tl.float64)
        for first in range(0, V, BLOCK):
            token = first + tl.arange(0, BLOCK)
            value = tl.load(start + token, mask=token < V, other=float("-inf"))
            within = tl.abs(value).to(tl.int32, bitcast=True) <= kept
            mass += tl.sum(tl.where(within, tl.exp(value), 0.0), 0).to(tl.float64)
        limit = _least_limit(start, V, p * mass, kept, kept, False, BLOCK, WAYS)
    threshold = -limit.to(tl.float32, bitcast=True)
    tl.store(thresholds + row, tl.maximum(threshold, tl.load(log_min_p + row)))


@triton.jit
def _noisy_max_kernel(
    best,  # [R, blocks] float32
    best_index,  # [R, blocks] int32
    scaled,  # [R, V] float32
    thresholds,  # [R] float32
    seeds,  # [R] int64
    positions,  # [R] int64
    V,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scaled + row * V + token, mask=token < V, other=float("-inf"))
    group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    noise = _gumbel_noise(tl.load(seeds + row), tl.load(positions + row).to(tl.int32), group)
    value = tl.where(value >= tl.load(thresholds + row), value + noise, float("-inf"))
    highest, index = tl.max(value, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + block, highest)
    tl.store(best_index + row * tl.num_programs(1) + block, block * BLOCK + index)


def argmax(logits: Tensor) -> Tensor:
    """Most likely token of each row of [R, V], of any float type, rows may be apart: [R] int64; the lowest id of equals."""
    best, best_index = _block_max(logits)
    return _first_best(best, best_index)


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - highest) / temperature: [R, V] float32; see `device_draw.scale`."""
    rows, vocab_size = logits.shape
    scaled = torch.empty(rows, vocab_size, dtype=torch.float32, device=logits.device)
    if rows:
        best, _ = _block_max(logits)
        blocks = best.shape[1]
        _scale_kernel[(rows, blocks)](
            scaled,
            logits,
            temperature,
            best,
            logits.stride(0),
            vocab_size,
            blocks,
            BLOCK=_BLOCK,
            BLOCKS=triton.next_power_of_2(blocks),
        )
    return scaled


def filter_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
    """Least scaled logit that survives top_k, top_p and min_p: [R] float32; see `device_draw.filter_thresholds`.

    Sums of probabilities are float32 within 4096 tokens and float64 beyond.
    """
    rows, vocab_size = scaled.shape
    thresholds = torch.empty(rows, dtype=torch.float32, device=scaled.device)
    if rows:
        block = min(triton.next_power_of_2(vocab_size), _SEARCH_BLOCK)
        _filter_kernel[(rows,)](
            thresholds, scaled.contiguous(), top_k, top_p, log_min_p, vocab_size, BLOCK=block, WAYS=8, num_warps=16
        )
    return thresholds


def gumbel_argmax(scaled: Tensor, thresholds: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw from softmax(scaled) among the tokens at or above the threshold: [R] int64; see `device_draw.gumbel_argmax`."""
    rows, vocab_size = scaled.shape
    best, best_index = _blocks(scaled)
    if rows:
        _noisy_max_kernel[best.shape](
            best, best_index, scaled.contiguous(), thresholds, seeds, positions, vocab_size, BLOCK=_BLOCK
        )
    return _first_best(best, best_index)


class TritonDraw(DeviceDraw):
    """`DeviceDraw` by the kernels of this module; a row without filters leaves the search for thresholds at once."""

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def draw(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        which, where, position = upload(self._device, [list(rows), list(slots), list(positions)], torch.int64)
        scaled = scale(logits if len(rows) == len(logits) else logits[which], self.temperature[where])
        if self._filtered.isdisjoint(slots):
            thresholds = scaled.new_full((len(rows),), -torch.inf)
        else:
            thresholds = filter_thresholds(scaled, self.top_k[where], self.top_p[where], self.log_min_p[where])
        return gumbel_argmax(scaled, thresholds, self.seeds[where], position)


def _blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], triton.cdiv(logits.shape[1], _BLOCK))
    return (
        torch.empty(shape, dtype=torch.float32, device=logits.device),
        torch.empty(shape, dtype=torch.int32, device=logits.device),
    )


def _block_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, best_index = _blocks(logits)
    if len(logits):
        _block_max_kernel[best.shape](logits, best, best_index, logits.stride(0), logits.shape[1], BLOCK=_BLOCK)
    return best, best_index


def _first_best(best: Tensor, best_index: Tensor) -> Tensor:
    rows, blocks = best.shape
    token = torch.empty(rows, dtype=torch.int64, device=best.device)
    if rows:
        _best_kernel[(rows,)](token, best, best_index, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1)
    return token
