"""The CPU kernels in C mean what `TorchOps` defines, in both types, at every level of instruction set."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402  # after the skip
from hypothesis import strategies as st  # noqa: E402

from inferflux_backend_torch.native_kernels import BUILT  # noqa: E402
from inferflux_backend_torch.native_ops import NativeOps, native_ops  # noqa: E402
from inferflux_backend_torch.ops import TorchOps  # noqa: E402
from torch_backend.attention_case import AttentionCase, build  # noqa: E402

if not BUILT:
    # An optional extension that does not compile is left out silently: that is for machines without a compiler only.
    assert shutil.which("cc") is None, "the C kernels do not compile; `pip install -v -e inferflux-backend-torch` shows why"
    pytest.skip("the C kernels were not built: there is no compiler", allow_module_level=True)

LEVELS = (0, 1, 2)
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}
dtypes = st.sampled_from((torch.float32, torch.bfloat16))
levels = st.sampled_from(LEVELS)

# (computed before, tokens now): single tokens, small and large chunks, deep and from the start; over a segment of the kernel.
_SEQUENCES = st.lists(
    st.tuples(st.sampled_from((0, 1, 15, 16, 63, 255, 256, 257, 600)), st.sampled_from((1, 2, 5, 8, 9, 40, 49))),
    min_size=1,
    max_size=5,
)


@pytest.fixture(autouse=True, scope="module")
def _several_threads() -> Iterator[None]:
    """Elsewhere tests have one; these kernels divide their work, and must not get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    kv_heads, group = draw(st.sampled_from(((3, 3), (1, 8), (2, 1), (2, 4))))
    head_dim = draw(st.sampled_from((8, 20, 45, 64, 80, 128)))
    return AttentionCase(
        sequences=tuple(sorted(draw(_SEQUENCES), key=lambda s: s[1] > 1)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=draw(st.sampled_from((8, 16, 64))),
        window=draw(st.sampled_from((None, 1, 7, 300))),
        softcap=draw(st.sampled_from((None, 5.0, 50.0))),
        rotary_dim=draw(st.sampled_from((0, 4, head_dim // 2 * 2))),
        q_norm=draw(st.booleans()),
        k_norm=draw(st.booleans()),
        dtype=draw(dtypes),
        seed=draw(st.integers(0, 99)),
    )


def close(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(cases(), levels)
def test_rotation_cache_and_attention(case: AttentionCase, level: int) -> None:
    ours, expected = build(case), build(case)
    native, reference = NativeOps(case.dtype, level), TorchOps()
    native.rope_and_cache(ours.qkv, ours.layer, ours.inputs, ours.cache)
    reference.rope_and_cache(expected.qkv, expected.layer, expected.inputs, expected.cache)
    close(ours.qkv[:, : ours.layer.q_size], expected.qkv[:, : ours.layer.q_size], case.dtype)
    close(ours.cache.data, expected.cache.data, case.dtype)
    close(
        native.attention(ours.qkv, ours.layer, ours.inputs, ours.cache),
        reference.attention(expected.qkv, expected.layer, expected.inputs, expected.cache),
        case.dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "count"), [(600, 8), (200, 31), (300, 24)])
def test_drafts_are_rounded_as_single_tokens_are(dtype: torch.dtype, before: int, count: int) -> None:
    """So that verified tokens are those of plain decoding, to the bit, as far as products of matrices are."""
    step = build(AttentionCase(sequences=((before, count),), head_dim=64, dtype=dtype, seed=3))
    native = NativeOps(dtype)
    native.rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
    together = native.attention(step.qkv, step.layer, step.inputs, step.cache)
    for i in range(count):
        inputs = replace(step.inputs, host_query_start=[0, 1], host_seq_lens=[before + i + 1])
        alone = native.attention(step.qkv[i : i + 1].clone(), step.layer, inputs, step.cache)
        assert torch.equal(alone, together[i : i + 1])


def test_odd_heads_of_bfloat16_are_normed_in_float32() -> None:
    """The kernel wants an even head size there; what takes its place must not read float32 rows as bfloat16."""
    case = AttentionCase(sequences=((0, 1),), head_dim=45, q_norm=True, k_norm=True, dtype=torch.bfloat16)
    ours, expected = build(case), build(case)
    NativeOps(case.dtype).rope_and_cache(ours.qkv, ours.layer, ours.inputs, ours.cache)
    TorchOps().rope_and_cache(expected.qkv, expected.layer, expected.inputs, expected.cache)
    assert torch.equal(ours.qkv, expected.qkv)
    close(ours.cache.data, expected.cache.data, case.dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from((1, 7, 16, 72, 576)), dtypes, levels, st.integers(0, 99))
def test_norms_and_activations(rows: int, width: int, dtype: torch.dtype, level: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(width, generator=generator)
    native, reference = NativeOps(dtype, level), TorchOps()
    close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    ours, expected = residual.clone(), residual.clone()
    close(native.add_rms_norm(x, ours, weight, 1e-5), reference.add_rms_norm(x, expected, weight, 1e-5), dtype)
    assert torch.equal(ours, expected)
    gate_up = 4 * torch.randn(rows, 2 * width, generator=generator).to(dtype)
    for activation in ("silu", "gelu_tanh", "gelu", "relu"):
        close(native.act_mul(gate_up, activation), reference.act_mul(gate_up, activation), dtype)


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_activations(level: int) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -60.0, -1e-30, 0.0, 60.0, 88.0, 200.0, 1e30]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), 1)
    for activation in ("silu", "gelu_tanh"):
        ours = NativeOps(torch.float32, level).act_mul(gate_up, activation)
        expected = TorchOps().act_mul(gate_up, activation)
        # Below -60 the factor is 1e-26 where it should be less; what is multiplied with it stays far from mattering.
        torch.testing.assert_close(ours[:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(level: int) -> None:
    # Sums exactly between two bfloat16 numbers: 1 + 2**-8 goes down to the even one, 1 + 3 * 2**-8 up.
    residual = torch.tensor([[1.0, 1.0, torch.nan, torch.inf]]).bfloat16()
    x = torch.tensor([[2.0**-8, 3 * 2.0**-8, 1.0, 1.0]]).bfloat16()
    NativeOps(torch.bfloat16, level).add_rms_norm(x, residual, torch.ones(4), 1e-5)
    assert residual[0, :2].tolist() == [1.0, 1.015625]
    assert residual[0, 2].isnan()
    assert residual[0, 3].isinf()


def test_a_strided_input_is_read_by_its_stride() -> None:
    wide = torch.randn(5, 12)
    weight = torch.rand(4)
    close(
        NativeOps(torch.float32).rms_norm(wide[:, 4:8], weight, 1e-6),
        TorchOps().rms_norm(wide[:, 4:8], weight, 1e-6),
        torch.float32,
    )


def test_heads_too_large_for_the_kernels_go_through_torch() -> None:
    case = AttentionCase(sequences=((3, 1), (0, 9)), heads=2, kv_heads=1, head_dim=520, rotary_dim=8)
    ours, expected = build(case), build(case)
    native, reference = NativeOps(torch.float32), TorchOps()
    for ops, step in ((native, ours), (reference, expected)):
        ops.rope_and_cache(step.qkv, step.layer, step.inputs, step.cache)
    assert torch.equal(
        native.attention(ours.qkv, ours.layer, ours.inputs, ours.cache),
        reference.attention(expected.qkv, expected.layer, expected.inputs, expected.cache),
    )


def test_types_that_the_kernels_do_not_know_go_through_torch() -> None:
    assert type(native_ops(torch.float16, torch.float16)) is TorchOps
    assert type(native_ops(torch.bfloat16, torch.float32)) is TorchOps
    assert type(native_ops(torch.bfloat16, torch.bfloat16)) is NativeOps
