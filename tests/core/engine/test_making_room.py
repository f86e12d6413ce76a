"""Who makes room when the cache is full, and who is let in, seen through an engine with the fake backend."""

from __future__ import annotations

from typing import Any

import pytest

from core.engine.watched import Engine, ask, prompt, small_cache
from inferflux_core.engine.types import SequenceOps
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_settings import FakeSettings


def test_the_newest_makes_room() -> None:
    engine = Engine(settings=small_cache())
    old, new = ask(10, 1, max_tokens=20), ask(10, 2, max_tokens=8)
    engine.add(old, new)
    engine.until(lambda: engine.core.stats().num_preemptions)
    assert engine.running == [old.request_id]
    answers = engine.finish()
    assert answers == {r.request_id: Engine().generate(r)[0].token_ids for r in (old, new)}


def test_the_lowest_priority_makes_room_whoever_came_first() -> None:
    engine = Engine(settings=small_cache(), scheduler="priority")
    unimportant, important = ask(10, 1, max_tokens=20, priority=5), ask(10, 2, max_tokens=8, priority=1)
    engine.add(unimportant)
    engine.step()
    engine.add(important)
    engine.until(lambda: engine.core.stats().num_preemptions)
    assert engine.running == [important.request_id]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("layout", ["paged", "sequence"])
def test_a_full_cache_does_not_thrash(layout: Any, depth: Any) -> None:
    """Room for two sequences, eight want to run, and the scheduler does not know yet how long answers become."""
    settings = FakeSettings(depth=depth, layout=layout, block_size=4, num_blocks=41, max_model_len=160, pool_tokens=160)
    engine = Engine(settings=settings, max_num_seqs=8, max_num_batched_tokens=256)
    requests = [ask(20, v, max_tokens=80) for v in range(8)]
    engine.add(*requests)
    answers = engine.finish()
    assert all(len(tokens) == 80 for tokens in answers.values())
    stats = engine.core.stats()
    assert stats.num_preemptions <= 8
    in_flight = (depth - 1) * 2 * stats.num_preemptions  # a preemption loses what is in flight, too
    assert stats.step_tokens <= 1.5 * 8 * 100 + in_flight


def test_one_sequence_that_fills_the_cache_finishes() -> None:
    engine = Engine(settings=small_cache())
    request = ask(12, 1, max_tokens=20)  # 8 blocks of 4 are exactly all
    assert len(engine.generate(request)[0].token_ids) == 20
    assert engine.core.stats().num_preemptions == 0


def test_admission_keeps_a_reserve_for_the_output() -> None:
    engine = Engine(settings=small_cache(num_blocks=17), max_num_seqs=4)
    first, second = ask(20, 1, max_tokens=40), ask(20, 2, max_tokens=40)
    engine.add(first, second)
    engine.step()
    assert engine.running == [first.request_id], "20 + 40 tokens do not fit beside the first one's 20"
    engine.add(ask(20, 3, max_tokens=2))
    engine.step()
    assert engine.running == [first.request_id], "those behind do not overtake, or a long one would starve"


def test_the_reserve_is_what_answers_usually_take() -> None:
    engine = Engine(settings=small_cache(num_blocks=33), max_num_seqs=4, max_num_batched_tokens=256)
    for v in range(30):
        engine.generate(ask(4, v, max_tokens=1))
    first, second = ask(60, 40, max_tokens=60), ask(56, 41, max_tokens=60)
    engine.add(first, second)
    engine.step()
    assert engine.running == [first.request_id, second.request_id], "answers had one token lately"


def test_a_prefix_that_others_hold_needs_no_room() -> None:
    engine = Engine(settings=small_cache(num_blocks=17), max_num_batched_tokens=256)
    first = make_request(prompt(40), max_tokens=5)
    engine.add(first)
    engine.step()
    second = make_request([*prompt(40), 97], max_tokens=5)
    engine.add(second)
    engine.step()
    assert engine.running == [first.request_id, second.request_id]


