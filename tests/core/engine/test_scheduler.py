"""What the scheduler puts into a step, seen through plans and outputs of an engine with the fake backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.engine.watched import Engine, ask, prompt
from inferflux_core.engine.cost_model import StepCostModel
from inferflux_core.engine.prefill_chunks import PrefillChunks
from inferflux_core.engine.types import EngineRequest
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
        context = engine.scheduler.context
        engine.scheduler._chunks = PrefillChunks(replace(context.caps, prefill_tile=8), 256, None, context.cost_model)
        engine.generate(make_request(shared, max_tokens=1))
        request = make_request(shared + prompt(tail, 5), max_tokens=4)
        alone = Engine().generate(request)[0]
        engine.add(request)
        engine.step()
        assert engine.runner.plans[-1].rows[0].start == start
        engine.run()
        assert engine.answers[request.request_id].token_ids == alone.token_ids
