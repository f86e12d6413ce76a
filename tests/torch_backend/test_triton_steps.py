"""Inputs of a step made on the device, interpreted, against those made on the host."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the torch backend is not installed")

import torch

from inferflux_backend_torch.graphs import DecodeGraphs, NoRecorder
from inferflux_backend_torch.inputs import StepInputs
from inferflux_backend_torch.steps import HostSteps
from inferflux_core.engine.types import PagedOps, Row
from torch_backend.triton_interpreter import isolate, triton_steps

# Without shrinking, which takes minutes in the interpreter.
_INTERPRETED = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
_CPU = torch.device("cpu")
_TENSORS = ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "logits_indices")


def _row(slot: int, start: int, tokens: list[int] | None, blocks: tuple[int, ...] = (), sample: bool = True) -> Row:
    n = 1 if tokens is None else len(tokens)
    return Row(slot=slot, start=start, n=n, tokens=tokens, n_draft=0, sample=sample, kv=PagedOps(blocks))


def _assert_equal(ours: StepInputs, theirs: StepInputs) -> None:
    for name in _TENSORS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    width = theirs.block_table.shape[1]
    used = torch.zeros_like(ours.block_table)
    for row, length in enumerate(theirs.host_seq_lens):
        blocks = -(-length // 8)
        used[row, :blocks] = theirs.block_table[row, :blocks]
    assert torch.equal(ours.block_table, used)
    assert width <= used.shape[1]
    for name in ("num_decodes", "max_query_len", "max_seq_len", "host_query_start", "host_seq_lens"):
        assert getattr(ours, name) == getattr(theirs, name), name


@settings(_INTERPRETED, max_examples=15)
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([3, 20, 400]))
def test_steps_are_the_host_s(seed: int, chunk: int) -> None:
    """Sequences come, go on by chunks or one token, and leave; slots are used again."""
    chance = random.Random(seed)
    ours, theirs = triton_steps.DeviceSteps(4, 900, 8, _CPU), HostSteps(4, 900, 8, _CPU)
    lengths: dict[int, int] = {}
    free = list(range(1, 2000))
    for _ in range(5):
        rows = []
        for slot in chance.sample(range(4), chance.randint(1, 4)):
            if slot in lengths and (chance.random() < 0.2 or lengths[slot] > 400):
                del lengths[slot]
            if slot not in lengths:
                ours.start(slot)
                theirs.start(slot)
            start = lengths.get(slot, 0)
            n = 1 if start and chance.random() < 0.5 else chance.randint(1, chunk)
            held = -(-start // 8)
            blocks = tuple(free.pop() for _ in range(-(-(start + n) // 8) - held))
            lengths[slot] = start + n
            rows.append(_row(slot, start, [chance.randrange(1000) for _ in range(n)], blocks))
            rows[-1].n_draft = chance.choice([0, n - 1, chance.randrange(n)])
        rows.sort(key=lambda row: row.n > 1)
        sampled = chance.sample(range(len(rows)), chance.randint(0, len(rows)))
        _assert_equal(ours.inputs(rows, sampled), theirs.inputs(rows, sampled))


def test_tokens_that_the_host_has_not_seen() -> None:
    steps = triton_steps.DeviceSteps(4, 64, 8, _CPU)
    for slot in (1, 3):
        steps.start(slot)
    rows = [_row(3, 0, [7], (5,)), _row(1, 0, [8, 9], (6,)), _row(0, 0, [1, 2], (4,), sample=False)]
    steps.inputs(rows, [1, 0])  # slot 1 is sampled first
    steps.remember(torch.tensor([111, 333]))
    assert steps.last_token.tolist() == [0, 111, 0, 333]
    inputs = steps.inputs([_row(1, 2, None), _row(3, 1, None), _row(0, 2, [5, 6])], [0, 1, 2])
    assert inputs.token_ids.tolist() == [111, 333, 5, 6]
    assert inputs.slot_mapping.tolist() == [6 * 8 + 2, 5 * 8 + 1, 4 * 8 + 2, 4 * 8 + 3]
    steps.remember(torch.tensor([112, 334, 55]))
    assert steps.last_token.tolist() == [55, 112, 0, 334]


def test_rows_without_drafts_go_on_beside_others() -> None:
    """The host knows what a row with drafts goes on with; of the others it need not."""
    steps = triton_steps.DeviceSteps(4, 64, 8, _CPU)
    for slot in range(3):
        steps.start(slot)
    drafted = Row(2, 0, 4, [1, 2, 3, 4], 3, True, PagedOps((7,)))
    inputs = steps.inputs([_row(0, 0, [5], (5,)), _row(1, 0, [6], (6,)), drafted], [2, 1, 0])
    assert inputs.logits_indices.tolist() == [2, 3, 4, 5, 1, 0]
    steps.remember(torch.tensor([11, 12, 13, 14, 20, 30]))
    inputs = steps.inputs([_row(0, 1, None), _row(1, 1, None), _row(2, 2, [12], ())], [0, 1, 2])
    assert inputs.token_ids.tolist() == [30, 20, 12]
    assert inputs.slot_mapping.tolist() == [5 * 8 + 1, 6 * 8 + 1, 7 * 8 + 2]
    steps.remember(torch.tensor([31, 21, 13]))
    assert steps.last_token[:3].tolist() == [31, 21, 13]


def test_into_a_graph_s_inputs_with_padding() -> None:
    """As DecodeGraphs itself would pad, whatever the step before left behind."""
    steps, host = triton_steps.DeviceSteps(12, 64, 8, _CPU), HostSteps(12, 64, 8, _CPU)
    graphs = DecodeGraphs(
        lambda inputs: inputs.token_ids[inputs.logits_indices],
        max_num_seqs=12,
        max_model_len=64,
        block_size=8,
        device=_CPU,
        recorder=NoRecorder(),
    )
    chance = random.Random(3)
    for count in (12, 3, 1, 5, 8, 2):
        rows = []
        for slot in range(count):
            for each in (steps, host):
                each.start(slot)
            rows.append(_row(slot, 9, [chance.randrange(1000)], (chance.randrange(1, 99), chance.randrange(1, 99))))
        sampled = chance.sample(range(count), max(1, count - 1))
        plain = host.inputs(rows, sampled)
        static = graphs.inputs_for(count, 10)
        assert static is not None
        inputs = steps.inputs(rows, sampled, static)
        assert inputs is static
        for name in _TENSORS:
            wanted, got = getattr(plain, name), getattr(inputs, name)
            assert torch.equal(got[: len(wanted)], wanted), name
        behind = slice(count, inputs.num_seqs)
        for name in ("token_ids", "positions", "slot_mapping", "block_table"):
            assert not getattr(inputs, name)[behind].any(), name
        assert inputs.seq_lens[behind].tolist() == [1] * (inputs.num_seqs - count)
        assert inputs.query_start.tolist() == list(range(inputs.num_seqs + 1))
        assert int(inputs.logits_indices.max()) < count
        expected = torch.tensor([row.tokens[0] for row in rows if row.tokens])[sampled]
        assert torch.equal(graphs.run(inputs)[: len(sampled)], expected)


isolate(globals())
