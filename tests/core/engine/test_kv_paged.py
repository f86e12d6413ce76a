"""The paged cache in exact states: which block is where, who refers to it, and who is reused first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from inferflux_core.engine.kv.manager import NO_MATCH, make_kv_cache_manager
from inferflux_core.engine.kv.paged import NULL_BLOCK, Block, FreeList, PagedKVCacheManager
from inferflux_core.engine.request import Request, hash_block, root_hash
from inferflux_core.engine.types import PagedOps
from inferflux_core.interfaces import KVCacheSpec
from inferflux_core.testing.driver import make_request

SIZE = 4


def manager(num_blocks: int = 11, caching: bool = True) -> PagedKVCacheManager:
    """Ten blocks that can be given out, 1 to 10, four tokens each."""
    made = make_kv_cache_manager(KVCacheSpec(layout="paged", block_size=SIZE, num_blocks=num_blocks), caching)
    assert isinstance(made, PagedKVCacheManager)
    return made


def sequence(tokens: Sequence[int], salt: str = "") -> Request:
    return Request.of(make_request(tokens, salt=salt))


def numbers(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def compute(kv: PagedKVCacheManager, request: Request, upto: int | None = None) -> list[int]:
    """Admit a sequence, compute all of it (or up to a length), and return its new blocks."""
    upto = len(request.tokens) if upto is None else upto
    match = kv.get_computed_blocks(request)
    ops = kv.allocate_slots(request, upto, match)
    assert ops is not None
    request.num_cached_tokens = match.num_tokens
    request.num_computed_tokens = upto
    kv.cache_blocks(request, upto)
    kv.check_integrity()
    return list(ops.new_blocks)


def free_ids(kv: PagedKVCacheManager) -> list[int]:
    return kv._free.ids()


def snapshot(kv: PagedKVCacheManager) -> object:
    return (
        free_ids(kv),
        [(b.id, b.refs, b.hash) for b in kv._blocks],
        {k: b.id for k, b in kv._cached.items()},
        {k: ([b.id for b in t.blocks], t.num_offered) for k, t in kv._tables.items()},
        kv.stats(),
    )


# --- giving out blocks ------------------------------------------------------------------------------------------------


def test_blocks_are_given_out_in_order_and_the_null_block_never() -> None:
    kv = manager()
    assert compute(kv, sequence(numbers(9))) == [1, 2, 3]
    assert compute(kv, sequence(numbers(4, 100))) == [4]
    assert free_ids(kv) == [5, 6, 7, 8, 9, 10]
    assert NULL_BLOCK == 0
    assert (kv.free_tokens(), kv.stats().used, kv.stats().capacity) == (24, 16, 40)
    assert kv.stats().usage == 0.4


def test_a_block_is_taken_only_when_the_last_is_full() -> None:
    kv = manager()
    request = sequence(numbers(12))
    given = []
    for upto in range(1, 13):
        ops = kv.allocate_slots(request, upto)
        assert ops is not None
        given.append(list(ops.new_blocks))
    assert given == [[1], [], [], [], [2], [], [], [], [3], [], [], []]


def test_out_of_room_is_none_and_changes_nothing() -> None:
    kv = manager()
    running = sequence(numbers(24))
    compute(kv, running)
    kv.free(running, keep=True)
    holder = sequence(numbers(16, 500))
    compute(kv, holder)
    big = sequence([*numbers(24), *numbers(20, 900)])
    match = kv.get_computed_blocks(big)
    assert match.num_tokens > 0
    before = snapshot(kv)
    assert kv.allocate_slots(big, 44, match) is None
    assert kv.allocate_slots(holder, 16 + 28, NO_MATCH) is None
    assert snapshot(kv) == before
    assert kv.allocate_slots(holder, 16 + 24, NO_MATCH) is not None
    kv.check_integrity()


def test_adopted_free_blocks_are_not_room() -> None:
    """Six blocks are free, but all of them are the prefix that is taken over: there is no seventh."""
    kv = manager(7)
    first = sequence(numbers(24))
    compute(kv, first)
    kv.free(first, keep=True)
    longer = sequence(numbers(28))
    match = kv.get_computed_blocks(longer)
    assert (match.num_tokens, match.num_held, kv.free_tokens()) == (24, 0, 24)
    before = snapshot(kv)
    assert kv.allocate_slots(longer, 25, match) is None
    assert snapshot(kv) == before


# --- prefixes ---------------------------------------------------------------------------------------------------------


def test_a_running_sequences_full_blocks_are_shared() -> None:
    kv = manager()
    compute(kv, sequence(numbers(10)))
    other = sequence([*numbers(10), 77, 78])
    match = kv.get_computed_blocks(other)
    assert (match.num_tokens, match.num_held) == (8, 8)
    assert compute(kv, other) == [1, 2, 4]
    assert [b.refs for b in kv._blocks[:6]] == [0, 2, 2, 1, 1, 0]


@pytest.mark.parametrize(("length", "hit"), [(8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_hit_leaves_one_token_to_compute(length: int, hit: int) -> None:
    kv = manager()
    compute(kv, sequence(numbers(16)))
    assert kv.get_computed_blocks(sequence(numbers(length))).num_tokens == hit


def test_only_computed_blocks_are_found() -> None:
    kv = manager()
    request = sequence(numbers(16))
    compute(kv, request, upto=7)
    assert kv.get_computed_blocks(sequence(numbers(16))).num_tokens == 4
    assert kv.allocate_slots(request, 16) == PagedOps([3, 4])
    assert kv.get_computed_blocks(sequence(numbers(16))).num_tokens == 4, "allocated is not computed"
    kv.cache_blocks(request, 16)
    assert kv.get_computed_blocks(sequence(numbers(17))).num_tokens == 16


@pytest.mark.parametrize(("to", "blocks", "held"), [(12, [1, 2, 3], 8), (11, [1, 2], 8), (4, [1], 4), (3, [], 0)])
def test_a_shortened_match_is_of_whole_blocks(to: int, blocks: list[int], held: int) -> None:
    """Blocks that others may read are never computed again in part."""
    kv = manager()
    compute(kv, sequence(numbers(8)))
    done = sequence(numbers(12))
    compute(kv, done)
    kv.free(done, keep=True)
    longer = sequence(numbers(14))
    match = kv.shorten(kv.get_computed_blocks(longer), to)
    assert (match.num_tokens, match.num_held) == (len(blocks) * SIZE, held)
    ops = kv.allocate_slots(longer, 14, match)
    assert ops is not None
    assert list(ops.new_blocks)[: len(blocks)] == blocks
    assert not set(list(ops.new_blocks)[len(blocks) :]) & {1, 2, 3}
    kv.check_integrity()


def test_a_different_token_ends_the_prefix() -> None:
    kv = manager()
    compute(kv, sequence(numbers(16)))
    assert kv.get_computed_blocks(sequence([0, 1, 2, 3, 4, 5, 99, 7, *numbers(8, 8)])).num_tokens == 4
    assert kv.get_computed_blocks(sequence([99, *numbers(15, 1)])).num_tokens == 0
    assert kv.get_computed_blocks(sequence(numbers(12, 4))).num_tokens == 0, "a block counts only behind its own beginning"


def test_salts_share_nothing() -> None:
    kv = manager()
    compute(kv, sequence(numbers(9), "a"))
    assert kv.get_computed_blocks(sequence(numbers(9), "b")).num_tokens == 0
    assert kv.get_computed_blocks(sequence(numbers(9), "a")).num_tokens == 8


def test_without_prefix_caching_nothing_is_kept_or_found() -> None:
    kv = manager(caching=False)
    request = sequence(numbers(9))
    assert compute(kv, request) == [1, 2, 3]
    kv.free(request, keep=True)
    assert kv.get_computed_blocks(sequence(numbers(9))) == NO_MATCH
    assert kv.min_shared_tokens is None
    assert compute(kv, sequence(numbers(9))) == [1, 2, 3]


def test_looking_changes_nothing() -> None:
    kv = manager()
    request = sequence(numbers(9))
    compute(kv, request)
    kv.free(request, keep=True)
    before = snapshot(kv)
    kv.get_computed_blocks(sequence(numbers(9)))
    assert snapshot(kv) == before


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    kv = manager()
    request = sequence(numbers(6))
    compute(kv, request)
    for token in (50, 51, 52):
        request.tokens.append(token)
        assert kv.allocate_slots(request, len(request.tokens)) is not None
        kv.cache_blocks(request, len(request.tokens))
    kv.free(request, keep=True)
    assert kv.get_computed_blocks(sequence([*numbers(6), 50, 51, 52, 60])).num_tokens == 8


# --- freeing and reuse ------------------------------------------------------------------------------------------------


def test_a_sequence_is_freed_tail_first_and_unhashed_blocks_go_first() -> None:
    kv = manager()
    request = sequence(numbers(14))
    compute(kv, request)
    kv.free(request, keep=True)
    # Block 4 is half full and worth nothing to others; of 1 to 3 the end of the prompt is reused before its beginning.
    assert free_ids(kv) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]


def test_least_recently_used_is_reused_first() -> None:
    kv = manager()
    old, new = sequence(numbers(13)), sequence(numbers(13, 100))
    compute(kv, old)
    compute(kv, new)
    kv.free(old, keep=True)
    kv.free(new, keep=True)
    assert free_ids(kv) == [8, 4, 9, 10, 3, 2, 1, 7, 6, 5]
    # A hit moves the old one's prefix to the end of the line.
    again = sequence([*numbers(8), 70])
    assert compute(kv, again) == [1, 2, 8]
    kv.free(again, keep=True)
    assert free_ids(kv) == [8, 4, 9, 10, 3, 7, 6, 5, 2, 1]
    compute(kv, sequence(numbers(28, 200)))  # takes 8, 4, 9, 10, 3, 7, 6
    assert kv.get_computed_blocks(sequence(numbers(13))).num_tokens == 8
    assert kv.get_computed_blocks(sequence(numbers(13, 100))).num_tokens == 4


def test_free_without_keep_forgets() -> None:
    kv = manager()
    request = sequence(numbers(8))
    compute(kv, request)
    kv.free(request, keep=False)
    assert kv._cached == {}
    assert free_ids(kv)[:2] == [1, 2]
    kv.free(request, keep=False)
    kv.check_integrity()


def test_shared_blocks_stay_until_the_last_reader_leaves() -> None:
    kv = manager()
    first, second = sequence(numbers(9)), sequence([*numbers(8), 60])
    compute(kv, first)
    compute(kv, second)
    kv.free(first, keep=False)
    assert [kv._blocks[i].refs for i in (1, 2, 3, 4)] == [1, 1, 0, 1]
    assert kv.get_computed_blocks(sequence(numbers(9))).num_tokens == 8, "the second still reads them"
    kv.free(second, keep=True)
    assert kv.stats().used == 0
    kv.check_integrity()


def test_the_same_block_computed_twice_is_published_once() -> None:
    kv = manager()
    first, second = sequence(numbers(9)), sequence(numbers(9))
    for request in (first, second):  # both begin before either is computed
        assert kv.allocate_slots(request, 9) is not None
    for request in (first, second):
        kv.cache_blocks(request, 9)
        kv.check_integrity()
    assert {b.id for b in kv._cached.values()} == {1, 2}
    assert kv.block_table(second) == [4, 5, 6]
    kv.free(second, keep=True)
    assert free_ids(kv)[:3] == [4, 5, 6], "the copy is worth nothing"
    kv.free(first, keep=True)
    assert kv.get_computed_blocks(sequence(numbers(9))).num_tokens == 8


def test_a_duplicate_is_not_offered_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing costs what is new in a step, however many blocks someone else computed first."""
    kv = manager(300)
    first, second = sequence(numbers(400)), sequence(numbers(400))
    for request in (first, second):
        assert kv.allocate_slots(request, 400) is not None
        kv.cache_blocks(request, 400)
    calls: list[int] = []
    block_hashes = Request.block_hashes
    monkeypatch.setattr(Request, "block_hashes", lambda *args: calls.append(1) or block_hashes(*args))
    for token in range(8):
        second.tokens.append(token)
        assert kv.allocate_slots(second, len(second.tokens)) is not None
        kv.cache_blocks(second, len(second.tokens))
    assert len(calls) == 2


