"""The fake backend one step ahead: it computes late, and notices when a step in flight loses what it uses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from inferflux_core.engine.types import KVOps, PagedOps, Row, SamplingParams, SchedulerOutput, SequenceInit, SequenceOps
from inferflux_core.interfaces import EngineConfig, Ticket
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_memory import FlightGuard
from inferflux_core.testing.fake_settings import FakeSettings

SIZE = 4


def row(slot: int, start: int, n: int, kv: KVOps, tokens: Sequence[int] | None = None) -> Row:
    return Row(slot, start, n, [97] * n if tokens is None else tokens, 0, True, kv)


def plan(*rows: Row, start: Sequence[int] = (), free: Sequence[int] = ()) -> SchedulerOutput:
    inits = [SequenceInit(slot, SamplingParams(max_tokens=9, temperature=0.0), [97], 1) for slot in start]
    return SchedulerOutput(0, list(rows), sum(r.n for r in rows), inits, list(free))


# --- what the guard allows --------------------------------------------------------------------------------------------


def test_a_sequence_goes_on_in_its_own_blocks_and_others_read_full_ones() -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 6, PagedOps([1, 2])), start=[0]))
    guard.collect()
    guard.launch(plan(row(0, 6, 1, PagedOps()), row(1, 4, 3, PagedOps([1, 3])), start=[1]))
    guard.launch(plan(row(0, 7, 1, PagedOps()), row(1, 7, 2, PagedOps([4])), row(2, 4, 2, PagedOps([1, 5])), start=[2]))


def test_a_stream_may_be_copied_while_its_sequence_goes_on_and_used_after_it_was_cleared() -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 6, SequenceOps(0, clear=(1, 2))), row(1, 0, 5, SequenceOps(1)), start=[0, 1]))
    guard.launch(plan(row(1, 5, 1, SequenceOps(1)), row(2, 4, 3, SequenceOps(2, copy_from=0, keep_len=4)), start=[2]))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "second"),
    [
        (2, row(1, 0, 3, PagedOps([2]))),  # writes what is being written
        (1, row(1, 0, 3, PagedOps([1]))),  # writes what is being read
        (2, row(1, 7, 1, PagedOps([9, 2]))),  # writes behind a prefix
        (2, row(1, 8, 1, PagedOps([1, 2, 7]))),  # reads what is being written
    ],
)
def test_a_block_in_flight_is_not_given_away(number: int, second: Row) -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 5, PagedOps([1, 2])), start=[0]))
    guard.collect()
    guard.launch(plan(row(0, 5, 1, PagedOps())))
    with pytest.raises(AssertionError, match=f"slots 1 and 0 both use {number}"):
        guard.launch(plan(second, start=[1]))


def test_a_block_may_be_given_away_after_the_collect() -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 5, PagedOps([1, 2])), start=[0]))
    guard.collect()
    guard.launch(plan(row(1, 0, 3, PagedOps([2])), start=[1]))


@pytest.mark.parametrize("ops", [SequenceOps(0, keep_len=0), SequenceOps(1, keep_len=0, clear=(0,))])
def test_a_stream_in_flight_is_not_given_away(ops: SequenceOps) -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 5, SequenceOps(0)), start=[0]))
    with pytest.raises(AssertionError, match="both use 0"):
        guard.launch(plan(row(1, 0, 3, ops), start=[1]))


@pytest.mark.parametrize(("free", "start"), [([0], []), ([], [0])])
def test_a_slot_in_flight_is_not_freed(free: list[int], start: list[int]) -> None:
    guard = FlightGuard(SIZE)
    guard.launch(plan(row(0, 0, 5, PagedOps([1, 2])), start=[0]))
    with pytest.raises(AssertionError, match="slot 0 was freed"):
        guard.launch(plan(row(1, 0, 3, PagedOps([3])), start=[1, *start], free=free))


# --- the runner -------------------------------------------------------------------------------------------------------


def runner(**settings: Any) -> FakeRunner:
    return FakeRunner(FakeSettings(**{"depth": 2, "block_size": SIZE, **settings}), EngineConfig(max_num_seqs=4))


def launched(made: FakeRunner, step: SchedulerOutput) -> Ticket:
    ticket = made.launch(step)
    made.sample(ticket, None)
    return ticket


def next_row(kv: KVOps) -> Row:
    return Row(0, 3, 1, None, 0, True, kv)


@pytest.mark.parametrize("ops", [PagedOps([1]), SequenceOps(0, keep_len=0)])
def test_a_row_without_tokens_takes_the_one_that_the_step_before_drew(ops: KVOps) -> None:
    layout = "paged" if isinstance(ops, PagedOps) else "sequence"
    more = PagedOps() if isinstance(ops, PagedOps) else SequenceOps(0)
    late, early = runner(layout=layout), runner(depth=1, layout=layout)
    first = early.collect(launched(early, plan(row(0, 0, 3, ops), start=[0])))
    second = early.collect(launched(early, plan(row(0, 3, 1, more, first.tokens[0]))))
    tickets = [launched(late, step) for step in (plan(row(0, 0, 3, ops), start=[0]), plan(next_row(more)))]
    assert [late.collect(ticket).tokens for ticket in tickets] == [first.tokens, second.tokens]


def test_nothing_can_be_read_before_it_is_collected() -> None:
    made = runner()
    ticket = launched(made, plan(row(0, 0, 3, PagedOps([1])), start=[0]))
    assert (made._memory.blocks, made._last_token) == ({}, {})
    assert made.collect(ticket).tokens == [[made._last_token[0][1]]]
    assert list(made._memory.blocks) == [1]


def test_a_token_that_the_step_before_did_not_draw_is_an_error() -> None:
    made = runner()
    made.collect(launched(made, plan(row(0, 0, 3, PagedOps([1])), start=[0])))
    made.collect(launched(made, plan(row(1, 0, 3, PagedOps([2])), start=[1])))
    with pytest.raises(AssertionError, match="sampled nothing for slot 0"):
        made.collect(launched(made, plan(next_row(PagedOps()))))


def test_a_token_of_the_slots_last_sequence_is_an_error() -> None:
    made = runner()
    made.collect(launched(made, plan(row(0, 0, 3, PagedOps([1])), start=[0])))
    with pytest.raises(AssertionError, match="nothing was sampled for slot 0 yet"):
        made.collect(launched(made, plan(next_row(PagedOps([2])), start=[0], free=[0])))


def test_steps_are_launched_sampled_and_collected_in_order() -> None:
    made = runner()
    first = made.launch(plan(row(0, 0, 3, PagedOps([1])), start=[0]))
    with pytest.raises(AssertionError, match="before the last one was sampled"):
        made.launch(plan(next_row(PagedOps())))
    made.sample(first, None)
    second = launched(made, plan(next_row(PagedOps())))
    with pytest.raises(AssertionError, match="3 steps are in flight"):
        made.launch(plan(row(0, 4, 1, PagedOps([2]))))
    with pytest.raises(AssertionError, match="in the order of their launch"):
        made.collect(second)


def test_a_step_is_sampled_before_it_is_collected() -> None:
    made = runner()
    with pytest.raises(AssertionError, match="before it was sampled"):
        made.collect(made.launch(plan(row(0, 0, 3, PagedOps([1])), start=[0])))


def test_a_stream_that_cannot_be_trimmed_is_never_cut() -> None:
    made = runner(layout="sequence", can_trim=False)
    made.collect(launched(made, plan(row(0, 0, 6, SequenceOps(0, keep_len=0)), start=[0])))
    with pytest.raises(AssertionError, match="was cut"):
        made.collect(launched(made, plan(row(1, 4, 2, SequenceOps(0, keep_len=4)), start=[1], free=[0])))


def test_two_steps_take_the_device_two_steps_of_time() -> None:
    """The second one does not begin before the first one is done, and waiting for it is not its own time."""
    made = runner(step_ms=5.0)
    began = time.perf_counter()
    tickets = [launched(made, plan(row(0, 0, 3, PagedOps([1])), start=[0])), launched(made, plan(next_row(PagedOps())))]
    times = [made.collect(ticket).device_ms for ticket in tickets]
    assert 10.0 <= sum(times) <= (time.perf_counter() - began) * 1e3
