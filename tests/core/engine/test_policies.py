"""Which request is next: first come, priority, and fairness among tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from core.engine.watched import Engine, ask, prompt
from inferflux_core.engine.types import EngineRequest
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_settings import FakeSettings


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