# --- drafts -----------------------------------------------------------------------------------------------------------


def test_rejected_drafts_keep_their_room_and_are_never_found() -> None:
    kv = manager()
    request = sequence(numbers(9))
    compute(kv, request)
    assert kv.allocate_slots(request, 15) == PagedOps([4]), "six drafts"
    request.tokens += [9, 50]
    kv.cache_blocks(request, 10)
    kv.trim(request, 10)
    assert kv.block_table(request) == [1, 2, 3, 4]
    assert kv.get_computed_blocks(sequence(numbers(15))).num_tokens == 8
    kv.check_integrity()
    assert kv.allocate_slots(request, 16) == PagedOps(), "the room of the drafts is there for what comes instead"
    request.tokens += [51, 52, 53, 54, 55]
    kv.cache_blocks(request, 16)
    assert kv.get_computed_blocks(sequence([*numbers(10), 50, 51, 52])).num_tokens == 12
    kv.check_integrity()


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_hashes_are_chained_salted_and_extended() -> None:
    request = sequence(numbers(9), "tenant")
    first = hash_block(root_hash("tenant"), [0, 1, 2, 3])
    second = hash_block(first, [4, 5, 6, 7])
    assert request.block_hashes(SIZE) == [first, second]
    assert request.block_hashes(SIZE, 7) == [first]
    request.tokens += [70, 71, 72]
    assert request.block_hashes(SIZE) == [first, second, hash_block(second, [8, 70, 71, 72])]
    assert len(first) == 16
    assert root_hash("a") != root_hash("b")


