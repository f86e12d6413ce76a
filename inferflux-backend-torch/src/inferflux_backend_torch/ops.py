"""The operations of a decoder beside its matrix products, and what they mean: `TorchOps` is their definition.

`TorchOps` runs on every device and is the oracle of the tests. `NativeOps` (CPU, C) and `TritonOps` (GPU) derive from it and
replace what they do faster. All compute in float32 and round once to the type of their input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.inputs import KVCache, StepInputs

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One layer's attention, apart from its weight matrices. Head counts are those of this rank.

    Attributes:
        index: of the layer in the cache.
        scale: factor of the scores.
        window: a query sees itself and window - 1 tokens before it; None sees all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); None leaves them.
        rope: [max_model_len, rotary_dim] float32, cosines in the first half of each row and sines in the second, factors of
            long-context variants included; the first rotary_dim entries of a head are rotated in halves (GPT-NeoX style).
            None rotates nothing.
        q_norm, k_norm: [head_dim] float32, weight of an RMSNorm over each head before the rotation; None leaves them.
        norm_eps: of these norms.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class TorchOps:
    """Plain torch, on any device. Weights of norms are float32 whatever the model's type."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension (arXiv 1910.07467). x: [..., H]; weight: [H] float32."""
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x, in place and rounded to its type; returns RMSNorm of the sum. x, residual: [T, H] contiguous."""
        residual += x
        return self.rms_norm(residual, weight, eps)

    def act_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """act(first half) * second half of the last dimension: [T, 2 I] -> [T, I]."""
        gate, up = gate_up.float().chunk(2, -1)
        return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)

    def rope_and_cache(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> None:
        """Norm the heads, rotate queries and keys in place, and write keys and values to the cache.

        Args:
            qkv: [T, q_size + 2 * kv_size] contiguous; queries stay in it for `attention`.
        """
        tokens = qkv.shape[0]
        q, k, v = qkv.tensor_split((layer.q_size, layer.q_size + layer.kv_size), -1)
        for part, norm in ((q, layer.q_norm), (k, layer.k_norm)):
            heads = part.view(tokens, -1, layer.head_dim)
            changed = heads.float()
            if norm is not None:
                changed = self.rms_norm(changed, norm, layer.norm_eps)
            if layer.rope is not None:
                changed = rotate(changed, layer.rope[inputs.positions].unsqueeze(1))
            heads.copy_(changed)
        kept = (tokens, layer.num_kv_heads, layer.head_dim)
        for stored, part in ((cache.keys[layer.index], k), (cache.values[layer.index], v)):
            stored.view(-1, layer.num_kv_heads, layer.head_dim)[inputs.slot_mapping] = stored_as(
                part.reshape(kept), stored.dtype
            )

    def attention(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Causal attention of this step's queries over the cache, which holds this step's keys and values already.

        Args:
            qkv: as `rope_and_cache` left it.

        Returns:
            [T, q_size], in the type of qkv.
        """
        out = qkv.new_empty(qkv.shape[0], layer.q_size)
        for i in range(inputs.num_seqs):
            first, last, length = inputs.host_query_start[i], inputs.host_query_start[i + 1], inputs.host_seq_lens[i]
            keys, values = gather(layer, inputs, cache, i, length, qkv.dtype)
            q = qkv[first:last, : layer.q_size].view(last - first, layer.num_heads, layer.head_dim)
            out[first:last] = attend(q, keys, values, layer, length - (last - first)).reshape(last - first, layer.q_size)
        return out


def stored_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the cache's type; what fp8 cannot hold becomes its largest number, where torch alone makes NaN of it."""
    if dtype is torch.float8_e4m3fn:
        x = x.clamp(-_FP8_MAX, _FP8_MAX)
    return x.to(dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864). x: [T, heads, D] float32; cos_sin: [T, 1, rotary_dim]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half], cos_sin[..., half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def gather(
    layer: AttentionLayer, inputs: StepInputs, cache: KVCache, sequence: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, in order: each [length, kv_heads, head_dim]."""
    blocks = inputs.block_table[sequence, : -(-length // cache.block_size)]
    keys, values = (
        stored[layer.index].index_select(0, blocks).flatten(0, 1)[:length].to(dtype) for stored in (cache.keys, cache.values)
    )
    return keys, values


def attend(q: Tensor, keys: Tensor, values: Tensor, layer: AttentionLayer, offset: int) -> Tensor:
    """Attention of one sequence: query i is token offset + i of it.

    Args:
        q: [n, heads, head_dim].
        keys, values: [length, kv_heads, head_dim].

    Returns:
        [n, heads, head_dim].
    """
    n, length = q.shape[0], keys.shape[0]
    group = layer.num_heads // layer.num_kv_heads
    position = torch.arange(offset, offset + n, device=q.device).unsqueeze(1)
    token = torch.arange(length, device=q.device).unsqueeze(0)
    visible = token <= position
    if layer.window is not None:
        visible &= token > position - layer.window
    q, keys, values = (x.transpose(0, 1).float() for x in (q, keys, values))
    if group > 1:
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    scores = (q @ keys.transpose(1, 2)) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)
