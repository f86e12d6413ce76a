"""The operations of a decoder on GPUs, by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from inferflux_backend_torch import triton_attention, triton_kernels
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import Activation, AttentionLayer, TorchOps


class TritonOps(TorchOps):
    """`TorchOps` with one kernel launch, at most three for attention, where torch needs many.

    Args:
        num_sms: multiprocessors of the GPU, by which attention splits long contexts; None asks the current device.
    """

    def __init__(self, num_sms: int | None = None) -> None:
        self._num_sms = num_sms or torch.cuda.get_device_properties().multi_processor_count

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_kernels.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_kernels.rms_norm(x, weight, eps, residual)

    def act_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return triton_kernels.act_mul(gate_up, activation)

    def rope_and_cache(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> None:
        triton_kernels.rope_and_cache(qkv, layer, inputs, cache)

    def attention(self, qkv: Tensor, layer: AttentionLayer, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Decodes and chunks in a launch each, as their tiles differ; all in one where `num_decodes` is 0."""
        out = qkv.new_empty(qkv.shape[0], layer.q_size)
        decodes = inputs.num_decodes
        parts = ((0, decodes, 1), (decodes, inputs.num_seqs, inputs.max_query_len))
        for first, last, max_query_len in parts:
            if first < last:
                triton_attention.paged_attention(
                    qkv,
                    out,
                    layer,
                    inputs,
                    cache,
                    self._num_sms,
                    first_seq=first,
                    last_seq=last,
                    max_query_len=max_query_len,
                )
        return out
