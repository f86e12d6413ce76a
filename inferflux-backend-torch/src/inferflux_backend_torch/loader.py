"""From safetensors files to a decoder: weights are read straight into the fused tensors that it works with.

One layer is read at a time, so that loading takes the memory of the weights and of one layer. Tensor-parallel ranks read their
part only: attention by KV heads, MLPs and experts by intermediate columns, embedding and head by vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from inferflux_backend_torch.checkpoint import Checkpoint, refuse_not_finite, refuse_too_large
from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.linear import Linear, LinearFactory, PlainLinear
from inferflux_backend_torch.model import (
    MLP,
    Attention,
    Block,
    Comm,
    Decoder,
    Embedding,
    FullQKNorm,
    Head,
    HeadLayerNorm,
    LayerNorm,
    NoComm,
    NoNorm,
    Norm,
    Normed,
    ParallelBlock,
    Part,
    Reduced,
    RMSNorm,
    Scaled,
    ShardedEmbedding,
)
from inferflux_backend_torch.moe import Experts, GroupedExperts, LoopedExperts, MixtureOfExperts, SharedExpert
from inferflux_backend_torch.ops import AttentionLayer, TorchOps
from inferflux_backend_torch.rope import RopeConfig, rope_table
from inferflux_backend_torch.shard import WHOLE, Shard
from inferflux_backend_torch.weights import expected_tensors, ignored_tensors

Rows = Sequence[tuple[str, slice]]
"""Rows of tensors, one after the other, that make up a fused one."""


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    linear: LinearFactory,
    ops: TorchOps,
    max_model_len: int,
    shard: Shard = WHOLE,
    comm: Comm | None = None,
) -> Decoder:
    """Load a model.

    Args:
        dtype: of weights and hidden states; norms stay float32.
        linear: lays out the matrices, the head's too.
        max_model_len: positions that rotary tables are made for.
        shard: the part to load; `comm` is needed if there are others.

    Raises:
        ModelFileError: tensors are missing, unexpected or contradict config.json in their shapes, or a weight is NaN or
            infinite; or the model can't be shared by so many ranks.
    """
    shard.check(config)
    checkpoint.check(expected_tensors(config), ignored=ignored_tensors(config))
    with ExitStack() as files, torch.inference_mode():
        reader = _TensorReader(checkpoint, files, dtype, device)
        return _Loader(config, reader, linear, ops, max_model_len, shard, comm or NoComm()).load()


class _TensorReader:
    """Reads parts of tensors by name, in the model's type and on its device."""

    def __init__(self, checkpoint: Checkpoint, files: ExitStack, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._files = files
        self._open: dict[str, Any] = {}
        self.dtype = dtype
        self.device = device

    def has(self, name: str) -> bool:
        return name in self._checkpoint.tensors

    def read(self, name: str, *cut: slice) -> Tensor:
        """The tensor as it is stored, on the CPU and backed by the file."""
        path = str(self._checkpoint.tensors[name].path)
        if path not in self._open:
            self._open[path] = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        tensor: Tensor = self._open[path].get_slice(name)[cut] if cut else self._open[path].get_tensor(name)
        refuse_not_finite(name, tensor)
        refuse_too_large(name, tensor, self.dtype)
        return tensor

    def empty(self, *shape: int) -> Tensor:
        """To be filled with what `read` returns."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def fused(self, rows: Rows, suffix: str) -> Tensor:
        """[sum of rows, ...]."""
        parts = [self.read(f"{name}.{suffix}", cut) for name, cut in rows]
        out = self.empty(sum(map(len, parts)), *parts[0].shape[1:])
        first = 0
        for part in parts:
            out[first : first + len(part)].copy_(part)
            first += len(part)
        return out

    def columns(self, name: str, cut: slice) -> Tensor:
        """[rows, columns of the cut], contiguous."""
        part = self.read(f"{name}.weight", slice(None), cut)
        return self.empty(*part.shape).copy_(part)

    def vector(self, name: str, cut: slice = slice(None), offset: float = 0.0) -> Tensor:
        """Float32 weight of a norm, `offset` added."""
        return self.read(name, cut).to(self.device, torch.float32, copy=True) + offset


class _Loader:
    def __init__(
        self,
        config: DecoderConfig,
        reader: _TensorReader,
        linear: LinearFactory,
        ops: TorchOps,
        max_model_len: int,
        shard: Shard,
        comm: Comm,
    ) -> None:
        self._config = config
        self._reader = reader
        self._linear = linear
        self._ops = ops
        self._max_model_len = max_model_len
        self._shard = shard
        self._comm = comm
        self._capturable = True
        self._tables: dict[RopeConfig, Tensor] = {}

    def load(self) -> Decoder:
        config, reader = self._config, self._reader
        table = self._vocabulary_rows(config.names.embedding)
        sharded = self._shard.size > 1
        first_token = self._shard.vocabulary(config.vocab_size).start
        embedding: Part = ShardedEmbedding(table, first_token, self._comm) if sharded else Embedding(table)
        if config.embedding_multiplier != 1:
            # Rounded to the type of the model, as Gemma was trained with it.
            embedding = Scaled(embedding, torch.tensor(config.embedding_multiplier, dtype=reader.dtype).item())
        input_norms = [self._input_norm(layer) for layer in range(config.num_layers)]
        next_norms = [*input_norms[1:], self._norm(config.names.final_norm)]
        blocks = [self._block(layer, next_norm) for layer, next_norm in enumerate(next_norms)]
        head = Head(
            self._linear(table if config.tie_word_embeddings else self._vocabulary_rows(config.names.head)),
            config.vocab_size,
            config.logits_divisor,
            config.logits_softcap,
            self._comm if sharded else None,
        )
        return Decoder(
            embedding,
            input_norms[0],
            blocks,
            head,
            hidden_size=config.hidden_size,
            dtype=reader.dtype,
            device=reader.device,
            capturable=self._capturable,
        )

    def _vocabulary_rows(self, name: str) -> Tensor:
        """This rank's rows of the embedding or the head, with zeros for those past the end of the vocabulary."""
        rows, end = self._shard.vocabulary(self._config.vocab_size), self._config.vocab_size
        part = self._reader.read(f"{name}.weight", slice(min(rows.start, end), min(rows.stop, end)))
        shape = (rows.stop - rows.start, self._config.hidden_size)
        out = torch.zeros(shape, dtype=self._reader.dtype, device=self._reader.device)
        out[: len(part)].copy_(part)
        return out

    def _norm(self, name: str) -> Norm:
        weight = self._reader.vector(f"{name}.weight", offset=self._config.norm_offset)
        if self._config.norm == "layer":
            return LayerNorm(weight, self._reader.vector(f"{name}.bias"), self._config.norm_eps)
        return RMSNorm(self._ops, weight, self._config.norm_eps)

    def _input_norm(self, layer: int) -> Norm:
        names = self._config.names
        return self._norm(names.layer.format(layer) + names.attention_norm) if self._config.pre_norms else NoNorm()

    def _block(self, layer: int, next_norm: Norm) -> Block:
        config, names = self._config, self._config.names
        prefix = names.layer.format(layer)
        attention = self._attention(layer, prefix)
        if config.is_sparse(layer):
            part: Part = self._experts(prefix)
        else:
            part = self._mlp(prefix, names.gate_up, names.down, config.intermediate_size)
        mlp = self._finished(part, prefix + names.mlp_post_norm)
        if config.parallel_residual:
            return ParallelBlock(attention, mlp, NoNorm(), next_norm)
        mlp_norm = self._norm(prefix + names.mlp_norm) if config.pre_norms else NoNorm()
        return Block(attention, mlp, mlp_norm, next_norm)

    def _finished(self, part: Part, post_norm: str) -> Part:
        """The part with what stands between it and the residual stream."""
        if self._shard.size > 1:
            part = Reduced(part, self._comm)
        if self._config.post_norms:
            part = Normed(part, self._norm(post_norm))
        if self._config.residual_multiplier != 1:
            part = Scaled(part, self._config.residual_multiplier)
        return part

    def _attention(self, layer: int, prefix: str) -> Attention:
        config, reader, names = self._config, self._reader, self._config.names
        queries, keys = self._shard.heads(config)
        qkv = self._qk_normed(self._rows_linear(self._qkv_rows(prefix), config.qkv_bias), prefix, queries, keys)
        output = self._columns_linear(prefix + names.o, _times(queries, config.head_dim), config.o_bias)
        offset = config.norm_offset
        head_norm = config.qk_norm == "head"
        rope, window = config.ropes[layer], config.windows[layer]
        described = AttentionLayer(
            index=layer,
            num_heads=queries.stop - queries.start,
            num_kv_heads=keys.stop - keys.start,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            window=window if window is not None and window < self._max_model_len else None,
            softcap=config.attention_softcap,
            rope=None if rope is None else self._rope_table(rope),
            q_norm=reader.vector(f"{prefix}{names.q_norm}.weight", offset=offset) if head_norm else None,
            k_norm=reader.vector(f"{prefix}{names.k_norm}.weight", offset=offset) if head_norm else None,
            norm_eps=config.norm_eps,
        )
        return Attention(self._ops, described, qkv, self._finished(output, prefix + names.attention_post_norm))

    def _rope_table(self, rope: RopeConfig) -> Tensor:
        if rope not in self._tables:
            self._tables[rope] = rope_table(rope, self._max_model_len).to(self._reader.device)
        return self._tables[rope]

    def _qkv_rows(self, prefix: str) -> Rows:
        """Where this rank's queries, keys and values lie."""
        config, names = self._config, self._config.names
        dim = config.head_dim
        queries, keys = self._shard.heads(config)
        if len(names.qkv) > 1:
            cuts = (queries, keys, keys)
            return [(prefix + name, _times(cut, dim)) for name, cut in zip(names.qkv, cuts, strict=True)]
        name = prefix + names.qkv[0]
        if not names.qkv_grouped:
            first_key, first_value = config.num_heads, config.num_heads + config.num_kv_heads
            cuts = (queries, _moved(keys, first_key), _moved(keys, first_value))
            return [(name, _times(cut, dim)) for cut in cuts]
        group = config.num_heads // config.num_kv_heads
        # By head: group queries, key, value, then the next group's.
        order = [head // group * (group + 2) + head % group for head in range(queries.start, queries.stop)]
        for within in (group, group + 1):
            order += [kv * (group + 2) + within for kv in range(keys.start, keys.stop)]
        return [(name, slice(head * dim, (head + 1) * dim)) for head in order]

    def _qk_normed(self, qkv: Linear, prefix: str, queries: slice, keys: slice) -> Part:
        config, reader = self._config, self._reader
        q_norm, k_norm = prefix + config.names.q_norm, prefix + config.names.k_norm
        if config.qk_norm == "full":
            q_cut, k_cut = _times(queries, config.head_dim), _times(keys, config.head_dim)
            weights = [reader.vector(f"{q_norm}.weight", q_cut), reader.vector(f"{k_norm}.weight", k_cut)]
            sizes = (len(weights[0]), len(weights[1]))
            totals = (config.q_size, config.kv_size)
            share = min(1.0, config.num_kv_heads / self._shard.size)
            return FullQKNorm(qkv, torch.cat(weights), config.norm_eps, sizes, totals, share, self._comm)
        if config.qk_norm == "head_layer":
            heads = ((norm, head) for norm, cut in ((q_norm, queries), (k_norm, keys)) for head in range(cut.start, cut.stop))
            weight = torch.stack([reader.vector(f"{norm}.norms.{head}.weight") for norm, head in heads])
            return HeadLayerNorm(qkv, weight, config.norm_eps)
        return qkv

    def _rows_linear(self, rows: Rows, bias: bool) -> Linear:
        weight = self._reader.fused(rows, "weight")
        return self._linear(weight, self._reader.fused(rows, "bias") if bias else None)

    def _columns_linear(self, name: str, cut: slice, bias: bool) -> Linear:
        """The products of ranks are summed, so one rank alone adds the bias."""
        bias = bias and self._shard.rank == 0
        weight = self._reader.columns(name, cut)
        return self._linear(weight, self._reader.fused([(name, slice(None))], "bias") if bias else None)

    def _mlp(self, prefix: str, gate_up: Sequence[str], down: str, size: int) -> MLP:
        bias = self._config.mlp_bias
        rows = self._gate_up_rows(prefix, gate_up, size)
        down_linear = self._columns_linear(prefix + down, self._shard.cut(size), bias)
        return MLP(self._ops, self._rows_linear(rows, bias), down_linear, self._config.activation)

    def _gate_up_rows(self, prefix: str, names: Sequence[str], size: int) -> Rows:
        cut = self._shard.cut(size)
        if len(names) > 1:
            return [(prefix + name, cut) for name in names]
        return [(prefix + names[0], cut), (prefix + names[0], _moved(cut, size))]

    def _experts(self, prefix: str) -> MixtureOfExperts:
        config, reader, names, moe = self._config, self._reader, self._config.names, self._config.moe
        assert moe is not None
        gate_up, down = self._stacked_experts(prefix)
        experts: Experts
        if self._linear is PlainLinear and GroupedExperts.can_run(gate_up, down):
            experts = GroupedExperts(self._ops, gate_up, down, config.activation)
        else:
            first, second = ([self._linear(weight) for weight in stacked] for stacked in (gate_up, down))
            experts = LoopedExperts(self._ops, first, second, config.activation)
            self._capturable = False
        shared = None
        if moe.shared_intermediate_size:
            mlp = self._mlp(prefix, names.shared_gate_up, names.shared_down, moe.shared_intermediate_size)
            shared = SharedExpert(mlp, reader.fused([(prefix + names.shared_gate, slice(None))], "weight"))
        router = reader.fused([(prefix + names.router, slice(None))], "weight")
        return MixtureOfExperts(router, experts, shared, top_k=moe.top_k, norm_topk_prob=moe.norm_topk_prob)

    def _stacked_experts(self, prefix: str) -> tuple[Tensor, Tensor]:
        """[E, 2 I, H] and [E, H, I] of this rank."""
        config, reader, names, moe = self._config, self._reader, self._config.names, self._config.moe
        assert moe is not None
        cut = self._shard.cut(moe.intermediate_size)
        size = cut.stop - cut.start
        gate_up = reader.empty(moe.num_experts, 2 * size, config.hidden_size)
        down = reader.empty(moe.num_experts, config.hidden_size, size)
        if "{}" not in names.expert_down:
            name = f"{prefix}{names.expert_gate_up[0]}.weight"
            gate_up[:, :size].copy_(reader.read(name, slice(None), cut))
            gate_up[:, size:].copy_(reader.read(name, slice(None), _moved(cut, moe.intermediate_size)))
            down.copy_(reader.read(f"{prefix}{names.expert_down}.weight", slice(None), slice(None), cut))
            return gate_up, down
        for expert in range(moe.num_experts):
            for half, name in zip((slice(size), slice(size, None)), names.expert_gate_up, strict=True):
                gate_up[expert, half].copy_(reader.read(f"{prefix}{name.format(expert)}.weight", cut))
            down[expert].copy_(reader.read(f"{prefix}{names.expert_down.format(expert)}.weight", slice(None), cut))
        return gate_up, down


def _times(cut: slice, factor: int) -> slice:
    return slice(cut.start * factor, cut.stop * factor)


def _moved(cut: slice, distance: int) -> slice:
    return slice(cut.start + distance, cut.stop + distance)
