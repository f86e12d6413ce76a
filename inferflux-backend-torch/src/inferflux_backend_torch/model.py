"""The decoder: a config-driven transformer over a paged KV cache, in as few operations as its parts allow.

A layer is nine calls: norm, QKV, rotation and cache, attention, output, norm, gate and up, activation, down. Each norm adds
what came before it to the residual stream, so a block ends with the next block's norm. What families add (norms of heads, norms
after a part, factors, sums over ranks) is wrapped around the parts when the model is built; no step asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.linear import Linear
from inferflux_backend_torch.ops import Activation, AttentionLayer, TorchOps

Part = Callable[[Tensor], Tensor]


class Comm(Protocol):
    """What the ranks of a tensor-parallel model do together. Every rank makes the same calls in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; x may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[..., N] of each rank -> [..., size * N], by rank."""
        ...


class NoComm:
    """For a model that is not shared: sums and gathers of one rank."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


class Norm(Protocol):
    """A norm of the residual stream [T, H]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place; returns the norm of the sum."""
        ...


class RMSNorm:
    """weight: [H] float32, the family's offset included."""

    def __init__(self, ops: TorchOps, weight: Tensor, eps: float) -> None:
        self._rms_norm = ops.rms_norm
        self._add_rms_norm = ops.add_rms_norm
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self._weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._add_rms_norm(x, residual, self._weight, self._eps)


class LayerNorm:
    """Layer norm (arXiv 1607.06450), in float32. weight, bias: [H] float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self._weight.shape, self._weight, self._bias, self._eps).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        residual += x
        return self(residual)


class NoNorm:
    """For layers that work on the residual stream itself (OLMo 2). What it returns is that stream, not a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        residual += x
        return residual


class Normed:
    """A norm of what a part returns, before it is added to the residual stream."""

    def __init__(self, part: Part, norm: Norm) -> None:
        self._part = part
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(self._part(x))


class Scaled:
    """A factor of what a part returns."""

    def __init__(self, part: Part, factor: float) -> None:
        self._part = part
        self._factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return self._part(x).mul_(self._factor)


class Reduced:
    """The sum of what a part returns on all ranks."""

    def __init__(self, part: Part, comm: Comm) -> None:
        self._part = part
        self._comm = comm

    def __call__(self, x: Tensor) -> Tensor:
        return self._comm.all_reduce(self._part(x))


class FullQKNorm:
    """RMSNorm of all queries of a token together, and of all its keys (OLMo 2), after the product that makes them.

    Args:
        qkv: the product.
        weight: [q_size + kv_size] float32, of this rank's queries and keys.
        sizes: q_size and kv_size of this rank.
        totals: of all ranks together; with KV heads that several ranks hold, each counts once.
        share: of its sum of squares that this rank adds for keys; 1 unless ranks hold the same KV heads.
    """

    def __init__(
        self, qkv: Linear, weight: Tensor, eps: float, sizes: tuple[int, int], totals: tuple[int, int], share: float, comm: Comm
    ) -> None:
        self._qkv = qkv
        self._weights = weight.tensor_split(sizes[:1])
        self._eps = eps
        self._sizes = sizes
        self._norms = sum(sizes)
        self._totals = torch.tensor(totals, dtype=torch.float32, device=weight.device)
        self._share = torch.tensor((1.0, share), dtype=torch.float32, device=weight.device)
        self._comm = comm

    def __call__(self, x: Tensor) -> Tensor:
        qkv = self._qkv(x)
        parts = qkv[:, : self._norms].tensor_split(self._sizes[:1], 1)
        squares = torch.stack([part.float().square().sum(-1) for part in parts], -1)
        scales = torch.rsqrt(self._comm.all_reduce(squares * self._share) / self._totals + self._eps)
        for part, weight, scale in zip(parts, self._weights, scales.unbind(-1), strict=True):
            part.copy_(part.float() * scale.unsqueeze(-1) * weight)
        return qkv


class HeadLayerNorm:
    """Layer norm of each query and key head with a weight of its own (StableLM 2), after the product that makes them.

    Args:
        qkv: the product.
        weight: [query heads + KV heads, head_dim] float32.
    """

    def __init__(self, qkv: Linear, weight: Tensor, eps: float) -> None:
        self._qkv = qkv
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        qkv = self._qkv(x)
        heads, head_dim = self._weight.shape
        part = qkv[:, : heads * head_dim].view(-1, heads, head_dim)
        part.copy_(functional.layer_norm(part.float(), (head_dim,), eps=self._eps) * self._weight)
        return qkv


