"""The operations of a decoder on a CPU: small kernels in C for everything beside matrix products and long prefills.

One call of torch costs 5 to 10 microseconds whatever it computes, and a step of a small model makes thousands: with plain
torch they take longer than its weights take to read. Here a layer makes five calls beside its four products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.native_kernels import BUILT, kernels
from inferflux_backend_torch.ops import Activation, AttentionLayer, TorchOps, attend, gather

# Up to so many queries of one sequence go through the kernel for single tokens; more go through torch's flash attention. Over
# 1024 tokens a layer of 9 heads takes 57 us a query in the kernel; flash attention takes 190 us for 8 queries, 300 for 16, 400
# for 32 (one thread, bfloat16). But the kernel rounds as it does for a query alone, and so do products of up to 32 rows in
# bfloat16: drafts then change nothing at all. So some more go through it where their number times the context is small.
_FEW_QUERIES = 8
_SOME_QUERIES, _SOME_WORK = 32, 8192
# Flash attention arranges keys anew for each head. Up to so many queries, the heads that share keys are given as one.
_FOLDED_QUERIES = 48
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_BEST_LEVEL = 2


def native_ops(dtype: torch.dtype, cache_dtype: torch.dtype) -> TorchOps:
    """The fastest operations there are on this CPU for these types."""
    if not BUILT or dtype not in (torch.float32, torch.bfloat16) or cache_dtype != dtype:
        return TorchOps()
    return NativeOps(dtype)


@dataclass(slots=True)
class _Plan:
    """Which tokens of a step go through the kernel and which sequences through flash attention; the same for all layers."""

    inputs: StepInputs
    rows: Tensor
    seqs: Tensor
    ends: Tensor
    long_seqs: list[int]
    masks: dict[tuple[int, int | None, int], Tensor | None]


class NativeOps(TorchOps):
    """For float32 and bfloat16, with a cache of the same type."""

    def __init__(self, dtype: torch.dtype, level: int = _BEST_LEVEL) -> None:
        self._dtype = dtype
        self._bf16 = int(dtype is torch.bfloat16)
        self._plan: _Plan | None = None
        kernels.set_level(level)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is not self._dtype:
            # Heads that the kernel below does not fit are normed in float32 by TorchOps.rope_and_cache, which comes here.
            return super().rms_norm(x, weight, eps)
        width = x.shape[-1]
        if not x.is_contiguous() and not (x.dim() == 2 and x.stride(1) == 1):
            x = x.contiguous()
        rows = x.numel() // width
        stride = x.stride(0) if x.dim() == 2 else width
        out = torch.empty(x.shape, dtype=x.dtype)
        kernels.rms_norm(self._bf16, x.data_ptr(), stride, 0, out.data_ptr(), weight.data_ptr(), rows, width, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, width = residual.shape
        out = torch.empty_like(residual)
        kernels.rms_norm(
            self._bf16,
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            out.data_ptr(),
            weight.data_ptr(),
            rows,
            width,
            eps,
        )
        return out

    def act_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        kind = _ACTIVATIONS.get(activation)
        if kind is None:
            return super().act_mul(gate_up, activation)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        kernels.act_mul(self._bf16, gate_up.data_ptr(), out.data_ptr(), rows, width, kind)
        return out

    def rope_and_cache(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> None:
        if not _fits(layer):
            super().rope_and_cache(qkv, layer, inputs, cache)
            return
        rope = layer.rope
        kernels.rope_and_cache(
            self._bf16,
            qkv.data_ptr(),
            cache.keys[layer.index].data_ptr(),
            cache.values[layer.index].data_ptr(),
            inputs.positions.data_ptr(),
            inputs.slot_mapping.data_ptr(),
            0 if rope is None else rope.data_ptr(),
            0 if layer.q_norm is None else layer.q_norm.data_ptr(),
            0 if layer.k_norm is None else layer.k_norm.data_ptr(),
            qkv.shape[0],
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            0 if rope is None else rope.shape[1],
            layer.norm_eps,
        )

    def attention(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> Tensor:
        if not _fits(layer):
            return super().attention(qkv, layer, inputs, cache)
        plan = self._plan
        if plan is None or plan.inputs is not inputs:
            plan = self._plan = _make_plan(inputs)
        out = qkv.new_empty(qkv.shape[0], layer.q_size)
        if len(plan.rows):
            kernels.paged_attention(
                self._bf16,
                qkv.data_ptr(),
                out.data_ptr(),
                cache.keys[layer.index].data_ptr(),
                cache.values[layer.index].data_ptr(),
                inputs.block_table.data_ptr(),
                inputs.block_table.shape[1],
                plan.rows.data_ptr(),
                plan.seqs.data_ptr(),
                plan.ends.data_ptr(),
                len(plan.rows),
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                cache.block_size,
                layer.scale,
                layer.window or 0,
                layer.softcap or 0.0,
            )
        for sequence in plan.long_seqs:
            self._prefill(out, qkv, layer, plan, cache, sequence)
        return out

    @staticmethod
    def _prefill(out: Tensor, qkv: Tensor, layer: AttentionLayer, plan: _Plan, cache: KVCache, sequence: int) -> None:
        """Attention of a chunk: its context gathered from the cache, then torch's flash attention."""
        inputs = plan.inputs
        first, last = inputs.host_query_start[sequence], inputs.host_query_start[sequence + 1]
        n, length = last - first, inputs.host_seq_lens[sequence]
        q = qkv[first:last, : layer.q_size].view(n, layer.num_heads, layer.head_dim)
        keys, values = gather(layer, inputs, cache, sequence, length, qkv.dtype)
        to = out[first:last].view(n, layer.num_heads, layer.head_dim)
        if layer.softcap is not None:  # flash attention knows no softcap
            to.copy_(attend(q, keys, values, layer, length - n))
            return
        group = layer.num_heads // layer.num_kv_heads
        folds = group if n <= _FOLDED_QUERIES and n < length else 1
        key = (sequence, layer.window if layer.window is not None and layer.window < length else None, folds)
        if key not in plan.masks:
            mask = _mask(n, length, key[1], qkv.dtype)
            plan.masks[key] = mask if mask is None else mask.repeat(folds, 1)
        mask = plan.masks[key]
        # Query j of the i-th head that shares keys becomes query i * n + j of the one head that they become.
        queries = q.transpose(0, 1).reshape(1, layer.num_heads // folds, folds * n, layer.head_dim)
        result = functional.scaled_dot_product_attention(
            queries,
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scale,
            enable_gqa=group != folds,
        )
        to.copy_(result.view(layer.num_heads, n, layer.head_dim).transpose(0, 1))


def _fits(layer: AttentionLayer) -> bool:
    """Whether the kernels can do heads like these: their buffers, which lie on the stack, have fixed sizes."""
    group = layer.num_heads // layer.num_kv_heads
    return (
        layer.head_dim % 2 == 0  # bfloat16 is read in pairs
        and layer.head_dim <= kernels.MAX_HEAD_DIM
        and group <= kernels.MAX_GROUP
        and group * layer.head_dim <= kernels.MAX_GROUP_DIM
    )


def _make_plan(inputs: StepInputs) -> _Plan:
    starts = np.asarray(inputs.host_query_start, dtype=np.int32)
    lengths = np.asarray(inputs.host_seq_lens, dtype=np.int32)
    counts = np.diff(starts)
    is_draft = (counts <= _SOME_QUERIES) & (counts < lengths)  # or the like: not a prompt from its start
    is_few = (counts <= _FEW_QUERIES) | (is_draft & (counts * lengths <= _SOME_WORK))
    few = np.flatnonzero(is_few).astype(np.int32)
    seqs = np.repeat(few, counts[few])
    # Query j of n is followed by n - 1 - j tokens of its own chunk, which it must not see.
    offsets = np.arange(len(seqs), dtype=np.int32) - np.repeat(
        np.cumsum(counts[few], dtype=np.int32) - counts[few], counts[few]
    )
    return _Plan(
        inputs=inputs,
        rows=torch.from_numpy(starts[seqs] + offsets),
        seqs=torch.from_numpy(seqs),
        ends=torch.from_numpy(lengths[seqs] - counts[seqs] + 1 + offsets),
        long_seqs=[int(i) for i in np.flatnonzero(~is_few)],
        masks={},
    )


def _mask(n: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """[n, length], 0 where query i, which is token length - n + i, sees a token and -inf elsewhere; None is plain causal."""
    if n == length and window is None:
        return None
    mask = torch.full((n, length), -torch.inf, dtype=dtype).triu_(length - n + 1)
    if window is not None:
        mask += torch.full((n, length), -torch.inf, dtype=dtype).tril_(length - n - window)
    return mask
