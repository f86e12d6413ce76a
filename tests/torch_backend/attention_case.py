"""Steps of any shape with a filled cache, on any device, for comparing kernels with their definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import AttentionLayer, TorchOps


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One layer's work in one step.

    Attributes:
        sequences: (tokens computed before, tokens of this step) of each; those with one token first.
        rotary_dim: 0 for no rotation.
    """

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    rotary_dim: int = 0
    q_norm: bool = False
    k_norm: bool = False
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    num_decodes: int | None = None
    seed: int = 0


@dataclass
class AttentionStep:
    """A case made real."""

    qkv: Tensor
    layer: AttentionLayer
    inputs: StepInputs
    cache: KVCache


def build(case: AttentionCase, device: str = "cpu") -> AttentionStep:
    """Random values, blocks in shuffled order. Cache entries that no token has are NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [computed + n for computed, n in case.sequences]
    needed = [-(-length // case.block_size) for length in lengths]
    order = (torch.randperm(sum(needed), generator=generator) + 1).tolist()
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    starts, positions, slots = [0], list[int](), list[int]()
    cached: list[int] = []
    for row, (computed, n) in enumerate(case.sequences):
        blocks = [order.pop() for _ in range(needed[row])]
        table[row, : len(blocks)] = torch.tensor(blocks)
        places = [blocks[p // case.block_size] * case.block_size + p % case.block_size for p in range(computed + n)]
        cached += places[:computed]
        slots += places[computed:]
        positions += range(computed, computed + n)
        starts.append(starts[-1] + n)

    cache_dtype = case.cache_dtype or case.dtype
    shape = (2, 2, sum(needed) + 1, case.block_size, case.kv_heads, case.head_dim)
    filled = torch.full(shape, torch.nan)
    filled.view(2, 2, -1, case.kv_heads, case.head_dim)[:, :, cached] = torch.randn(
        2, 2, len(cached), case.kv_heads, case.head_dim, generator=generator
    )
    cache = KVCache(2, shape[2], case.block_size, case.kv_heads, case.head_dim, cache_dtype, torch.device(device))
    cache.data.copy_(filled.to(cache_dtype))

    def weight(wanted: bool) -> Tensor | None:
        return (1 + 0.1 * torch.randn(case.head_dim, generator=generator)).to(device) if wanted else None

    rope = None
    if case.rotary_dim:
        angles = torch.randn(max(lengths), case.rotary_dim // 2, generator=generator)
        rope = torch.cat((angles.cos(), angles.sin()), 1).to(device)
    layer = AttentionLayer(
        index=1,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        rope=rope,
        q_norm=weight(case.q_norm),
        k_norm=weight(case.k_norm),
    )
    singles = sum(n == 1 for _, n in case.sequences)
    inputs = StepInputs(
        token_ids=torch.zeros(starts[-1], dtype=torch.int64, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.to(device),
        logits_indices=torch.tensor(starts[1:], device=device) - 1,
        num_decodes=singles if case.num_decodes is None else case.num_decodes,
        max_query_len=max(n for _, n in case.sequences),
        max_seq_len=max(lengths),
        host_query_start=starts,
        host_seq_lens=lengths,
    )
    qkv = torch.randn(starts[-1], (case.heads + 2 * case.kv_heads) * case.head_dim, generator=generator)
    return AttentionStep(qkv.to(device, case.dtype), layer, inputs, cache)


def attention_error(ops: TorchOps, case: AttentionCase, device: str = "cpu") -> float:
    """Largest difference of an attention layer, rotation included, from `TorchOps` on the same machine."""
    outputs = []
    for candidate in (ops, TorchOps()):
        step = build(case, device)
        candidate.rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
        outputs.append(candidate.attention(step.qkv, step.layer, step.inputs, step.cache).float())
    return float((outputs[0] - outputs[1]).abs().nan_to_num(torch.inf).max())
