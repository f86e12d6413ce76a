"""Decoders of real shapes with random weights: a GPU's speed does not depend on their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inferflux_backend_torch.linear import PlainLinear
from inferflux_backend_torch.model import MLP, Attention, Block, Decoder, Embedding, Head, RMSNorm
from inferflux_backend_torch.ops import AttentionLayer, TorchOps


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder with tied embeddings or without."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = True
    qk_norm: bool = False

    @property
    def num_weights(self) -> int:
        """That a decode step reads: all but the embedding table, of which it reads a row a token, if it isn't the head too."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab_size * self.hidden


QWEN3_06B = ModelShape(
    name="Qwen3-0.6B", layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128,
    vocab_size=151936, qk_norm=True,
)  # fmt: skip
LLAMA_1B = ModelShape(
    name="Llama-3.2-1B", layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, vocab_size=128256
)  # fmt: skip
LLAMA_8B = ModelShape(
    name="Llama-3.1-8B", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128,
    vocab_size=128256, tied=False,
)  # fmt: skip
# No size is a power of two where the kernels pad to one. One layer is enough: the comparisons of attention use the second of
# two, and each launch through the interpreter takes its milliseconds.
TINY = ModelShape(
    name="tiny", layers=1, hidden=24, intermediate=40, heads=6, kv_heads=2, head_dim=20, vocab_size=67, qk_norm=True
)  # fmt: skip


def random_decoder(
    shape: ModelShape, ops: TorchOps, dtype: torch.dtype, device: torch.device, max_model_len: int, seed: int = 0
) -> Decoder:
    """A model ready to run; the same seed gives the same weights on the same device."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        # So that the variance of what it multiplies stays: logits then differ enough for greedy tokens to be certain.
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        return out.normal_(std=columns**-0.5, generator=generator)

    def norm() -> RMSNorm:
        return RMSNorm(ops, torch.ones(shape.hidden, device=device), 1e-6)

    frequencies = 1e6 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = torch.outer(torch.arange(max_model_len, device=device), frequencies)
    rope = torch.cat((angles.cos(), angles.sin()), 1)
    head_norm = torch.ones(shape.head_dim, device=device) if shape.qk_norm else None
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    input_norms = [norm() for _ in range(shape.layers + 1)]
    blocks = []
    for index in range(shape.layers):
        layer = AttentionLayer(
            index=index,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope,
            q_norm=head_norm,
            k_norm=head_norm,
        )
        qkv, output = PlainLinear(weight(q_size + 2 * kv_size, shape.hidden)), PlainLinear(weight(shape.hidden, q_size))
        gate_up = PlainLinear(weight(2 * shape.intermediate, shape.hidden))
        mlp = MLP(ops, gate_up, PlainLinear(weight(shape.hidden, shape.intermediate)), "silu")
        blocks.append(Block(Attention(ops, layer, qkv, output), mlp, norm(), input_norms[index + 1]))
    table = weight(shape.vocab_size, shape.hidden)
    head = table if shape.tied else weight(shape.vocab_size, shape.hidden)
    return Decoder(
        Embedding(table),
        input_norms[0],
        blocks,
        Head(PlainLinear(head), shape.vocab_size, 1.0, None, None),
        hidden_size=shape.hidden,
        dtype=dtype,
        device=device,
        capturable=True,
    )
