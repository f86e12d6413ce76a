"""Routing and experts against a plain double loop."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers builds the models")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.linear import Linear, PlainLinear
from inferflux_backend_torch.model import MLP
from inferflux_backend_torch.moe import Experts, GroupedExperts, LoopedExperts, MixtureOfExperts, SharedExpert
from inferflux_backend_torch.ops import TorchOps
from torch_backend.reference_step import ReferenceRunner, load
from torch_backend.tiny_models import tiny_model

HIDDEN, SIZE = 16, 8  # the grouped product wants rows of whole 16 bytes


def weights(experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Router [E, H], gate and up [E, 2 I, H], down [E, H, I]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((experts, HIDDEN), (experts, 2 * SIZE, HIDDEN), (experts, HIDDEN, SIZE))
    router, gate_up, down = (torch.randn(shape, generator=generator) * 0.5 for shape in shapes)
    return router, gate_up, down


def looped(gate_up: Tensor, down: Tensor) -> LoopedExperts:
    return LoopedExperts(TorchOps(), [PlainLinear(w) for w in gate_up], [PlainLinear(w) for w in down], "silu")


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (functional.silu(gate) * up)


def mixed(x: Tensor, experts: int, top_k: int, norm_topk_prob: bool) -> Tensor:
    """What the layer returns for one token [H]."""
    router, gate_up, down = weights(experts)
    probabilities = (router @ x).softmax(0)
    chosen = sorted(range(experts), key=lambda e: -float(probabilities[e]))[:top_k]
    total = float(probabilities[chosen].sum()) if norm_topk_prob else 1.0
    return sum((probabilities[e] / total * expert(x, gate_up[e], down[e]) for e in chosen), torch.zeros(HIDDEN))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 12),
    norm_topk_prob=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_token_goes_through_its_experts(tokens: int, experts: int, top_k: int, norm_topk_prob: bool, seed: int) -> None:
    top_k = min(top_k, experts)
    router, gate_up, down = weights(experts)
    layer = MixtureOfExperts(router, looped(gate_up, down), None, top_k=top_k, norm_topk_prob=norm_topk_prob)
    x = torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([mixed(row, experts, top_k, norm_topk_prob) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [2, 2, 2, 3]])
def test_the_grouped_product_equals_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    _, gate_up, down = weights(len(counts))
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    x = torch.randn((sum(counts), HIDDEN), generator=torch.Generator().manual_seed(1)).to(dtype)
    grouped = GroupedExperts(TorchOps(), gate_up, down, "silu")(x, torch.tensor(counts))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(grouped, looped(gate_up, down)(x, torch.tensor(counts)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("hidden", "size", "dtype"),
    [(16, 9, torch.bfloat16), (12, 8, torch.bfloat16), (16, 8, torch.float32), (16, 8, torch.float16)],
)
def test_the_grouped_product_is_left_to_weights_that_it_takes(hidden: int, size: int, dtype: torch.dtype) -> None:
    weights = (torch.empty((2, 2 * size, hidden), dtype=dtype), torch.empty((2, hidden, size), dtype=dtype))
    assert not GroupedExperts.can_run(*weights)


def test_experts_without_rows_are_not_run() -> None:
    ran: list[int] = []

    def recorded(index: int) -> Linear:
        def product(x: Tensor) -> Tensor:
            ran.append(index)
            return x

        return product

    class Halved:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.cat((x, x), -1)

    products = [recorded(index) for index in range(4)]
    experts: Experts = LoopedExperts(TorchOps(), [Halved()] * 4, products, "silu")
    experts(torch.ones(3, HIDDEN), torch.tensor([1, 0, 2, 0]))
    assert ran == [0, 2]


def test_the_shared_expert_is_added_behind_its_gate() -> None:
    router, gate_up, down = weights(3)
    gate = torch.linspace(-1, 1, HIDDEN).unsqueeze(0)
    shared = SharedExpert(MLP(TorchOps(), PlainLinear(gate_up[0]), PlainLinear(down[0]), "silu"), gate)
    x = torch.randn((5, HIDDEN), generator=torch.Generator().manual_seed(1))
    without = MixtureOfExperts(router, looped(gate_up, down), None, top_k=2, norm_topk_prob=False)(x)
    layer = MixtureOfExperts(router, looped(gate_up, down), shared, top_k=2, norm_topk_prob=False)
    added = torch.stack([torch.sigmoid(gate[0] @ row) * expert(row, gate_up[0], down[0]) for row in x])
    torch.testing.assert_close(layer(x), without + added, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # of transformers
def test_every_expert_is_made_by_the_factory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """So that what quantizes weights quantizes experts."""
    made: list[tuple[int, ...]] = []

    def recorded(weight: Tensor, bias: Tensor | None = None) -> PlainLinear:
        made.append(tuple(weight.shape))
        return PlainLinear(weight, bias)

    mixtral = tiny_model("mixtral", tmp_path_factory.getbasetemp() / "tiny")
    decoder = load(mixtral.folder, linear=recorded)
    assert made.count((202, 72)) == made.count((72, 101)) == 2 * 5
    assert ReferenceRunner(decoder).step({"a": [3]})["a"].isfinite().all()
