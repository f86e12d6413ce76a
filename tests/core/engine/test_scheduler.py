"""What the scheduler puts into a step, seen through plans and outputs of an engine with the fake backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.engine.watched import Engine, ask, prompt
from inferflux_core.engine.cost_model import StepCostModel
from inferflux_core.engine.scheduler import TokenBudgetScheduler
from inferflux_core.engine.types import EngineRequest, FinishReason, SequenceOps
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_settings import FakeSettings

# --- the budget of a step ---------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_and_samples_at_its_end() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.add(ask(40))
    assert [engine.plan() for _ in range(4)] == [
        [(0, 0, 16, False)],
        [(0, 16, 16, False)],
        [(0, 32, 8, True)],
        [(0, 40, 1, True)],
    ]


def test_decodes_come_first_and_prefill_fills_the_rest() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.add(ask(5, 1), ask(6, 2))
    assert engine.plan() == [(0, 0, 5, True), (1, 0, 6, True)]
    engine.add(ask(40, 3), ask(3, 4))
    assert engine.plan() == [(0, 5, 1, True), (1, 6, 1, True), (2, 0, 14, False)]
    assert engine.plan() == [(0, 6, 1, True), (1, 7, 1, True), (2, 14, 14, False)]
    assert engine.plan() == [(0, 7, 1, True), (1, 8, 1, True), (2, 28, 12, True)], "two tokens are no chunk"
    assert engine.plan() == [(0, 8, 1, True), (1, 9, 1, True), (2, 40, 1, True), (3, 0, 3, True)]


def test_several_prompts_share_a_step() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add(*(ask(20, v) for v in range(1, 5)))
    assert engine.plan() == [(0, 0, 20, True), (1, 0, 20, True), (2, 0, 20, True)]
    assert engine.plan() == [(0, 20, 1, True), (1, 20, 1, True), (2, 20, 1, True), (3, 0, 20, True)]


def test_no_sliver_of_a_prompt_is_left_for_a_step_of_its_own() -> None:
    """Every chunk costs a pass over the weights: a little more than the target allows is better than one more pass."""
    cost_of_target = 40.0  # so that the chunk is about 60 tokens while 127 fit
    engine = Engine(max_num_batched_tokens=128, itl_target_ms=cost_of_target, cost=lambda p, d: 0.5 * p + 10)
    chunks = _chunks_beside_a_decode(engine, prompts=8, length=300)
    assert chunks[-1] == pytest.approx(60, abs=1)
    request = ask(85, 50, max_tokens=1)
    engine.add(request)
    assert engine.plan()[1:] == [(1, 0, 85, True)]
    request = ask(100, 51, max_tokens=1)
    engine.add(request)
    assert [n for _, _, n, _ in engine.plan()[1:]] == [pytest.approx(60, abs=1)]


def test_no_more_sequences_run_than_there_are_slots() -> None:
    engine = Engine(max_num_seqs=2)
    engine.add(*(ask(5, v, max_tokens=v + 1) for v in range(1, 4)))
    engine.step()
    stats = engine.core.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    engine.step()  # the first one ends with its second token
    assert engine.plan() == [(1, 6, 1, True), (0, 0, 5, True)], "the lowest free slot is used again"


def test_freed_slots_are_told_once_with_the_next_plan_that_there_is() -> None:
    engine = Engine()
    first = ask(5, 1)
    engine.add(first)
    engine.step()
    engine.abort(first.request_id)
    assert engine.plan() == [], "nothing to compute, so no plan to tell it with"
    engine.add(ask(5, 2))
    engine.step()
    engine.step()
    assert [plan.free for plan in engine.runner.plans] == [[], [0], []]


def test_an_idle_engine_has_no_plan() -> None:
    engine = Engine()
    assert engine.plan() == []
    assert engine.core.stats().num_steps == 0


# --- chunks beside decodes --------------------------------------------------------------------------------------------


def _cost(prefill: int, decodes: int) -> float:
    return 10 + 0.5 * prefill + 2.0 * decodes


def _chunks_beside_a_decode(engine: Engine, prompts: int = 12, length: int = 300) -> list[int]:
    """Chunk sizes of long prompts that arrive while one sequence decodes."""
    engine.add(ask(4, 1, max_tokens=3000))
    engine.step()
    chunks = []
    for v in range(prompts):
        request = ask(length, v + 2, max_tokens=1)
        engine.add(request)
        while engine.answers[request.request_id].finish_reason is None:
            chunks += [n for _, _, n, sample in engine.plan() if n > 1 and not sample]
    return chunks


def test_chunks_are_cut_so_that_decodes_meet_their_target() -> None:
    engine = Engine(max_num_batched_tokens=512, itl_target_ms=60.0, cost=_cost)
    chunks = _chunks_beside_a_decode(engine)
    assert chunks[0] == 128, "before anything is known"
    exact = (60 - 10 - 2) / 0.5
    assert chunks[-1] == pytest.approx(exact, abs=2)
    last = [_cost(p.num_tokens - 1, 1) for p in engine.runner.plans if p.num_tokens > 1][-10:]
    assert max(last) <= 60 + 0.5 * 32, "at most a sliver more"


def test_the_largest_chunk_when_nobody_decodes() -> None:
    engine = Engine(max_num_batched_tokens=512, itl_target_ms=60.0, cost=_cost)
    _chunks_beside_a_decode(engine)
    engine.abort(*engine.running)
    engine.add(ask(1000, 77))
    assert engine.plan() == [(0, 0, 512, False)]


def test_chunks_are_never_cut_to_crumbs() -> None:
    engine = Engine(max_num_batched_tokens=512, itl_target_ms=1.0, cost=_cost)
    assert set(_chunks_beside_a_decode(engine, prompts=3)[4:]) == {32}


def test_without_a_target_chunks_are_not_cut() -> None:
    engine = Engine(max_num_batched_tokens=200, itl_target_ms=None, cost=_cost)
    assert set(_chunks_beside_a_decode(engine, prompts=3)) == {199}


def test_chunks_follow_a_machine_that_becomes_slower() -> None:
    factor = [1.0]
    engine = Engine(max_num_batched_tokens=512, itl_target_ms=60.0, cost=lambda p, d: factor[0] * _cost(p, d))
    _chunks_beside_a_decode(engine)
    factor[0] = 2.0
    chunks = []
    for v in range(80):
        request = ask(300, v + 40, max_tokens=1)
        engine.add(request)
        while engine.answers[request.request_id].finish_reason is None:
            chunks += [n for _, _, n, sample in engine.plan() if n > 1 and not sample]
    assert chunks[-1] == pytest.approx((30 - 10 - 2) / 0.5, abs=6)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_does_no_harm(broken: float) -> None:
    engine = Engine(max_num_batched_tokens=512, itl_target_ms=60.0, cost=lambda p, d: broken if p > 100 else _cost(p, d))
    assert len(_chunks_beside_a_decode(engine)) > 12


class TestStepCostModel:
    def test_it_learns_a_linear_cost(self) -> None:
        model = StepCostModel()
        rng = np.random.default_rng(1)
        for _ in range(200):
            prefill, decodes, kv = int(rng.integers(0, 512)), int(rng.integers(0, 16)), int(rng.integers(0, 20_000))
            model.observe(prefill, decodes, kv, 5 + 0.1 * prefill + decodes + 0.001 * kv)
        assert model.predict(256, 8, 8192) == pytest.approx(5 + 25.6 + 8 + 8.192, rel=0.01)
        assert model.max_prefill(8, 8192, 50, 32, 2048) == pytest.approx((50 - 21.192) / 0.1, rel=0.02)

    def test_it_stays_sane_for_many_steps(self) -> None:
        """Rounding once made the covariance lopsided, and after about 5,000 mixed steps predictions were noise."""
        model = StepCostModel()
        rng = np.random.default_rng(0)
        worst = 0.0
        for i in range(12_000):
            prefill = int(rng.integers(0, 512)) if i % 3 == 0 else 0
            decodes, kv = int(rng.integers(0, 16)), int(rng.integers(0, 20_000))
            truth = 5 + 0.1 * prefill + decodes + 0.001 * kv
            model.observe(prefill, decodes, kv, truth + float(rng.normal()) * 0.5)
            if i > 200:
                worst = max(worst, abs(model.predict(prefill, decodes, kv) - truth))
        assert worst < 2

    def test_a_constant_load_teaches_its_own_cost_only(self) -> None:
        model = StepCostModel()
        for _ in range(6000):
            model.observe(0, 8, 4000, 20.0)
        assert model.predict(0, 8, 4000) == pytest.approx(20)
        assert 32 <= model.max_prefill(8, 4000, 60, 32, 2048) <= 2048

    def test_more_tokens_that_seem_to_cost_less_get_the_largest_chunk(self) -> None:
        model = StepCostModel()
        for i in range(50):
            model.observe(100 * (i % 5), 1, 0, 50 - 5 * (i % 5))
        assert model.max_prefill(1, 0, 60, 32, 2048) == 2048

    def test_decodes_alone_beyond_the_target_get_the_smallest_chunk(self) -> None:
        model = StepCostModel()
        for i in range(50):
            model.observe(64 * (i % 3), 8, 0, 100 + i % 3)
        assert model.max_prefill(8, 0, 60, 32, 2048) == 32

    def test_bounds_hold_before_anything_is_known(self) -> None:
        assert StepCostModel().max_prefill(1, 0, 1.0, 32, 2048) == 128
        assert StepCostModel().max_prefill(1, 0, 1.0, 7, 7) == 7


# --- waiting for a prefix that is being computed ----------------------------------------------------------------------


def _holding() -> tuple[Engine, list[EngineRequest]]:
    """Three requests with one long beginning and one without, in steps of 32 tokens."""
    engine = Engine(max_num_batched_tokens=32)
    requests = [make_request([*prompt(96), 97 + i], max_tokens=4) for i in range(3)]
    requests.append(ask(8, 5, max_tokens=4))
    engine.add(*requests)
    return engine, requests


def test_a_request_waits_while_its_prefix_is_computed_and_others_pass() -> None:
    engine, requests = _holding()
    assert engine.plan() == [(0, 0, 32, False)]
    assert engine.plan() == [(0, 32, 32, False)]
    assert engine.plan() == [(0, 64, 32, False)]
    assert engine.plan() == [(0, 96, 1, True), (1, 96, 1, True), (2, 96, 1, True), (3, 0, 8, True)]
    engine.run()
    assert [engine.answers[r.request_id].num_cached_tokens for r in requests] == [0, 96, 96, 0]
    assert engine.core.stats().prompt_tokens == 97 + 1 + 1 + 8


def test_unrelated_requests_overtake_those_that_wait_for_a_prefix() -> None:
    engine = Engine(max_num_batched_tokens=64)
    shared = [make_request([*prompt(96), 97 + i], max_tokens=4) for i in range(2)]
    other = ask(8, 5)
    engine.add(shared[0])
    engine.step()
    engine.add(shared[1], other)
    assert engine.plan() == [(0, 64, 33, True), (1, 0, 8, True)]
    assert engine.running == [shared[0].request_id, other.request_id]
    engine.step()
    assert engine.running == [shared[0].request_id, other.request_id, shared[1].request_id]


@pytest.mark.parametrize("leave", ["abort", "preempt"])
def test_those_who_wait_go_on_when_the_donor_leaves(leave: str) -> None:
    engine, requests = _holding()
    engine.step()
    donor = requests[0].request_id
    assert engine.running == [donor]
    getattr(engine, leave)(donor)
    engine.step()
    first = requests[1].request_id if leave == "abort" else donor  # a preempted one is first in line
    assert engine.running == [first]
    assert engine.runner.plans[-1].rows[0].start == 32, "what was computed is not lost"
    answers = engine.finish()
    alone = {r.request_id: Engine().generate(r)[0].token_ids for r in requests}
    if leave == "abort":
        del alone[donor], answers[donor]
    assert answers == alone


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (FakeSettings(), {"enable_prefix_caching": False}),
        (FakeSettings(layout="sequence", can_trim=False), {}),
    ],
)
def test_nobody_waits_for_a_prefix_that_cannot_be_shared(settings: FakeSettings, config: dict[str, Any]) -> None:
    engine = Engine(settings=settings, max_num_batched_tokens=256, **config)
    engine.add(*(make_request([*prompt(96), 97 + i], max_tokens=4) for i in range(2)))
    assert engine.plan() == [(0, 0, 97, True), (1, 0, 97, True)]


def test_a_short_common_beginning_is_not_worth_waiting_for() -> None:
    engine = Engine(max_num_batched_tokens=256)
    engine.add(*(make_request([*prompt(31), 97 + i], max_tokens=4) for i in range(2)))
    assert len(engine.plan()) == 2


def test_a_deep_prefix_is_cut_so_that_a_whole_tile_is_computed() -> None:
    """Where a chunk smaller than a tile runs on slower kernels, computing a few known tokens again takes less time."""
    shared = prompt(100)
    for tail, start in ((1, 100), (2, 93), (8, 99), (9, 100)):  # a tile of 8, and the token that goes with the decodes
        engine = Engine(settings=FakeSettings(layout="sequence"), max_num_batched_tokens=256)
        engine.scheduler.context = replace(
            engine.scheduler.context, caps=replace(engine.scheduler.context.caps, prefill_tile=8)
        )
        engine.generate(make_request(shared, max_tokens=1))
        request = make_request(shared + prompt(tail, 5), max_tokens=4)
        alone = Engine().generate(request)[0]
        engine.add(request)
        engine.step()
        assert engine.runner.plans[-1].rows[0].start == start
        engine.run()
        assert engine.answers[request.request_id].token_ids == alone.token_ids


# --- making room ------------------------------------------------------------------------------------------------------


def _small(num_blocks: int = 9, block_size: int = 4) -> FakeSettings:
    return FakeSettings(block_size=block_size, num_blocks=num_blocks)


def test_the_newest_makes_room() -> None:
    engine = Engine(settings=_small())
    old, new = ask(10, 1, max_tokens=20), ask(10, 2, max_tokens=8)
    engine.add(old, new)
    engine.until(lambda: engine.core.stats().num_preemptions)
    assert engine.running == [old.request_id]
    answers = engine.finish()
    assert answers == {r.request_id: Engine().generate(r)[0].token_ids for r in (old, new)}


def test_the_lowest_priority_makes_room_whoever_came_first() -> None:
    engine = Engine(settings=_small(), scheduler="priority")
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
    engine = Engine(settings=_small())
    request = ask(12, 1, max_tokens=20)  # 8 blocks of 4 are exactly all
    assert len(engine.generate(request)[0].token_ids) == 20
    assert engine.core.stats().num_preemptions == 0


def test_admission_keeps_a_reserve_for_the_output() -> None:
    engine = Engine(settings=_small(num_blocks=17), max_num_seqs=4)
    first, second = ask(20, 1, max_tokens=40), ask(20, 2, max_tokens=40)
    engine.add(first, second)
    engine.step()
    assert engine.running == [first.request_id], "20 + 40 tokens do not fit beside the first one's 20"
    engine.add(ask(20, 3, max_tokens=2))
    engine.step()
    assert engine.running == [first.request_id], "those behind do not overtake, or a long one would starve"


def test_the_reserve_is_what_answers_usually_take() -> None:
    engine = Engine(settings=_small(num_blocks=33), max_num_seqs=4, max_num_batched_tokens=256)
    for v in range(30):
        engine.generate(ask(4, v, max_tokens=1))
    first, second = ask(60, 40, max_tokens=60), ask(56, 41, max_tokens=60)
    engine.add(first, second)
    engine.step()
    assert engine.running == [first.request_id, second.request_id], "answers had one token lately"


def test_a_prefix_that_others_hold_needs_no_room() -> None:
    engine = Engine(settings=_small(num_blocks=17), max_num_batched_tokens=256)
    first = make_request(prompt(40), max_tokens=5)
    engine.add(first)
    engine.step()
    second = make_request([*prompt(40), 97], max_tokens=5)
    engine.add(second)
    engine.step()
    assert engine.running == [first.request_id, second.request_id]


def test_a_retained_prefix_needs_its_own_room() -> None:
    """Its cells are free only as long as nobody takes the prefix over: counting them twice admits what cannot stay."""
    engine = Engine(settings=_small(num_blocks=17), max_num_seqs=4, max_num_batched_tokens=256)
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


# --- who is next ------------------------------------------------------------------------------------------------------


def _order_of_start(engine: Engine, requests: Sequence[EngineRequest]) -> list[int]:
    ids = [r.request_id for r in requests]
    started: list[str] = []
    while engine.core.has_requests():
        engine.step()
        started += engine.core.scheduler.take_started()
    return [ids.index(request_id) for request_id in started if request_id in ids]


def test_first_come_first_served() -> None:
    engine = Engine(max_num_seqs=1)
    requests = [ask(3, v, max_tokens=2, priority=-v) for v in range(5)]
    engine.add(*requests)
    assert _order_of_start(engine, requests) == [0, 1, 2, 3, 4]


def test_a_preempted_request_is_first_in_line_again() -> None:
    engine = Engine(max_num_seqs=1)
    first, second = ask(3, 1, max_tokens=5), ask(3, 2, max_tokens=5)
    engine.add(first, second)
    engine.step()
    engine.preempt(first.request_id)
    engine.step()
    assert engine.running == [first.request_id]


def test_lowest_priority_value_first_then_arrival() -> None:
    engine = Engine(max_num_seqs=1, scheduler="priority")
    requests = [ask(3, v, max_tokens=2, priority=p) for v, p in enumerate([1, 0, 2, 0, -1])]
    engine.add(*requests)
    assert _order_of_start(engine, requests) == [4, 1, 3, 0, 2]


class TestFairness:
    """Virtual token counters: what a tenant gets depends on what it got, not on how much it asks for."""

    @staticmethod
    def service(engine: Engine, tenants: dict[str, str]) -> dict[str, float]:
        """A prompt token counts one, an output token two, from what was really computed."""
        total = dict.fromkeys(tenants.values(), 0.0)
        for request_id, tenant in tenants.items():
            answer = engine.answers[request_id]
            total[tenant] += 2 * len(answer.token_ids)
            total[tenant] += 20 - answer.num_cached_tokens if answer.token_ids else 0
        return total

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("slots", [1, 4])
    def test_a_flood_does_not_take_the_other_tenants_share(self, slots: int, depth: Any) -> None:
        engine = Engine(settings=FakeSettings(depth=depth), max_num_seqs=slots, scheduler="fair", max_num_batched_tokens=128)
        flood = [ask(20, v, max_tokens=10, tenant="flood") for v in range(150)]
        calm = [ask(20, 200 + v, max_tokens=10, tenant="calm") for v in range(30)]
        engine.add(*flood, *calm)
        tenants = {r.request_id: r.tenant for r in [*flood, *calm]}
        bound = 2 * slots * (20 + 2 * 10)  # twice what can run at once, as in the paper
        worst = 0.0
        while not engine.is_done(*calm):
            engine.step()
            total = self.service(engine, tenants)
            worst = max(worst, abs(total["flood"] - total["calm"]))
        assert worst <= bound
        assert engine.num_done(flood) <= 30 + 2 * slots

    def test_the_same_flood_starves_the_other_tenant_without_fairness(self) -> None:
        engine = Engine(max_num_seqs=1, scheduler="fcfs", max_num_batched_tokens=128)
        flood = [ask(20, v, max_tokens=10, tenant="flood") for v in range(20)]
        calm = ask(20, 99, max_tokens=10, tenant="calm")
        engine.add(*flood, calm)
        engine.until(lambda: engine.answers[calm.request_id].token_ids)
        assert engine.num_done(flood) == 20

    def test_a_tenant_cannot_save_up_while_it_is_away(self) -> None:
        engine = Engine(max_num_seqs=1, scheduler="fair", max_num_batched_tokens=128)
        steady = [ask(20, v, max_tokens=10, tenant="steady") for v in range(40)]
        engine.add(*steady)
        engine.until(lambda: engine.num_done(steady) == 20)
        back = [ask(20, 100 + v, max_tokens=10, tenant="back") for v in range(40)]
        engine.add(*back)
        engine.until(lambda: engine.num_done(back) == 10)
        assert 28 <= engine.num_done(steady) <= 32, "they take turns; nobody makes up for the past"

    def test_long_answers_count_more_than_short_ones(self) -> None:
        engine = Engine(max_num_seqs=1, scheduler="fair", max_num_batched_tokens=128)
        long = [ask(10, v, max_tokens=46, tenant="long") for v in range(20)]  # service 10 + 2 * 45
        short = [ask(10, 50 + v, max_tokens=6, tenant="short") for v in range(20)]  # service 10 + 2 * 5
        engine.add(*long, *short)
        engine.until(lambda: engine.is_done(*short))
        assert engine.num_done(long) in (4, 5)

    def test_priority_goes_before_fairness(self) -> None:
        engine = Engine(max_num_seqs=1, scheduler="fair")
        requests = [ask(3, 1, max_tokens=2, tenant="a"), ask(3, 2, max_tokens=2, tenant="b", priority=-1)]
        engine.add(*requests)
        assert _order_of_start(engine, requests) == [1, 0]

    def test_prefix_hits_cost_nothing(self) -> None:
        engine = Engine(max_num_seqs=1, scheduler="fair", max_num_batched_tokens=256)
        warm = make_request(prompt(160), max_tokens=1, tenant="cached")
        engine.generate(warm)
        cached = [make_request([*prompt(160), 97 + v], max_tokens=1, tenant="cached") for v in range(10)]
        fresh = [ask(40, 9 + v, max_tokens=1, tenant="fresh") for v in range(3)]
        engine.add(*cached, *fresh)
        order = _order_of_start(engine, [*cached, *fresh])
        assert order.index(11) > 8, "nine hits of a token each cost less than one prompt of forty"

    def test_idle_tenants_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("inferflux_core.engine.policies.FairScheduler.MAX_TENANTS", 10)
        engine = Engine(max_num_seqs=2, scheduler="fair")
        engine.add(ask(3, 0, max_tokens=2000, tenant="keeps the engine busy"))
        for v in range(50):
            request = ask(3, v, max_tokens=1, tenant=f"t{v}")
            engine.add(request)
            engine.until(lambda request=request: engine.is_done(request))  # type: ignore[misc]
        assert len(vars(engine.scheduler)["_service"]) <= 11


# --- the end of a sequence --------------------------------------------------------------------------------------------


def _greedy(length: int, variant: int, count: int) -> list[int]:
    """What the fake model answers to a prompt when nothing stops it."""
    return Engine().generate(ask(length, variant, max_tokens=count))[0].token_ids


def test_max_tokens_is_exact() -> None:
    engine = Engine()
    answers = engine.generate(*(ask(5, v, max_tokens=v) for v in range(1, 5)))
    assert [(len(a.token_ids), a.finish_reason) for a in answers] == [(v, FinishReason.LENGTH) for v in range(1, 5)]


def test_a_stop_token_ends_and_is_not_part_of_the_output() -> None:
    tokens = _greedy(5, 1, 20)
    stop = next(t for t in tokens[3:] if t not in tokens[:3])
    engine = Engine()
    request = ask(5, 1, max_tokens=20, stop_token_ids=frozenset({stop}))
    engine.add(request)
    outputs = []
    while engine.core.has_requests():
        outputs += engine.step()
    cut = tokens.index(stop)
    assert [t for o in outputs for t in o.token_ids] == tokens[:cut]
    assert (outputs[-1].token_ids, outputs[-1].finish_reason) == ([], FinishReason.STOP)
    assert outputs[-1].num_generated == cut + 1, "the stop token was generated and is paid for"
    assert [o.num_generated for o in outputs] == list(range(1, cut + 2))


def test_a_stop_token_at_the_last_position_is_a_stop() -> None:
    tokens = _greedy(5, 1, 4)
    first = tokens.index(tokens[-1])
    request = ask(5, 1, max_tokens=first + 1, stop_token_ids=frozenset({tokens[first]}))
    assert Engine().generate(request)[0].finish_reason is FinishReason.STOP


def _ending_prompt() -> int:
    """Variant of a prompt whose greedy answer ends by itself after a few tokens."""
    for variant in range(500):
        answer = Engine().generate(ask(5, variant, max_tokens=12, ignore_eos=False))[0]
        if answer.finish_reason is FinishReason.STOP and 2 <= len(answer.token_ids) <= 6:
            return variant
    raise AssertionError("no prompt ends early")


def test_the_models_own_end_min_tokens_and_ignore_eos() -> None:
    variant = _ending_prompt()
    natural = Engine().generate(ask(5, variant, max_tokens=40, ignore_eos=False))[0]
    end = len(natural.token_ids)
    longer = Engine().generate(ask(5, variant, max_tokens=40, ignore_eos=False, min_tokens=end + 3))[0]
    forced = Engine().generate(ask(5, variant, max_tokens=40))[0]
    assert natural.finish_reason is FinishReason.STOP
    assert longer.token_ids[:end] == natural.token_ids
    assert len(longer.token_ids) >= end + 3
    assert (len(forced.token_ids), forced.finish_reason) == (40, FinishReason.LENGTH)


def test_a_request_that_can_never_run_is_answered_at_once() -> None:
    engine = Engine(settings=_small())
    too_long, empty = ask(30, 1, max_tokens=3), make_request([], max_tokens=3)
    engine.add(too_long, empty)
    assert [engine.answers[r.request_id].finish_reason for r in (too_long, empty)] == [FinishReason.ERROR] * 2
    assert not engine.core.has_requests()


@pytest.mark.parametrize("layout", ["paged", "sequence"])
def test_a_model_is_never_longer_than_its_cache(layout: Any) -> None:
    """Otherwise a request would wait for room that there never will be, and the engine would spin."""
    settings = FakeSettings(layout=layout, block_size=4, num_blocks=17, pool_tokens=64, max_model_len=4096)
    engine = Engine(settings=settings)
    assert engine.core.model_info.max_model_len == 64
    fits, over = ask(60, 1, max_tokens=4), ask(61, 1, max_tokens=4)
    answers = engine.generate(fits, over)
    assert [a.finish_reason for a in answers] == [FinishReason.LENGTH, FinishReason.ERROR]


def test_an_id_in_use_is_refused() -> None:
    engine = Engine()
    request = ask(5, 1)
    engine.add(request)
    with pytest.raises(ValueError, match="in use"):
        engine.core.add(request)


# --- aborts -----------------------------------------------------------------------------------------------------------


def test_abort_ends_running_and_waiting_and_knows_who_was_alive() -> None:
    engine = Engine(max_num_seqs=1)
    runs, waits, other = ask(5, 1), ask(5, 2), ask(5, 3, max_tokens=2)
    engine.add(runs, waits, other)
    engine.step()
    aborted = engine.core.abort([runs.request_id, "unknown", waits.request_id, runs.request_id])
    assert [(o.request_id, o.finish_reason) for o in aborted] == [
        (runs.request_id, FinishReason.ABORT),
        (waits.request_id, FinishReason.ABORT),
    ]
    engine.check()
    engine.run()
    assert len(engine.answers[other.request_id].token_ids) == 2
    assert not engine.core.has_requests()


# --- what is counted --------------------------------------------------------------------------------------------------


def test_started_is_told_once_even_over_preemption() -> None:
    engine = Engine(max_num_seqs=1)
    first, second = ask(5, 1, max_tokens=6), ask(5, 2, max_tokens=2)
    engine.add(first, second)
    scheduler = engine.core.scheduler
    assert scheduler.take_started() == []
    engine.step()
    assert scheduler.take_started() == [first.request_id]
    engine.preempt(first.request_id)
    engine.step()
    assert engine.running == [first.request_id]
    assert scheduler.take_started() == []
    engine.run()
    assert scheduler.take_started() == [second.request_id]


def test_cached_tokens_are_of_the_prompt_and_survive_preemption() -> None:
    engine = Engine()
    warm = make_request(prompt(64), max_tokens=1)
    engine.generate(warm)
    request = make_request(prompt(64) + prompt(8, 3), max_tokens=20, ignore_eos=True)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.preempt(request.request_id)
    engine.run()
    assert engine.answers[request.request_id].num_cached_tokens == 64


def test_counters() -> None:
    engine = Engine(max_num_batched_tokens=256, cost=lambda prefill, decodes: 2.0)
    first = make_request(prompt(64), max_tokens=3, ignore_eos=True)
    engine.generate(first)
    second = make_request(prompt(64) + prompt(10, 3), max_tokens=4, ignore_eos=True)
    engine.add(second)
    engine.step()
    stats = engine.core.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    assert stats.kv_cache_usage == pytest.approx(5 * 16 / (4095 * 16))
    engine.step()
    engine.preempt(second.request_id)
    assert engine.core.stats().num_waiting == 1
    engine.run()
    stats = engine.core.stats()
    # The second one's 74 tokens and first output were 4 full blocks and 11 tokens; those 11 were computed twice.
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.recomputed_prompt_tokens) == (64 + 10 + 10, 64, 10)
    assert stats.generation_tokens == 3 + 4
    assert (stats.num_preemptions, stats.prefix_cache_queries, stats.prefix_cache_hits) == (1, 3, 2)
    assert stats.num_steps == 3 + 4
    assert stats.step_tokens == (64 + 2) + (10 + 1) + (12 + 1)
    assert stats.model_seconds == pytest.approx(7 * 0.002)
    assert stats.schedule_seconds > 0
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s._slots.pop(), "slots leaked"),
        (lambda s: s.waiting.update(s.running), "runs and waits at once"),
        (lambda s: s._pending.owners.update({b"x": "gone"}), "still counts as computing"),
    ],
)
def test_integrity_notices_broken_books(damage: Callable[[TokenBudgetScheduler], object], message: str) -> None:
    engine = Engine()
    engine.add(ask(5, 1))
    engine.step()
    damage(engine.scheduler)
    with pytest.raises(AssertionError, match=message):
        engine.check()
