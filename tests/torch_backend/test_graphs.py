"""Sizes, padding and replays of decode graphs, with a recorder that repeats the call on the graph's own tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the torch backend is not installed")

import torch

from inferflux_backend_torch.graphs import DecodeGraphs, NoRecorder, graph_sizes
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import TorchOps
from torch_backend.attention_case import AttentionCase, AttentionStep, build

_CPU = torch.device("cpu")


class CountingRecorder:
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
        self.recorded += 1
        run()

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def _graphs(
    forward: Callable[[StepInputs], torch.Tensor],
    max_num_seqs: int = 16,
    max_model_len: int = 256,
    query_len: int = 1,
    recorder: CountingRecorder | None = None,
) -> DecodeGraphs:
    return DecodeGraphs(
        forward,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=16,
        device=_CPU,
        query_len=query_len,
        recorder=recorder or NoRecorder(),
    )


def _layer_forward(step: AttentionStep, seen: list[int]) -> Callable[[StepInputs], torch.Tensor]:
    """A model of one attention layer whose QKV is a function of token and position, so that rows can be told apart."""
    width = step.qkv.shape[1]
    table = torch.randn(1000, width, generator=torch.Generator().manual_seed(9))

    def forward(inputs: StepInputs) -> torch.Tensor:
        seen.append(inputs.num_seqs)
        qkv = table[inputs.token_ids] + 0.01 * inputs.positions.unsqueeze(1)
        ops = TorchOps()
        # The oracle goes by the host's lists, which a graph does not fill.
        host = _with_host_lists(inputs)
        ops.rope_and_cache(qkv, step.layer, host, step.cache)
        return ops.attention(qkv, step.layer, host, step.cache)[inputs.logits_indices]

    return forward


def _with_host_lists(inputs: StepInputs) -> StepInputs:
    return StepInputs(
        **{name: getattr(inputs, name) for name in inputs.__slots__ if not name.startswith("host_")},
        host_query_start=inputs.query_start.tolist(),
        host_seq_lens=inputs.seq_lens.tolist(),
    )


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (256, [1, 2, 4, *range(8, 257, 8)]),
        (400, [1, 2, 4, *range(8, 257, 8), 320, 384, 400]),
        (2000, [1, 2, 4, *range(8, 257, 8), 320, 384, 448, 512]),
    ],
)
def test_sizes(max_num_seqs: int, expected: list[int]) -> None:
    assert graph_sizes(max_num_seqs) == expected


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=12), min_size=1, max_size=4),
    query_len=st.sampled_from([1, 3]),
    seed=st.integers(0, 100),
)
def test_padded_steps_give_what_plain_ones_give(steps: list[list[int]], query_len: int, seed: int) -> None:
    """Steps of different sizes after each other in the same tensors; nothing but the null block is written beside them."""
    now: list[AttentionStep] = []
    seen: list[int] = []
    graphs = _graphs(lambda inputs: _layer_forward(now[-1], seen)(inputs), query_len=query_len)
    for computed in steps:
        case = AttentionCase(sequences=tuple((c, query_len) for c in computed), seed=seed)
        plain, padded = build(case), build(case)
        plain.inputs.token_ids.random_(1000, generator=torch.Generator().manual_seed(seed))
        padded.inputs.token_ids.copy_(plain.inputs.token_ids)
        now.append(padded)
        expected = _layer_forward(plain, [])(plain.inputs)
        out = graphs.run(padded.inputs)
        torch.testing.assert_close(out, expected)
        assert seen[-1] == next(size for size in graph_sizes(16) if size >= len(computed))
        torch.testing.assert_close(padded.cache.data[:, :, 1:], plain.cache.data[:, :, 1:], equal_nan=True)


def test_one_graph_for_steps_after_each_other() -> None:
    recorder = CountingRecorder()
    graphs = _graphs(lambda inputs: inputs.token_ids[inputs.logits_indices] * 10, recorder=recorder)
    graphs.warm_up()
    assert (recorder.recorded, recorder.replayed) == (5, 5)  # 1, 2, 4, 8, 16
    for count in (5, 7, 2, 16, 3):
        step = build(AttentionCase(sequences=((9, 1),) * count))
        step.inputs.token_ids.copy_(torch.arange(count) + 100)
        assert graphs.run(step.inputs).tolist() == [10 * (i + 100) for i in range(count)]
    assert (recorder.recorded, recorder.replayed) == (5, 10)


def test_largest_first_and_the_rest_when_needed() -> None:
    sizes: list[int] = []

    def forward(inputs: StepInputs) -> torch.Tensor:
        sizes.append(inputs.num_seqs)
        return inputs.token_ids[inputs.logits_indices]

    recorder = CountingRecorder()
    graphs = _graphs(forward, max_num_seqs=256, recorder=recorder)
    graphs.warm_up()
    assert recorder.recorded == 8
    assert sizes[::2] == [256, 32, 24, 16, 8, 4, 2, 1]
    for _ in range(2):
        graphs.run(build(AttentionCase(sequences=((3, 1),) * 33)).inputs)
    assert recorder.recorded == 9
    assert sizes[-1] == 40


def test_contexts_have_graphs_of_their_own() -> None:
    longest: list[int] = []

    def forward(inputs: StepInputs) -> torch.Tensor:
        longest.append(inputs.max_seq_len)
        return inputs.token_ids[inputs.logits_indices]

    graphs = _graphs(forward, max_model_len=40000)
    assert graphs.contexts == [4096, 32768, 40000]
    assert _graphs(forward, max_model_len=4096).contexts == [4096]
    for length in (5, 4096, 4097, 40000):
        inputs = graphs.inputs_for(2, length)
        assert inputs is not None
        graphs.run(inputs)
    assert longest[1::2] == [4096, 32768, 40000]  # recorded once each, with a run before and one after
    assert len(longest) == 7


@pytest.mark.parametrize(
    "sequences",
    [
        ((3, 1),) * 17,  # more than the largest graph
        ((3, 1), (3, 2)),  # a chunk among decodes
        ((3, 2), (3, 2)),
        ((300, 1),),  # longer than any context
    ],
)
def test_what_fits_no_graph_runs_without_one(sequences: tuple[tuple[int, int], ...]) -> None:
    recorder = CountingRecorder()
    seen: list[StepInputs] = []

    def forward(inputs: StepInputs) -> torch.Tensor:
        seen.append(inputs)
        return inputs.token_ids[inputs.logits_indices]

    inputs = build(AttentionCase(sequences=sequences)).inputs
    _graphs(forward, recorder=recorder).run(inputs)
    assert recorder.recorded == 0
    assert seen == [inputs]


def test_nothing_stays_of_the_step_before() -> None:
    graphs = _graphs(lambda inputs: inputs.token_ids[inputs.logits_indices])
    graphs.run(build(AttentionCase(sequences=((100, 1),) * 8)).inputs)
    inputs = build(AttentionCase(sequences=((20, 1),) * 5)).inputs
    graphs.run(inputs)
    static = graphs.inputs_for(5, 21)
    assert static is not None
    assert torch.equal(static.block_table[:5, :2], inputs.block_table)
    assert not static.block_table[:, 2:].any()
    assert not static.block_table[5:].any()
    assert static.seq_lens.tolist() == [21] * 5 + [1] * 3
    assert static.positions.tolist() == [20] * 5 + [0] * 3
    assert static.slot_mapping[5:].tolist() == [0] * 3
    assert static.query_start.tolist() == list(range(9))


def test_filled_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _graphs(lambda inputs: inputs.token_ids[inputs.logits_indices])
    monkeypatch.setattr(graphs, "_copy", None)
    inputs = graphs.inputs_for(3, 10)
    assert inputs is not None
    assert inputs.num_seqs == inputs.num_decodes == 4
    inputs.token_ids[:3] = torch.tensor([5, 6, 7])
    assert graphs.run(inputs)[:3].tolist() == [5, 6, 7]
    assert inputs.token_ids[:3].tolist() == [5, 6, 7]


def test_padding_reads_and_writes_the_null_block() -> None:
    """Of a cache whose other blocks would be ruined."""
    step = build(AttentionCase(sequences=((3, 2),) * 3))
    step.cache.data.fill_(7)
    graphs = _graphs(_layer_forward(step, []), query_len=2)
    graphs.warm_up()
    assert bool((step.cache.data[:, :, 1:] == 7).all())
    assert bool((step.cache.data[1, :, 0, :2] != 7).all())
    assert isinstance(step.cache, KVCache)