def test_a_retained_prefix_needs_its_own_room() -> None:
    """Its cells are free only as long as nobody takes the prefix over: counting them twice admits what cannot stay."""
    engine = Engine(settings=small_cache(num_blocks=17), max_num_seqs=4, max_num_batched_tokens=256)
    engine.generate(make_request(prompt(32), max_tokens=1))
    runs = ask(18, 3, max_tokens=12)
    engine.add(runs)
    engine.step()
    again = make_request([*prompt(32), 98, 99], max_tokens=20, ignore_eos=True)
    engine.add(again)
    engine.step()
    assert engine.running == [runs.request_id], "34 + 20 tokens do not fit beside 18 into 64, though 32 of them are cached"
    engine.run()
    assert engine.answers[again.request_id].num_cached_tokens == 32
    assert engine.core.stats().num_preemptions == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", range(4))
def test_room_made_for_a_row_that_is_dropped_is_still_cleared(steps: int, depth: Any) -> None:
    """A decode had a retained stream cleared, then made room itself for an older prefill: its row was gone, the clearing
    must not be (the fake backend fails when the pool overflows)."""
    settings = FakeSettings(depth=depth, layout="sequence", block_size=4, pool_tokens=150, num_streams=10)
    for long in (122, 125, 128):
        engine = Engine(settings=settings, max_num_seqs=8, max_num_batched_tokens=16)
        old = [ask(long, 0, max_tokens=2), ask(85, 0, max_tokens=2)]
        engine.generate(ask(18, 30, max_tokens=1), ask(5, 31, max_tokens=1))
        engine.add(ask(6, 3, max_tokens=27), ask(7, 4, max_tokens=13), ask(5, 5, max_tokens=9))
        for _ in range(steps):
            engine.step()
        engine.add(*old)
        engine.run()


@pytest.mark.parametrize(
    ("pool", "budget", "steps", "retained", "decodes", "newest", "long"),
    [
        (60, 16, 1, (2, 4, 7), [(4, 23), (3, 28), (4, 23), (5, 25)], 2, 35),
        (80, 24, 2, (6, 2, 4), [(6, 20), (3, 26), (3, 18), (4, 29)], 3, 50),
    ],
)
def test_room_made_for_a_dropped_row_is_cleared_even_when_its_taker_gives_up(
    pool: int,
    budget: int,
    steps: int,
    retained: tuple[int, ...],
    decodes: list[tuple[int, int]],
    newest: int,
    long: int,
) -> None:
    """As above, but the prefill has to make room itself in the end: one of the rows that stay does the clearing."""
    settings = FakeSettings(layout="sequence", block_size=4, pool_tokens=pool, num_streams=10)
    engine = Engine(scheduler="priority", settings=settings, max_num_seqs=8, max_num_batched_tokens=budget)
    engine.generate(*(ask(length, 30 + i, max_tokens=1) for i, length in enumerate(retained)))
    engine.scheduler._mean_output = 1.0  # answers were short so far: admission keeps hardly any reserve
    engine.add(*(ask(length, 3 + i, max_tokens=tokens) for i, (length, tokens) in enumerate(decodes)))
    engine.add(ask(newest, 20, max_tokens=25, priority=2))
    for _ in range(steps):
        engine.step()
    engine.add(ask(long, 0, max_tokens=2, priority=1))
    engine.run()
    assert engine.core.stats().num_preemptions >= 2


@pytest.mark.parametrize("depth", [1, 2])
def test_plans_of_a_shared_pool_never_clear_what_they_use(depth: Any) -> None:
    settings = FakeSettings(depth=depth, layout="sequence", block_size=4, pool_tokens=120, num_streams=6)
    engine = Engine(settings=settings, max_num_seqs=4, max_num_batched_tokens=32)
    engine.generate(*(make_request(prompt(30, v % 3) + prompt(v, 9), max_tokens=12) for v in range(12)))
    assert any(isinstance(row.kv, SequenceOps) and row.kv.clear for plan in engine.runner.plans for row in plan.rows)
    for plan in engine.runner.plans:
        used: set[int] = set()
        for row in plan.rows:
            assert isinstance(row.kv, SequenceOps)
            assert not used & set(row.kv.clear)
            used.add(row.kv.stream)
            assert row.kv.copy_from is None or row.kv.copy_from not in row.kv.clear
