"""What a decoder computes, read from config.json and checked: the only description that loader and model go by.

Nothing in here knows the name of a family; families.py says how each architecture fills a DecoderConfig. Free of torch, so that
the server process can refuse a bad model before an engine is started for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from inferflux_backend_torch.ops import Activation
    from inferflux_backend_torch.rope import RopeConfig
    from inferflux_backend_torch.weights import WeightNames

QKNorm = Literal["none", "head", "full", "head_layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """The mixture of experts that replaces the MLP of sparse layers (arXiv 1701.06538).

    Attributes:
        num_experts: of each sparse layer.
        top_k: experts that a token goes through.
        norm_topk_prob: the weights of the chosen experts are scaled to sum to 1.
        intermediate_size: of one expert.
        shared_intermediate_size: of the expert that all tokens go through behind a sigmoid gate; 0 for none.
        sparse: by layer, whether it has experts; other layers keep the MLP.
    """

    num_experts: int
    top_k: int
    norm_topk_prob: bool
    intermediate_size: int
    shared_intermediate_size: int
    sparse: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with rotary positions and gated MLPs.

    Attributes:
        norm: rms (arXiv 1910.07467) or layer, which has a bias (arXiv 1607.06450).
        norm_offset: added to the weights of RMS norms (Gemma stores them less 1).
        pre_norms: attention and MLP work on the normed residual stream.
        post_norms: what they return is normed before it is added.
        parallel_residual: attention and MLP work on the same normed input, and both are added at once.
        qk_norm: norm of queries and keys before the rotation. head: one RMS weight for every head; full: RMS over all heads
            together; head_layer: layer norm without bias, each head with its own weight.
        attention_scale: factor of the scores.
        attention_softcap, logits_softcap: x becomes cap * tanh(x / cap); None leaves it.
        embedding_multiplier: factor of the embedded tokens.
        residual_multiplier: factor of what attention and MLP return.
        logits_divisor: the logits are divided by it.
        tie_word_embeddings: the head's weight is the embedding's.
        windows: by layer, a query sees itself and window - 1 tokens before it; None sees all.
        ropes: by layer; None rotates nothing.
        names: of the tensors in the checkpoint.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    pre_norms: bool
    post_norms: bool
    parallel_residual: bool
    qk_norm: QKNorm
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: Activation
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits_divisor: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig | None, ...]
    moe: MoEConfig | None
    names: WeightNames

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts in the place of an MLP."""
        return self.moe is not None and self.moe.sparse[layer]