# --- books ------------------------------------------------------------------------------------------------------------


def test_free_list_keeps_its_order() -> None:
    blocks = [Block(i) for i in range(5)]
    line = FreeList(blocks)
    line.remove(blocks[2])
    line.append(blocks[2])
    assert line.popleft() is blocks[0]
    line.appendleft(blocks[0])
    assert (line.ids(), len(line)) == ([0, 1, 3, 4, 2], 5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kv: setattr(kv._blocks[1], "refs", 2), "reference counts differ"),
        (lambda kv: kv._free.remove(kv._blocks[5]), "free list differs"),
        (lambda kv: setattr(kv._free, "_size", 3), "length is wrong"),
        (lambda kv: kv._cached.clear(), "hash index differs"),
        (lambda kv: setattr(kv._blocks[3], "hash", b"x"), "hash index differs"),
    ],
)
def test_integrity_notices_broken_books(damage: object, message: str) -> None:
    kv = manager()
    compute(kv, sequence(numbers(9)))
    assert callable(damage)
    damage(kv)
    with pytest.raises(AssertionError, match=message):
        kv.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_the_books_and_gives_everything_back(seed: int) -> None:
    """Against a model that knows only which tokens each block of a running sequence holds."""
    rng = random.Random(seed)
    kv = manager(num_blocks=rng.choice([5, 12, 40]), caching=rng.random() < 0.8)
    stems = [numbers(40, 100 * i) for i in range(3)]
    content: dict[int, tuple[int, ...]] = {}
    running: list[Request] = []
    for _ in range(200):
        if running and rng.random() < 0.5:
            request = rng.choice(running)
            if rng.random() < 0.4:
                kv.free(request, keep=rng.random() < 0.8)
                running.remove(request)
            else:
                request.tokens.append(rng.randrange(3))
                if kv.allocate_slots(request, len(request.tokens)) is None:
                    request.tokens.pop()
        else:
            stem = rng.choice(stems)
            request = sequence(stem[: rng.randrange(1, 40)] + [rng.randrange(3) for _ in range(rng.randrange(3))])
            match = kv.get_computed_blocks(request)
            if kv.allocate_slots(request, len(request.tokens), match) is None:
                continue
            table = kv.block_table(request)
            for i in range(match.num_tokens // SIZE):
                assert content[table[i]] == tuple(request.tokens[: (i + 1) * SIZE]), "a hit on other tokens"
            running.append(request)
        for live in running:
            table = kv.block_table(live)
            for i, block in enumerate(table):
                content[block] = tuple(live.tokens[: (i + 1) * SIZE])
            kv.cache_blocks(live, len(live.tokens))
        kv.check_integrity()
        exclusive = [b for live in running for b in kv.block_table(live)[len(live.tokens) // SIZE :]]
        assert len(exclusive) == len(set(exclusive)), "two sequences write into one block"
    for request in running:
        kv.free(request, keep=True)
    kv.check_integrity()
    assert kv.stats().used == 0
