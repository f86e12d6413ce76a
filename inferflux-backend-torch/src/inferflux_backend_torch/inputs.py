"""What a forward pass works on, beside the weights: the tokens of one step, and the cache they read and write."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class StepInputs:
    """The flat tokens of one step, sequence after sequence, those with a single token first.

        sequence        0   1   2       3           4
        tokens        | a | b | c | d e f g h | i j k l m n |
        query_start   0   1   2   3           8             14

    T tokens of B sequences; M is the width of the block table. All tensors lie on the model's device.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, index of each token in its own sequence.
        slot_mapping: [T] int64, where its key and value go: block * block_size + offset. Padding goes to block 0.
        query_start: [B + 1] int32, first token of each sequence, and T.
        seq_lens: [B] int32, tokens of each sequence after this step: cached ones and those of this step.
        block_table: [B, M] int32, blocks of each sequence; entries past its length are 0.
        logits_indices: [R] int64, tokens whose logits are wanted.
        num_decodes: leading sequences with one token each.
        max_query_len, max_seq_len: the longest of this step, known to the host.
        host_query_start, host_seq_lens: the same as the tensors, on the host: CPU attention goes by them.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    logits_indices: Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    host_query_start: list[int]
    host_seq_lens: list[int]

    @property
    def num_seqs(self) -> int:
        return len(self.host_seq_lens)


class KVCache:
    """Keys and values of all layers, in blocks that core's PagedKVCacheManager hands out.

    Attributes:
        data: [layers, 2, blocks, block_size, kv_heads, head_dim]; index 0 of the second dimension is keys, 1 values.
        keys, values: by layer, each [blocks, block_size, kv_heads, head_dim].
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        # Zeros, not empty: padded entries of a batch are masked, but 0 * NaN would not be.
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        if device.type == "cpu":
            # The system gives numpy's zeros memory when they are first written; torch's would take all of it now.
            memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            self.data = torch.from_numpy(memory).view(dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [self.data[layer, 0] for layer in range(num_layers)]
        self.values = [self.data[layer, 1] for layer in range(num_layers)]
