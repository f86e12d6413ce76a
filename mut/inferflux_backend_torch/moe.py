"""Mixture of experts: a router sends each token through a few of many MLPs (arXiv 1701.06538, 2101.03961)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.linear import Linear
from inferflux_backend_torch.model import MLP
from inferflux_backend_torch.ops import Activation, TorchOps


class Experts(Protocol):
    """All experts of a layer."""

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """Run each expert on its rows.

        Args:
            x: [N, H], the rows of expert 0, then those of expert 1, and so on.
            counts: [E] int64, rows of each expert.

        Returns:
            [N, H].
        """
        ...


class LoopedExperts:
    """One expert after the other, those without rows left out. Waits for the device to know the counts."""

    def __init__(self, ops: TorchOps, gate_up: Sequence[Linear], down: Sequence[Linear], activation: Activation) -> None:
        self._experts = [MLP(ops, *products, activation) for products in zip(gate_up, down, strict=True)]

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()
        parts = zip(self._experts, torch.split(x, sizes), sizes, strict=True)
        return torch.cat([expert(rows) for expert, rows, size in parts if size])


class GroupedExperts:
    """All experts in one product each way: nothing waits for the device, so a CUDA graph can hold it.

    Args:
        gate_up: [E, 2 I, H].
        down: [E, H, I].
    """

    def __init__(self, ops: TorchOps, gate_up: Tensor, down: Tensor, activation: Activation) -> None:
        self._act_mul = ops.act_mul
        self._gate_up = gate_up.transpose(1, 2)
        self._down = down.transpose(1, 2)
        self._activation = activation

    @staticmethod
    def can_run(gate_up: Tensor, down: Tensor) -> bool:
        """Whether this torch has the product for weights like these. It wants bfloat16 and rows of whole 16 bytes."""
        aligned = all(size % 8 == 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
        return hasattr(torch, "_grouped_mm") and gate_up.is_cuda and gate_up.dtype == torch.bfloat16 and aligned

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        x = torch._grouped_mm(x, self._gate_up, offs=ends)
        return torch._grouped_mm(self._act_mul(x, self._activation), self._down, offs=ends)


class SharedExpert:
    """The expert that all tokens go through, behind a sigmoid gate (Qwen 2 MoE). gate: [1, H]."""

    def __init__(self, mlp: MLP, gate: Tensor) -> None:
        self._mlp = mlp
        self._gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        return self._mlp(x).mul_(functional.linear(x, self._gate).sigmoid_())


class MixtureOfExperts:
    """Takes the place of a layer's MLP: [T, H] -> [T, H].

    Args:
        router: [E, H].
        experts: of the layer.
        shared: added for every token; None without.
        top_k: experts of each token.
        norm_topk_prob: their weights are scaled to sum to 1.
    """

    def __init__(
        self, router: Tensor, experts: Experts, shared: SharedExpert | None, *, top_k: int, norm_topk_prob: bool
    ) -> None:
        self._router = router
        self._experts = experts
        self._shared = shared
        self._top_k = top_k
        self._norm_topk_prob = norm_topk_prob

    def __call__(self, x: Tensor) -> Tensor:
        tokens, top_k = x.shape[0], self._top_k
        weights, chosen = functional.linear(x, self._router).softmax(-1, dtype=torch.float32).topk(top_k, -1)
        if self._norm_topk_prob:
            weights /= weights.sum(-1, keepdim=True)
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.zeros(self._router.shape[0], dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        sorted_rows = self._experts(x.index_select(0, order // top_k), counts)
        rows = torch.empty_like(sorted_rows).index_copy_(0, order, sorted_rows).view(tokens, top_k, -1)
        mixed = (weights.to(x.dtype).unsqueeze(1) @ rows).squeeze(1)
        return mixed if self._shared is None else mixed.add_(self._shared(x))
