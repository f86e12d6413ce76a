"""Which tensors a checkpoint must hold: names, shapes and sizes, from its configuration. Free of torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from inferflux_backend_torch.config import DecoderConfig

# Buffers that old checkpoints carry though they follow from config.json.
_BUFFERS = re.compile(r".*rotary_emb\.inv_freq\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Names of a family's tensors, without `.weight` and `.bias`. Those of a layer follow `layer`, where {} is its index.

    Attributes:
        qkv: three names, or one for a tensor that holds all three.
        qkv_grouped: in that one tensor, the query heads that share a KV head are followed by its key and its value; otherwise
            all queries come first, then all keys, then all values.
        gate_up: two names, or one for a tensor that holds the gate first.
        attention_norm, mlp_norm: before attention and MLP; attention_post_norm, mlp_post_norm: after them.
        expert_gate_up, expert_down: {} is the index of the expert; without {} one tensor holds all experts, stacked.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_grouped: bool = False
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"
    shared_gate_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"


Shapes = dict[str, tuple[int, ...]]


def expected_tensors(config: DecoderConfig) -> Shapes:
    """Shape of every tensor that the checkpoint must hold, by name."""
    names = config.names
    shapes: Shapes = {f"{names.embedding}.weight": (config.vocab_size, config.hidden_size)}
    if not config.tie_word_embeddings:
        shapes[f"{names.head}.weight"] = (config.vocab_size, config.hidden_size)
    _add_norm(shapes, config, names.final_norm)
    for layer in range(config.num_layers):
        prefix = names.layer.format(layer)
        _add_attention(shapes, config, prefix)
        if config.is_sparse(layer):
            _add_experts(shapes, config, prefix)
        else:
            _add_mlp(shapes, config, prefix, (names.gate_up, names.down), config.intermediate_size, config.mlp_bias)
    return shapes


def ignored_tensors(config: DecoderConfig) -> tuple[re.Pattern[str], ...]:
    """Tensors that the checkpoint may hold and nothing reads, like that of a tied head, whose weight is the embedding's."""
    head = re.compile(re.escape(f"{config.names.head}.weight") + r"\Z")
    return (_BUFFERS, head) if config.tie_word_embeddings else (_BUFFERS,)


def weight_bytes(config: DecoderConfig, item: int) -> int:
    """Memory that the weights take with so many bytes for an element of a matrix, on all ranks together."""
    # Norms, the only weights of one dimension beside biases, stay float32.
    return sum(math.prod(shape) * (4 if len(shape) == 1 else item) for shape in expected_tensors(config).values())


def _add(shapes: Shapes, name: str, rows: int, columns: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (rows, columns)
    if bias:
        shapes[f"{name}.bias"] = (rows,)


def _add_norm(shapes: Shapes, config: DecoderConfig, name: str) -> None:
    shapes[f"{name}.weight"] = (config.hidden_size,)
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (config.hidden_size,)


def _add_attention(shapes: Shapes, config: DecoderConfig, prefix: str) -> None:
    names = config.names
    sizes = (config.q_size, config.kv_size, config.kv_size)
    for name, rows in zip(names.qkv, sizes if len(names.qkv) > 1 else (sum(sizes),), strict=True):
        _add(shapes, prefix + name, rows, config.hidden_size, config.qkv_bias)
    _add(shapes, prefix + names.o, config.hidden_size, config.q_size, config.o_bias)
    for name, heads in ((names.q_norm, config.num_heads), (names.k_norm, config.num_kv_heads)):
        if config.qk_norm == "head":
            shapes[f"{prefix}{name}.weight"] = (config.head_dim,)
        elif config.qk_norm == "full":
            shapes[f"{prefix}{name}.weight"] = (heads * config.head_dim,)
        elif config.qk_norm == "head_layer":
            shapes |= {f"{prefix}{name}.norms.{head}.weight": (config.head_dim,) for head in range(heads)}
    if config.pre_norms:
        _add_norm(shapes, config, prefix + names.attention_norm)
        if not config.parallel_residual:
            _add_norm(shapes, config, prefix + names.mlp_norm)
    if config.post_norms:
        _add_norm(shapes, config, prefix + names.attention_post_norm)
        _add_norm(shapes, config, prefix + names.mlp_post_norm)


def _add_mlp(
    shapes: Shapes, config: DecoderConfig, prefix: str, names: tuple[tuple[str, ...], str], size: int, bias: bool
) -> None:
    gate_up, down = names
    for name in gate_up:
        _add(shapes, prefix + name, 2 * size // len(gate_up), config.hidden_size, bias)
    _add(shapes, prefix + down, config.hidden_size, size, bias)


def _add_experts(shapes: Shapes, config: DecoderConfig, prefix: str) -> None:
    names, moe = config.names, config.moe
    assert moe is not None
    _add(shapes, prefix + names.router, moe.num_experts, config.hidden_size, False)
    if "{}" in names.expert_down:
        for expert in range(moe.num_experts):
            expert_names = (tuple(name.format(expert) for name in names.expert_gate_up), names.expert_down.format(expert))
            _add_mlp(shapes, config, prefix, expert_names, moe.intermediate_size, False)
    else:
        rows = 2 * moe.intermediate_size
        shapes[f"{prefix}{names.expert_gate_up[0]}.weight"] = (moe.num_experts, rows, config.hidden_size)
        shapes[f"{prefix}{names.expert_down}.weight"] = (moe.num_experts, config.hidden_size, moe.intermediate_size)
    if moe.shared_intermediate_size:
        shared = (names.shared_gate_up, names.shared_down)
        _add_mlp(shapes, config, prefix, shared, moe.shared_intermediate_size, False)
        _add(shapes, prefix + names.shared_gate, 1, config.hidden_size, False)
