"""How sequences end, and what the engine tells and counts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from core.engine.watched import Engine, ask, prompt, small_cache
from inferflux_core.engine.scheduler import TokenBudgetScheduler
from inferflux_core.engine.types import FinishReason
from inferflux_core.testing.driver import make_request
from inferflux_core.testing.fake_settings import FakeSettings

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
    engine = Engine(settings=small_cache())
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
