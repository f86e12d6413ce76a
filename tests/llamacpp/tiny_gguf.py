"""A model of random weights that llama.cpp runs in no time: two layers in float32 that use all of their context."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inferflux_core.interfaces import ModelFiles
from llamacpp.gguf_writer import ARRAY, F32, I32, STRING, U32, Array, Model, Tensor

CONTROL, BYTE, UNKNOWN = 3, 6, 2
VOCABULARY = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
FIRST_BYTE = 3  # tokens before it are no text
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 64, 4, 2, 16, 96, 2


def write_tiny(path: Path, *, sliding_window: int | None = None) -> ModelFiles:
    """Write it as one file; the weights are always the same.

    Args:
        sliding_window: tokens that five layers of six see; the model is a Gemma 3 of six layers then.
    """
    arch, layers = ("llama", LAYERS) if sliding_window is None else ("gemma3", 6)
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> Tensor:
        spread = 1.3 * shape[0] ** -0.5  # large enough that every part shows in the logits
        weights = rng.standard_normal(shape[::-1]) * spread if len(shape) > 1 else 1 + 0.3 * rng.standard_normal(shape)
        return Tensor(f"{name}.weight", shape, data=weights.astype("<f4").tobytes())

    tensors = [tensor("token_embd", HIDDEN, len(VOCABULARY))]
    for layer in range(layers):
        tensors += [
            tensor(f"blk.{layer}.attn_norm", HIDDEN),
            tensor(f"blk.{layer}.attn_q", HIDDEN, HEADS * HEAD_DIM),
            tensor(f"blk.{layer}.attn_k", HIDDEN, KV_HEADS * HEAD_DIM),
            tensor(f"blk.{layer}.attn_v", HIDDEN, KV_HEADS * HEAD_DIM),
            tensor(f"blk.{layer}.attn_output", HEADS * HEAD_DIM, HIDDEN),
            tensor(f"blk.{layer}.ffn_norm", HIDDEN),
            tensor(f"blk.{layer}.ffn_gate", HIDDEN, FEED_FORWARD),
            tensor(f"blk.{layer}.ffn_up", HIDDEN, FEED_FORWARD),
            tensor(f"blk.{layer}.ffn_down", FEED_FORWARD, HIDDEN),
        ]
        if sliding_window is not None:
            tensors += [
                tensor(f"blk.{layer}.attn_q_norm", HEAD_DIM),
                tensor(f"blk.{layer}.attn_k_norm", HEAD_DIM),
                tensor(f"blk.{layer}.post_attention_norm", HIDDEN),
                tensor(f"blk.{layer}.post_ffw_norm", HIDDEN),
            ]
    tensors += [tensor("output_norm", HIDDEN), tensor("output", HIDDEN, len(VOCABULARY))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    metadata = {
        "general.architecture": (STRING, arch),
        "general.name": (STRING, "Tiny"),
        f"{arch}.context_length": (U32, 256),
        f"{arch}.embedding_length": (U32, HIDDEN),
        f"{arch}.block_count": (U32, layers),
        f"{arch}.feed_forward_length": (U32, FEED_FORWARD),
        f"{arch}.attention.head_count": (U32, HEADS),
        f"{arch}.attention.head_count_kv": (U32, KV_HEADS),
        f"{arch}.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        f"{arch}.rope.dimension_count": (U32, HEAD_DIM),
        f"{arch}.attention.key_length": (U32, HEAD_DIM),
        f"{arch}.attention.value_length": (U32, HEAD_DIM),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, Array(STRING, VOCABULARY)),
        "tokenizer.ggml.scores": (ARRAY, Array(F32, [0.0] * len(VOCABULARY))),
        "tokenizer.ggml.token_type": (ARRAY, Array(I32, types)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
    }
    if sliding_window is not None:
        metadata[f"{arch}.attention.sliding_window"] = (U32, sliding_window)
    Model(metadata=metadata, tensors=tensors).write(path)
    return ModelFiles(ref=str(path), format="gguf", paths=(str(path),))
