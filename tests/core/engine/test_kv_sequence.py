"""Streams of a library that owns its cells, in exact states: where a sequence runs, what is copied, cut and cleared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from inferflux_core.engine.kv.manager import NO_MATCH, make_kv_cache_manager
from inferflux_core.engine.kv.sequence import SequenceKVCacheManager
from inferflux_core.engine.request import Request
from inferflux_core.engine.types import SequenceOps
from inferflux_core.interfaces import KVCacheSpec
from inferflux_core.testing.driver import make_request

SIZE = 4


def manager(num_streams: int = 4, caching: bool = True, **spec: Any) -> SequenceKVCacheManager:
    """Streams of 100 tokens; copies pay from 8 tokens on."""
    defaults: dict[str, Any] = {"block_size": SIZE, "num_streams": num_streams, "stream_tokens": 100, "min_copy_tokens": 8}
    made = make_kv_cache_manager(KVCacheSpec(layout="sequence", **{**defaults, **spec}), caching)
    assert isinstance(made, SequenceKVCacheManager)
    return made


def sequence(tokens: Sequence[int], salt: str = "") -> Request:
    return Request.of(make_request(tokens, salt=salt))


def numbers(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def start(kv: SequenceKVCacheManager, request: Request, upto: int | None = None) -> SequenceOps:
    """Admit a sequence and compute all of it, or up to a length."""
    upto = len(request.tokens) if upto is None else upto
    ops = kv.allocate_slots(request, upto, kv.get_computed_blocks(request))
    assert ops is not None
    kv.cache_blocks(request, upto)
    kv.check_integrity()
    return ops


def retain(kv: SequenceKVCacheManager, tokens: Sequence[int], salt: str = "") -> int:
    """A finished sequence whose cells stay; its stream."""
    request = sequence(tokens, salt)
    stream = start(kv, request).stream
    kv.free(request, keep=True)
    kv.check_integrity()
    return stream


def snapshot(kv: SequenceKVCacheManager) -> object:
    return (
        [(s.owner, list(s.tokens), s.length, s.reserved, list(s.hashes), s.last_used) for s in kv._streams],
        {block_hash: set(ids) for block_hash, ids in kv._index.items()},
        set(kv._stale),
        kv.stats(),
    )


# --- which stream -----------------------------------------------------------------------------------------------------


def test_new_sequences_fill_streams_without_gaps() -> None:
    kv = manager()
    assert [start(kv, sequence(numbers(3, 10 * i))).stream for i in range(4)] == [0, 1, 2, 3]
    assert kv.allocate_slots(sequence(numbers(3, 90)), 3) is None
    assert (kv.free_tokens(), kv.stats().used, kv.stats().capacity) == (0, 12, 400)


def test_a_gap_is_closed_before_an_old_prefix_is_spared() -> None:
    kv = manager(5)
    requests = [sequence(numbers(9, 20 * i)) for i in range(4)]
    for request in requests:
        start(kv, request)
    kv.free(requests[1], keep=True)
    # Stream 4 is empty, but only stream 1 joins 0 and 2 into one run of ids.
    assert start(kv, sequence(numbers(9, 500))).stream == 1


def test_of_equally_placed_streams_the_empty_one_then_the_oldest() -> None:
    kv = manager(3)
    for i in range(2):
        assert retain(kv, numbers(9, 20 * i)) == i
    assert retain(kv, numbers(9, 40)) == 2
    assert retain(kv, numbers(9, 60)) == 0
    assert retain(kv, numbers(9, 80)) == 1


def test_a_step_of_a_running_sequence_leaves_the_stream_alone() -> None:
    kv = manager()
    request = sequence(numbers(5))
    assert start(kv, request, upto=3) == SequenceOps(0, None, 0)
    ops = kv.allocate_slots(request, 5)
    assert ops == SequenceOps(0)
    assert kv.stream_of(request) == 0
    assert kv.allocate_slots(request, 5) is ops, "nothing is made anew for a sequence that just goes on"


def test_longer_than_a_stream_is_out_of_room() -> None:
    kv = manager()
    request = sequence(numbers(101))
    before = snapshot(kv)
    assert kv.allocate_slots(request, 101) is None
    assert snapshot(kv) == before
    start(kv, request, upto=100)
    before = snapshot(kv)
    assert kv.allocate_slots(request, 101) is None
    assert snapshot(kv) == before


# --- a retained prefix ------------------------------------------------------------------------------------------------


def test_the_next_turn_goes_on_in_place() -> None:
    kv = manager()
    assert retain(kv, numbers(10)) == 0
    retain(kv, numbers(10, 50))
    assert start(kv, sequence(numbers(14))) == SequenceOps(0, None, 10)


@pytest.mark.parametrize(("length", "hit"), [(9, 8), (10, 9), (11, 10), (12, 10)])
def test_a_hit_is_exact_to_the_token_and_leaves_one_to_compute(length: int, hit: int) -> None:
    kv = manager()
    retain(kv, numbers(10))
    assert kv.get_computed_blocks(sequence(numbers(length))).num_tokens == hit


def test_a_hit_below_one_block_is_none() -> None:
    kv = manager()
    retain(kv, numbers(10))
    assert kv.get_computed_blocks(sequence([0, 1, 2, 99, 98, 97])) == NO_MATCH


def test_in_place_cuts_what_differs_when_little_is_lost() -> None:
    kv = manager()
    retain(kv, numbers(20))
    ops = start(kv, sequence([*numbers(14), 90, 91]))
    assert ops == SequenceOps(0, None, 14)
    assert kv._streams[0].length == 16
    assert kv.get_computed_blocks(sequence(numbers(20))).num_tokens == 14


def test_a_long_prefix_is_copied_when_much_would_be_lost() -> None:
    kv = manager()
    retain(kv, numbers(60))
    ops = start(kv, sequence([*numbers(20), 90]))
    assert ops == SequenceOps(1, 0, 20)
    assert kv.get_computed_blocks(sequence(numbers(61))).num_tokens == 60, "the donor is untouched"


def test_a_prefix_too_short_to_copy_is_taken_in_place() -> None:
    kv = manager()
    retain(kv, numbers(60))
    assert start(kv, sequence([*numbers(6), 90])) == SequenceOps(0, None, 6)


def test_rather_lose_the_donor_than_a_longer_conversation() -> None:
    """The only other stream holds 40 tokens; cutting 16 off the donor costs less than overwriting those."""
    kv = manager(2)
    retain(kv, numbers(36))
    retain(kv, numbers(40, 200))
    assert start(kv, sequence([*numbers(20), 90])) == SequenceOps(0, None, 20)
    assert kv.get_computed_blocks(sequence(numbers(41, 200))).num_tokens == 40


def test_the_longest_prefix_wins_then_a_free_donor_then_the_shortest() -> None:
    kv = manager(6)
    retain(kv, [*numbers(12), 50, 51, 52])
    retain(kv, [*numbers(12, 300), 60])
    running = sequence([*numbers(16), 70])
    assert start(kv, running).stream == 0  # in place: three tokens are lost
    match = kv.get_computed_blocks(sequence([*numbers(16), 80]))
    assert (match.num_tokens, match.source) == (16, kv._streams[0])
    retain(kv, [*numbers(16), 90, 91, 92, 93])
    match = kv.get_computed_blocks(sequence([*numbers(16), 80]))
    assert match.source is not kv._streams[0], "nobody runs on this one"
    assert match.num_held == 0


def test_salts_share_nothing() -> None:
    kv = manager()
    retain(kv, numbers(20), "a")
    assert kv.get_computed_blocks(sequence(numbers(20), "b")) == NO_MATCH
    assert kv.get_computed_blocks(sequence(numbers(20), "a")).num_tokens == 19


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = manager(caching=False)
    retain(kv, numbers(20))
    assert kv.get_computed_blocks(sequence(numbers(20))) == NO_MATCH
    assert kv.min_shared_tokens is None
    assert kv._streams[0].length == 0


def test_looking_changes_nothing() -> None:
    kv = manager()
    retain(kv, numbers(20))
    before = snapshot(kv)
    kv.get_computed_blocks(sequence(numbers(30)))
    assert snapshot(kv) == before


# --- a running donor --------------------------------------------------------------------------------------------------


def test_a_running_donor_is_copied_and_runs_on() -> None:
    kv = manager()
    donor = sequence(numbers(30))
    start(kv, donor, upto=14)
    ops = start(kv, sequence([*numbers(20), 90]))
    assert ops == SequenceOps(1, 0, 14), "only what is computed"
    assert kv.allocate_slots(donor, 30) == SequenceOps(0)
    kv.cache_blocks(donor, 30)
    kv.check_integrity()


def test_a_short_prefix_of_a_running_donor_is_not_worth_a_copy() -> None:
    kv = manager()
    start(kv, sequence(numbers(30)))
    assert kv.get_computed_blocks(sequence([*numbers(7), 90])) == NO_MATCH
    assert kv.get_computed_blocks(sequence([*numbers(8), 90])).num_tokens == 8


def test_a_running_donor_cannot_be_taken_over_when_no_stream_is_free() -> None:
    kv = manager(2)
    start(kv, sequence(numbers(30)))
    start(kv, sequence(numbers(30, 200)))
    request = sequence([*numbers(20), 90])
    match = kv.get_computed_blocks(request)
    assert match.num_tokens == 20
    before = snapshot(kv)
    assert kv.allocate_slots(request, 21, match) is None
    assert snapshot(kv) == before


# --- memory that cannot be cut ----------------------------------------------------------------------------------------


def test_without_trim_only_whole_sequences_are_reused() -> None:
    kv = manager(can_trim=False)
    retain(kv, numbers(20))
    assert kv.get_computed_blocks(sequence([*numbers(14), 90])) == NO_MATCH
    assert kv.get_computed_blocks(sequence(numbers(20))) == NO_MATCH, "one token would have to be computed again"
    assert start(kv, sequence(numbers(24))) == SequenceOps(0, None, 20)


def test_without_trim_waiting_for_a_running_donor_is_in_vain() -> None:
    kv = manager(can_trim=False)
    assert kv.min_shared_tokens is None
    assert manager(min_copy_tokens=50).min_shared_tokens == 50
    assert manager(min_copy_tokens=1).min_shared_tokens == 2 * SIZE


# --- a pool shared by all streams -------------------------------------------------------------------------------------


def test_the_pool_drops_the_oldest_retained_and_says_which() -> None:
    kv = manager(6, pool_tokens=60)
    for i in range(3):
        retain(kv, numbers(16, 100 * i))
    assert kv.free_tokens() == 60
    ops = start(kv, sequence(numbers(40, 900)))
    assert ops == SequenceOps(3, None, 0, clear=(0, 1))
    assert kv.get_computed_blocks(sequence(numbers(17))) == NO_MATCH
    assert kv.get_computed_blocks(sequence(numbers(17, 200))).num_tokens == 16


def test_a_running_sequence_that_grows_drops_retained_ones() -> None:
    kv = manager(3, pool_tokens=40)
    retain(kv, numbers(16))
    request = sequence(numbers(20, 500))
    start(kv, request)
    request.tokens += numbers(5, 700)
    assert kv.allocate_slots(request, 24) == SequenceOps(1)
    assert kv.allocate_slots(request, 25) == SequenceOps(1, clear=(0,))
    kv.check_integrity()


def test_the_pool_spares_the_donor_and_goes_on_in_place_when_a_copy_does_not_fit() -> None:
    kv = manager(3, pool_tokens=60)
    retain(kv, numbers(40))
    ops = start(kv, sequence([*numbers(20), *numbers(10, 900)]))
    assert ops == SequenceOps(0, None, 20), "a copy to another stream would have needed 30 cells, 20 are free"


def test_a_pool_out_of_room_is_none_and_changes_nothing() -> None:
    kv = manager(4, pool_tokens=60)
    running = sequence(numbers(40))
    start(kv, running)
    retain(kv, numbers(16, 500))
    big = sequence(numbers(21, 800))
    before = snapshot(kv)
    assert kv.allocate_slots(big, 21) is None
    assert kv.allocate_slots(running, 61) is None
    assert snapshot(kv) == before
    assert kv.allocate_slots(running, 60) == SequenceOps(0, clear=(1,))


def test_cells_of_a_forgotten_stream_are_cleared_before_others_use_the_room() -> None:
    """The library does not know that nobody wants them any more until it is told."""
    kv = manager(3, caching=False, pool_tokens=60)
    assert retain(kv, numbers(40)) == 0
    assert start(kv, sequence(numbers(9, 500))) == SequenceOps(1, None, 0, clear=(0,))
    assert start(kv, sequence(numbers(9, 700))) == SequenceOps(2, None, 0), "told once"


def test_a_failed_start_does_not_forget_what_is_stale() -> None:
    kv = manager(2, caching=False, pool_tokens=60)
    running = sequence(numbers(20))
    start(kv, running)
    assert retain(kv, numbers(40, 300)) == 1
    assert kv._stale == {1}
    too_long = sequence(numbers(41, 500))
    assert kv.allocate_slots(too_long, 41) is None
    assert kv._stale == {1}, "stream 1 still holds cells in the library"
    assert kv.allocate_slots(running, 30) == SequenceOps(0, clear=(1,))
    kv.check_integrity()


def test_a_stale_stream_that_is_used_again_is_cut_not_cleared() -> None:
    kv = manager(1, caching=False, pool_tokens=60)
    retain(kv, numbers(40))
    assert start(kv, sequence(numbers(50, 300))) == SequenceOps(0, None, 0)
    assert kv._stale == set()


def test_clearing_that_was_cancelled_is_carried_over() -> None:
    """The row that was to clear a stream is dropped from the plan: another one has to."""
    kv = manager(3, pool_tokens=40)
    retain(kv, numbers(16))
    request = sequence(numbers(25, 500))
    start(kv, request, upto=20)
    ops = kv.allocate_slots(request, 25)
    assert ops == SequenceOps(1, clear=(0,))
    kv.cancel(ops)
    kv.free(request, keep=True)
    kv.check_integrity()
    other = SequenceOps(2)
    assert kv.carry_over(other) == SequenceOps(2, clear=(0,))
    assert kv.carry_over(other) is other, "once is enough"


# --- trim and free ----------------------------------------------------------------------------------------------------


def test_the_row_after_rejected_drafts_cuts_them_off() -> None:
    kv = manager()
    request = sequence(numbers(20))
    start(kv, request)
    assert kv.allocate_slots(request, 26) == SequenceOps(0)
    kv.cache_blocks(request, 20)
    kv.trim(request, 20)
    kv.check_integrity()
    assert kv.get_computed_blocks(sequence(numbers(24))).num_tokens == 20
    assert kv.allocate_slots(request, 21) == SequenceOps(0, keep_len=20)
    assert kv.allocate_slots(request, 22) == SequenceOps(0), "once is enough"
    kv.check_integrity()


def test_rejected_drafts_of_a_finished_sequence_count_until_its_stream_is_cut() -> None:
    kv = manager(pool_tokens=40)
    request = sequence(numbers(20))
    start(kv, request)
    kv.allocate_slots(request, 30)
    kv.trim(request, 20)
    kv.free(request, keep=True)
    kv.check_integrity()
    other = sequence(numbers(11, first=50))
    assert kv.allocate_slots(other, 11) == SequenceOps(1, keep_len=0, clear=(0,)), "30 + 11 cells are more than 40"
    kv.check_integrity()


def test_a_cut_that_is_not_carried_out_is_done_later() -> None:
    kv = manager(pool_tokens=40)
    request = sequence(numbers(20))
    start(kv, request)
    kv.allocate_slots(request, 30)
    kv.trim(request, 20)
    ops = kv.allocate_slots(request, 21)
    assert ops == SequenceOps(0, keep_len=20)
    kv.cancel(ops)
    kv.free(request, keep=True)
    assert kv._streams[0].written == 30
    again = sequence(numbers(24))
    assert start(kv, again) == SequenceOps(0, keep_len=20)
    assert kv._streams[0].written == 0


def test_free_without_keep_forgets_and_twice_is_harmless() -> None:
    kv = manager()
    request = sequence(numbers(20))
    start(kv, request)
    kv.free(request, keep=False)
    kv.free(request, keep=True)
    assert kv._index == {}
    assert kv.stats().used == 0
    kv.check_integrity()


def test_a_preempted_sequence_resumes_where_it_was() -> None:
    kv = manager()
    request = sequence(numbers(20))
    start(kv, request, upto=19)
    kv.free(request, keep=True)
    assert start(kv, request) == SequenceOps(0, None, 19)


# --- books ------------------------------------------------------------------------------------------------------------


def _oversubscribe(kv: SequenceKVCacheManager) -> None:
    kv._streams[0].reserved = 1000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kv: kv._of.clear(), "streams and their owners disagree"),
        (lambda kv: kv._index.clear(), "hash index differs"),
        (lambda kv: setattr(kv._streams[0], "length", 12), "longer than its tokens"),
        (lambda kv: setattr(kv._streams[0], "reserved", 5), "outgrew its room"),
        (lambda kv: kv._streams[0].hashes.pop(), "do not match its length"),
        (_oversubscribe, "oversubscribed"),
    ],
)
def test_integrity_notices_broken_books(damage: Callable[[SequenceKVCacheManager], object], message: str) -> None:
    kv = manager(pool_tokens=100)
    start(kv, sequence(numbers(9)))
    damage(kv)
    with pytest.raises(AssertionError, match=message):
        kv.check_integrity()