class Attention:
    """Attention of one layer, from normed input to what is added to the residual stream.

    Args:
        qkv: [T, H] -> [T, q_size + 2 * kv_size].
        output: [T, q_size] -> [T, H].
    """

    def __init__(self, ops: TorchOps, layer: AttentionLayer, qkv: Part, output: Part) -> None:
        self._rope_and_cache = ops.rope_and_cache
        self._attention = ops.attention
        self.layer = layer
        self._qkv = qkv
        self._output = output

    def fill_cache(self, x: Tensor, inputs: StepInputs, cache: KVCache) -> None:
        """Only write keys and values: all that the last layer has to do for a chunk in the middle of a prompt."""
        self._rope_and_cache(self._qkv(x), self.layer, inputs, cache)

    def __call__(self, x: Tensor, inputs: StepInputs, cache: KVCache, rows: Tensor | None) -> Tensor:
        qkv = self._qkv(x)
        self._rope_and_cache(qkv, self.layer, inputs, cache)
        x = self._attention(qkv, self.layer, inputs, cache)
        return self._output(x if rows is None else x.index_select(0, rows))


class MLP:
    """Gated MLP (arXiv 2002.05202). gate_up: [T, H] -> [T, 2 I]; down: [T, I] -> [T, H]."""

    def __init__(self, ops: TorchOps, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self._act_mul = ops.act_mul
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act_mul(self._gate_up(x), self._activation))


class Block:
    """One layer.

    Args:
        mlp: an MLP or what replaces it.
        mlp_norm: before it.
        next_norm: of the next layer's input, or of the hidden states after the last.
    """

    def __init__(self, attention: Attention, mlp: Part, mlp_norm: Norm, next_norm: Norm) -> None:
        self.attention = attention
        self._mlp = mlp
        self._mlp_norm = mlp_norm
        self._next_norm = next_norm

    def __call__(self, x: Tensor, residual: Tensor, inputs: StepInputs, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: [T, H], normed input.
            residual: [T, H], changed in place.
            rows: [R], tokens to go on with after attention; None for all. The residual stream is left behind with them.

        Returns:
            [T or R, H], `next_norm` of the residual stream.
        """
        x = self.attention(x, inputs, cache, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        x = self._mlp_norm.add(x, residual)
        return self._next_norm.add(self._mlp(x), residual)


class ParallelBlock(Block):
    """One layer whose attention and MLP have the same input (StableLM 2 12B). `mlp_norm` is not used."""

    def __call__(self, x: Tensor, residual: Tensor, inputs: StepInputs, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        attended = self.attention(x, inputs, cache, rows)
        if rows is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        return self._next_norm.add(attended.add_(self._mlp(x)), residual)


class Embedding:
    """Rows of the embedding table [V, H]."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._table)


class ShardedEmbedding:
    """Rows of an embedding table of which each rank holds a part: `table` begins with that of token `first`."""

    def __init__(self, table: Tensor, first: int, comm: Comm) -> None:
        self._table = table
        self._first = first
        self._comm = comm

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self._first
        elsewhere = (rows < 0) | (rows >= self._table.shape[0])
        x = functional.embedding(rows.masked_fill_(elsewhere, 0), self._table)
        return self._comm.all_reduce(x.masked_fill_(elsewhere.unsqueeze(-1), 0))


class Head:
    """Logits from normed hidden states. What a rank holds too much for the vocabulary is cut off.

    Args:
        linear: [R, H] -> [R, V], or this rank's part of it.
        divisor: of the logits.
        softcap: x becomes softcap * tanh(x / softcap); None leaves them.
    """

    def __init__(self, linear: Linear, vocab_size: int, divisor: float, softcap: float | None, comm: Comm | None) -> None:
        self._linear = linear
        self._vocab_size = vocab_size
        self._divisor = divisor
        self._softcap = softcap
        self._comm = comm

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden)
        if self._comm is not None:
            logits = self._comm.all_gather(logits)[:, : self._vocab_size].contiguous()
        if self._divisor != 1:
            logits = logits.div_(self._divisor)
        if self._softcap is not None:
            logits = logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits


class Decoder:
    """A decoder-only transformer, ready to run. Made by `loader.load_decoder`.

    Attributes:
        layers: attention of each layer, from which head counts and windows of this rank can be read.
        dtype, device: of the weights and of the hidden states.
        capturable: whether a step never waits for the device, so that a CUDA graph can hold it.
    """

    def __init__(
        self,
        embedding: Part,
        first_norm: Norm,
        blocks: Sequence[Block],
        head: Head,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capturable: bool,
    ) -> None:
        self._embedding = embedding
        self._first_norm = first_norm
        *self._blocks, self._last_block = blocks
        self._head = head
        self.layers: tuple[AttentionLayer, ...] = tuple(block.attention.layer for block in blocks)
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.capturable = capturable

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Compute one step: writes the keys and values of all its tokens to the cache.

        Returns:
            [R, H], hidden states of the tokens in `inputs.logits_indices` after the last norm.
        """
        residual = self._embedding(inputs.token_ids)
        x = self._first_norm(residual)
        for block in self._blocks:
            x = block(x, residual, inputs, cache)
        if not len(inputs.logits_indices):
            self._last_block.attention.fill_cache(x, inputs, cache)
            return residual[:0]
        return self._last_block(x, residual, inputs, cache, inputs.logits_indices)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] hidden states, as `forward` returns them -> [R, V] logits, in the type of the model."""
        return self._head(hidden)
