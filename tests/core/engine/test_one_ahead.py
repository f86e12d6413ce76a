"""Steps planned one ahead (depth 2), in exact steps: what counts as known, what is dropped, and when what it held is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from core.engine.watched import Engine, ask, prompt
from inferflux_core.engine.kv.paged import PagedKVCacheManager
from inferflux_core.engine.policies import FairScheduler
from inferflux_core.engine.scheduler import TokenBudgetScheduler
from inferflux_core.engine.types import EngineRequest, FinishReason, ModelRunnerOutput
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_settings import FakeSettings

LAYOUTS = pytest.mark.parametrize("layout", ["paged", "sequence"])


def ahead(settings: dict[str, Any] | None = None, **config: Any) -> Engine:
    """An engine that plans one step ahead."""
    return Engine(settings=FakeSettings(depth=2, **(settings or {})), **config)


def alone(request: EngineRequest) -> list[int]:
    """What the request brings at depth 1 when nobody else is there."""
    return Engine().generate(request)[0].token_ids


def stopping(length: int, variant: int, after: int) -> EngineRequest:
    """A request that a stop token ends with its `after`-th token, long before max_tokens."""
    while True:
        tokens = alone(ask(length, variant, max_tokens=after))
        if tokens[-1] not in tokens[:-1]:
            return ask(length, variant, max_tokens=40, stop_token_ids=frozenset({tokens[-1]}))
        variant += 100


def on_device(engine: Engine) -> list[bool]:
    """For each row of the newest plan whether its token is only known to the device."""
    return [row.tokens is None for row in engine.runner.plans[-1].rows]


def paged(engine: Engine) -> PagedKVCacheManager:
    assert isinstance(engine.scheduler.kv, PagedKVCacheManager)
    return engine.scheduler.kv


# --- the order of things ----------------------------------------------------------------------------------------------


def test_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    engine = ahead()
    engine.add(ask(5, max_tokens=3))
    assert engine.step() == [], "the first step's tokens come with the second call"
    outputs = [[len(o.token_ids) for o in engine.step()] for _ in range(3)]
    assert outputs == [[1], [1], [1]]
    assert engine.runner.calls == [
        *("launch 0", "sample 0"),
        *("launch 1", "collect 0", "sample 1"),
        *("launch 2", "collect 1", "sample 2"),
        *("collect 2",),
    ]
    assert not engine.core.has_requests()


def test_at_depth_1_every_step_is_collected_at_once() -> None:
    engine = Engine()
    engine.add(ask(5, max_tokens=2))
    assert [len(engine.step()) for _ in range(2)] == [1, 1]
    assert engine.runner.calls == ["launch 0", "sample 0", "collect 0", "launch 1", "sample 1", "collect 1"]
    assert all(row.tokens is not None for plan in engine.runner.plans for row in plan.rows)


def test_a_token_in_flight_counts_as_known_and_is_left_to_the_device() -> None:
    engine = ahead(max_num_batched_tokens=16)
    engine.add(ask(24))
    assert (engine.plan(), on_device(engine)) == ([(0, 0, 16, False)], [False])
    assert (engine.plan(), on_device(engine)) == ([(0, 16, 8, True)], [False])
    assert (engine.plan(), on_device(engine)) == ([(0, 24, 1, True)], [True])
    assert (engine.plan(), on_device(engine)) == ([(0, 25, 1, True)], [True])
    assert engine.core.stats().generation_tokens == 2, "the tokens of the last two steps are not known yet"


def test_decodes_and_chunks_share_a_step_as_at_depth_1() -> None:
    engine = ahead(max_num_batched_tokens=16)
    engine.add(ask(5, 1), ask(6, 2))
    assert engine.plan() == [(0, 0, 5, True), (1, 0, 6, True)]
    engine.add(ask(40, 3), ask(3, 4))
    assert (engine.plan(), on_device(engine)) == ([(0, 5, 1, True), (1, 6, 1, True), (2, 0, 14, False)], [True, True, False])
    assert engine.plan() == [(0, 6, 1, True), (1, 7, 1, True), (2, 14, 14, False)]
    assert engine.plan() == [(0, 7, 1, True), (1, 8, 1, True), (2, 28, 12, True)]
    assert (engine.plan(), on_device(engine)) == (
        [(0, 8, 1, True), (1, 9, 1, True), (2, 40, 1, True), (3, 0, 3, True)],
        [True, True, True, False],
    )


def test_plans_are_numbered_in_order() -> None:
    engine = ahead()
    engine.generate(ask(5, 1, max_tokens=6), ask(7, 2, max_tokens=3))
    assert [plan.step for plan in engine.runner.plans] == list(range(6))
    assert engine.core.stats().num_steps == 6


def test_the_cost_model_learns_from_every_step() -> None:
    engine = Engine(
        settings=FakeSettings(depth=2), max_num_batched_tokens=512, cost=lambda prefill, decodes: 5.0 + prefill / 10
    )
    engine.generate(*(ask(20 + 30 * v, v, max_tokens=4) for v in range(12)))
    model = engine.scheduler.context.cost_model
    assert model.predict(100, 0, 0) == pytest.approx(15, rel=0.05)
    assert engine.core.stats().model_seconds == pytest.approx(
        sum(5 + sum(r.n for r in p.rows if r.n > 1) / 10 for p in engine.runner.plans) / 1e3
    )


# --- lengths are known ahead ------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_row_is_planned_beyond_max_tokens(layout: str, max_tokens: int) -> None:
    engine = ahead({"layout": layout})
    request = ask(5, max_tokens=max_tokens)
    assert engine.generate(request)[0].token_ids == alone(request)
    rows = [row for plan in engine.runner.plans for row in plan.rows]
    assert [(row.start, row.n) for row in rows] == [(0, 5), *((5 + i, 1) for i in range(max_tokens - 1))]
    assert all(row.sample for row in rows)


def test_a_sequence_of_the_greatest_length_is_never_longer() -> None:
    engine = ahead({"block_size": 4, "num_blocks": 9, "max_model_len": 32})
    request = ask(20, max_tokens=12)
    assert engine.generate(request)[0].token_ids == alone(request)
    assert max(row.start + row.n for plan in engine.runner.plans for row in plan.rows) == 31


def test_whoever_has_its_last_token_in_flight_is_left_alone() -> None:
    """Its room comes back with the next collect: preempting it, or another for it, would compute something twice."""
    engine = ahead({"block_size": 4, "num_blocks": 9})
    ending, growing = ask(15, 1, max_tokens=1), ask(16, 2, max_tokens=12)  # 4 blocks each are all there are
    engine.scheduler._mean_output = 0.0  # no reserve for answers: both are admitted
    engine.add(ending, growing)
    assert engine.plan() == [(0, 0, 15, True), (1, 0, 16, True)]
    assert engine.plan() == [], "no room for the other one's next token yet, and no need to preempt"
    assert engine.plan() == [(1, 16, 1, True)]
    assert on_device(engine) == [False], "by now its token is known"
    assert engine.core.stats().num_preemptions == 0
    assert engine.finish() == {r.request_id: alone(r) for r in (ending, growing)}


# --- a stop token in flight -------------------------------------------------------------------------------------------


@LAYOUTS
def test_the_row_after_a_stop_token_is_dropped(layout: str) -> None:
    request = stopping(5, 1, after=3)
    engine = ahead({"layout": layout})
    answer = engine.generate(request)[0]
    assert (answer.token_ids, answer.finish_reason) == (alone(request), FinishReason.STOP)
    assert len(answer.token_ids) == 2
    rows = [(row.start, row.n) for plan in engine.runner.plans for row in plan.rows]
    assert rows == [(0, 5), (5, 1), (6, 1), (7, 1)], "the last one computed the stop token for nothing"
    assert engine.core.stats().generation_tokens == 3


def test_slot_and_cache_are_freed_when_the_last_step_that_used_them_is_collected() -> None:
    engine = ahead({"block_size": 4, "num_blocks": 20}, max_num_seqs=1)
    first, second = stopping(5, 1, after=3), ask(20, 2, max_tokens=2)
    engine.add(first, second)
    engine.until(lambda: engine.is_done(first))
    assert (engine.running, list(engine.scheduler.leaving)) == ([], [first.request_id])
    assert paged(engine).stats().used == 8, "the dropped row's two blocks"
    assert engine.core.stats().num_running == 0
    assert engine.plan() == [], "no slot is free yet"
    assert (list(engine.scheduler.leaving), paged(engine).stats().used) == ([], 0)
    assert engine.plan() == [(0, 0, 20, True)]
    assert engine.runner.plans[-1].free == [0]
    engine.run()
    assert engine.answers[second.request_id].token_ids == alone(second)


def test_what_a_dropped_row_computed_can_be_found() -> None:
    """Its input is known by the time it is collected: the stop token, here the last of a block."""
    request = stopping(5, 1, after=3)
    engine = ahead({"block_size": 4, "num_blocks": 20})
    answer = engine.generate(request)[0]
    (stop,) = request.params.stop_token_ids
    again = make_request([*request.prompt_token_ids, *answer.token_ids, stop, 99], max_tokens=2)
    assert engine.generate(again)[0].num_cached_tokens == 8


def test_a_stream_that_cannot_be_cut_is_found_at_its_true_length() -> None:
    request = stopping(40, 1, after=3)
    engine = ahead({"layout": "sequence", "can_trim": False})
    answer = engine.generate(request)[0]
    (stop,) = request.params.stop_token_ids
    again = make_request([*request.prompt_token_ids, *answer.token_ids, stop, 99], max_tokens=2)
    assert engine.generate(again)[0].num_cached_tokens == 43
    assert engine.answers[again.request_id].token_ids == alone(again)


@pytest.mark.parametrize(("depth", "cached"), [(1, 64), (2, 0)])
def test_a_running_stream_that_cannot_be_cut_is_no_donor_one_ahead(depth: int, cached: int) -> None:
    """It holds what the step in flight computes as well, so that a copy of it is too long."""
    settings = FakeSettings(depth=depth, layout="sequence", can_trim=False)
    engine = Engine(settings=settings, max_num_batched_tokens=64)
    donor = ask(200, 1, max_tokens=2)
    engine.add(donor)
    for _ in range(depth):
        engine.step()
    request = make_request([*donor.prompt_token_ids[:64], 7, 7], max_tokens=2)
    assert engine.scheduler.kv.get_computed_blocks(engine.scheduler.running[donor.request_id]).num_tokens == cached
    engine.add(request)
    assert engine.finish() == {r.request_id: alone(r) for r in (donor, request)}


# --- aborts -----------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_an_abort_waits_for_nothing_and_leaks_nothing(layout: str) -> None:
    engine = ahead({"layout": layout})
    runs, waits = ask(40, 1), ask(40, 2)
    engine.add(runs)
    engine.step()
    engine.step()
    engine.add(waits)
    calls = list(engine.runner.calls)
    aborted = engine.core.abort([runs.request_id, waits.request_id])
    assert [(o.request_id, o.finish_reason) for o in aborted] == [
        (runs.request_id, FinishReason.ABORT),
        (waits.request_id, FinishReason.ABORT),
    ]
    assert engine.runner.calls == calls
    assert (engine.core.stats().num_running, engine.core.stats().num_waiting) == (0, 0)
    assert engine.core.stats().kv_cache_usage > 0
    assert engine.core.has_requests(), "the step in flight has to be taken in"
    assert engine.core.abort([runs.request_id]) == []
    engine.check()
    assert engine.core.step() == []
    engine.check()
    assert not engine.core.has_requests()
    assert engine.core.stats().kv_cache_usage == 0
    assert len(engine.runner.plans) == 2


def test_an_id_may_be_used_again_while_the_aborted_one_is_still_in_flight() -> None:
    engine = ahead()
    first = ask(40, 1, request_id="same")
    engine.add(first)
    engine.step()
    engine.core.abort(["same"])
    second = ask(10, 2, max_tokens=5, request_id="same")
    engine.add(second)
    assert engine.plan() == [], "it starts when the first one's step is collected"
    assert engine.plan() == [(0, 0, 10, True)]
    engine.run()
    assert engine.answers["same"].token_ids == alone(second)


def test_what_an_aborted_one_computed_in_flight_can_be_found() -> None:
    engine = ahead()
    engine.add(ask(64, 1))
    engine.step()
    engine.abort(*engine.running)
    again = make_request([*prompt(64, 1), 99], max_tokens=2)
    assert engine.generate(again)[0].num_cached_tokens == 64


def test_a_preempted_one_can_be_aborted_before_its_step_is_collected() -> None:
    engine = ahead()
    request = ask(20, 1)
    engine.add(request)
    engine.step()
    engine.preempt(request.request_id)
    engine.abort(request.request_id)
    assert not engine.core.has_requests()
    assert engine.answers[request.request_id].finish_reason is FinishReason.ABORT


# --- preemption -------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_a_preempted_one_drops_the_token_in_flight_and_starts_over_after_it(layout: str) -> None:
    engine = ahead({"layout": layout})
    request, other = ask(20, 1, max_tokens=6), ask(20, 2, max_tokens=6)
    engine.add(request, other)
    for _ in range(3):
        engine.step()
    assert len(engine.answers[request.request_id].token_ids) == 2
    engine.preempt(request.request_id)
    assert (list(engine.scheduler.leaving), list(engine.scheduler.waiting)) == ([request.request_id],) * 2
    assert [slot for slot, *_ in engine.plan()] == [1], "it cannot start before its step is collected"
    assert len(engine.answers[request.request_id].token_ids) == 2, "the third one was dropped"
    assert list(engine.scheduler.leaving) == []
    resumed = {slot: start + n for slot, start, n, _ in engine.plan()}
    assert resumed[0] == 22, "known are the prompt and two tokens"
    assert on_device(engine) == [True, False]
    assert engine.finish() == {r.request_id: alone(r) for r in (request, other)}
    assert engine.core.stats().generation_tokens == 12


def test_one_victim_makes_room_and_not_all() -> None:
    """A victim in flight gives its room back only when its step is collected: until then nobody else has to go."""
    engine = ahead({"block_size": 4, "num_blocks": 13}, max_num_seqs=3)
    engine.scheduler._mean_output = 1.0
    requests = [ask(15, v, max_tokens=20) for v in range(3)]  # 4 blocks each are all there are
    engine.add(*requests)
    assert len(engine.plan()) == 3
    assert len(engine.plan()) == 3
    assert engine.plan() == [], "nobody gets room yet"
    assert (engine.core.stats().num_preemptions, engine.running) == (1, [r.request_id for r in requests[:2]])
    assert [slot for slot, *_ in engine.plan()] == [0, 1]
    assert engine.core.stats().num_preemptions == 1
    assert engine.finish() == {r.request_id: alone(r) for r in requests}


def test_a_victim_may_have_rows_in_flight_and_in_the_plan() -> None:
    engine = ahead({"block_size": 4, "num_blocks": 9}, scheduler="priority")
    engine.scheduler._mean_output = 0.0
    victim, important = ask(15, 1, max_tokens=9, priority=5), ask(16, 2, max_tokens=12, priority=1)
    engine.add(victim)
    assert engine.plan() == [(0, 0, 15, True)]
    engine.add(important)
    assert engine.plan() == [(0, 15, 1, True), (1, 0, 16, True)]
    assert engine.plan() == [], "the victim's row was planned first, and taken out again for the other one's"
    assert (engine.running, engine.core.stats().num_preemptions) == ([important.request_id], 1)
    assert list(engine.scheduler.leaving) == [], "what it had in flight is collected"
    assert engine.answers[victim.request_id].token_ids == alone(victim)[:1]
    assert engine.plan() == [(1, 16, 1, True)]
    assert engine.finish() == {r.request_id: alone(r) for r in (victim, important)}


def test_nobody_is_admitted_while_a_running_one_waits_for_room() -> None:
    engine = ahead({"block_size": 4, "num_blocks": 10}, max_num_batched_tokens=24)
    engine.scheduler._mean_output = 0.0
    grows, doomed, long, late = (
        ask(8, 1, max_tokens=3),
        ask(4, 2, max_tokens=9),
        ask(24, 3, max_tokens=4),
        ask(4, 4, max_tokens=2),
    )
    engine.add(grows, doomed, long)
    assert engine.plan() == [(0, 0, 8, True), (1, 0, 4, True), (2, 0, 12, False)]
    engine.abort(doomed.request_id)
    engine.add(late)
    assert engine.plan() == [(0, 8, 1, True)], "two blocks are free, the long one needs three and waits for the third"
    assert engine.plan() == [(0, 9, 1, True), (2, 12, 12, True)]
    engine.run()
    assert engine.core.stats().num_preemptions == 0
    assert all(engine.answers[r.request_id].token_ids == alone(r) for r in (grows, long, late))


# --- what is published ------------------------------------------------------------------------------------------------


def test_a_block_is_published_when_its_step_is_collected_and_not_before() -> None:
    engine = ahead({"block_size": 4})
    engine.add(ask(7, 1))
    published = []
    for _ in range(7):
        engine.step()
        published.append(len(paged(engine)._cached))
    # Collected: nothing; 7 tokens; 8, of which the last was in flight when its step was planned; 9; 10; 11; 12.
    assert published == [0, 1, 2, 2, 2, 2, 3]


def test_those_who_wait_for_a_prefix_start_when_its_step_is_collected() -> None:
    engine = ahead(max_num_batched_tokens=32)
    requests = [make_request([*prompt(96), 97 + i], max_tokens=4) for i in range(3)]
    engine.add(*requests)
    assert [engine.plan() for _ in range(3)] == [[(0, 0, 32, False)], [(0, 32, 32, False)], [(0, 64, 32, False)]]
    assert engine.plan() == [(0, 96, 1, True)], "the third chunk is still in flight"
    assert engine.plan() == [(0, 97, 1, True), (1, 96, 1, True), (2, 96, 1, True)]
    assert engine.finish() == {r.request_id: alone(r) for r in requests}
    assert [engine.answers[r.request_id].num_cached_tokens for r in requests] == [0, 96, 96]
    assert engine.core.stats().prompt_tokens == 97 + 1 + 1


def test_fairness_counts_the_same_service() -> None:
    services = []
    for depth in (1, 2):
        engine = Engine(settings=FakeSettings(depth=depth), scheduler="fair")
        engine.generate(ask(17, 1, max_tokens=8, tenant="a"), ask(1, 2, max_tokens=5, tenant="b"))
        assert isinstance(engine.scheduler, FairScheduler)
        services.append(engine.scheduler._service)
    assert services == [{"a": 17 + 2 * 7, "b": 1 + 2 * 4}] * 2


# --- the end of the engine --------------------------------------------------------------------------------------------


def test_closing_takes_in_what_is_in_flight() -> None:
    engine = ahead()
    engine.add(ask(5))
    engine.step()
    engine.step()
    engine.core.close()
    assert engine.runner.calls[-2:] == ["sample 1", "collect 1"]
    engine.core.close()
    assert engine.runner.calls[-1] == "collect 1", "once"


def test_after_a_failed_step_closing_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ahead()
    engine.add(ask(5))
    engine.step()
    monkeypatch.setattr(engine.runner, "collect", lambda ticket: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.core.step()
    engine.core.close()


def test_outputs_are_taken_in_in_the_order_of_their_plans() -> None:
    engine = ahead()
    engine.add(ask(5))
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError, match="order of their plans"):
        engine.scheduler.update_from_output(second, ModelRunnerOutput(second.step, [[97]], [None], 1.0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: next(iter(s.running.values())).__setattr__("num_in_flight", 0), "sampled tokens were lost"),
        (lambda s: next(iter(s.running.values())).__setattr__("num_scheduled_tokens", 5), "rows were lost"),
        (lambda s: s.leaving.update(s.running), "runs and leaves at once"),
        (lambda s: (s.leaving.update(s.running), s.running.clear(), s._planned.clear()), "rows were lost"),
    ],
)
def test_integrity_notices_broken_books(damage: Callable[[TokenBudgetScheduler], object], message: str) -> None:
    engine = ahead()
    engine.add(ask(5, 1))
    engine.step()
    engine.step()
    damage(engine.scheduler)
    with pytest.raises(AssertionError, match=message):
        engine.check()
