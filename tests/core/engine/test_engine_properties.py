"""Whatever arrives, is aborted or runs out of room: every request answers as if it were alone, and everything is given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import msgspec
from hypothesis import HealthCheck, assume, given, settings, target
from hypothesis import strategies as st

from inferflux_core.engine.types import EngineRequest, FinishReason, SamplingParams
from inferflux_core.interfaces import EngineConfig
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import Answer, EngineDriver
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings
from inferflux_core.testing.scripted_drafts import ScriptedDrafts

REGISTRY = load_plugins()
MODEL_LEN = 128
LETTERS = b"etaoinshr"


@dataclass(frozen=True)
class Case:
    """One engine, what arrives when (in steps), who is aborted when, and which of the drafts are wrong (None: no drafts)."""

    backend: FakeSettings
    config: EngineConfig
    scheduler: str
    requests: Sequence[EngineRequest]
    arrivals: Sequence[int]
    prefill_tile: int
    aborts: dict[str, int] = field(default_factory=dict)
    wrong_drafts: int | None = None


@st.composite
def backends(draw: st.DrawFn) -> FakeSettings:
    """Caches that hold one longest sequence and not much more."""
    layout: Any = draw(st.sampled_from(["paged", "sequence"]))
    block_size = draw(st.sampled_from([1, 4, 16]))
    room = draw(st.sampled_from([MODEL_LEN, MODEL_LEN + 30, 2 * MODEL_LEN, 40 * MODEL_LEN]))
    return FakeSettings(
        layout=layout,
        block_size=block_size,
        num_blocks=-(-room // block_size) + 1,
        pool_tokens=room if layout == "sequence" and draw(st.booleans()) else None,
        num_streams=draw(st.sampled_from([None, 6, 12])) if layout == "sequence" else None,
        can_trim=draw(st.booleans()),
        max_model_len=MODEL_LEN,
        depth=draw(st.sampled_from([1, 2])),
        max_draft=draw(st.sampled_from([0, 1, 7])),
    )


@st.composite
def engine_requests(draw: st.DrawFn, number: int, stems: Sequence[list[int]]) -> EngineRequest:
    stem = draw(st.sampled_from(stems))
    cut = draw(st.integers(1, len(stem)))
    tail = draw(st.lists(st.sampled_from(LETTERS), max_size=8))
    plain = draw(st.booleans())
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 40)),
        min_tokens=0 if plain else draw(st.sampled_from([0, 4])),
        temperature=0.0 if plain else draw(st.sampled_from([0.0, 0.9])),
        top_p=1.0 if plain else draw(st.sampled_from([1.0, 0.9])),
        frequency_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.7])),
        repetition_penalty=1.0 if plain else draw(st.sampled_from([1.0, 1.2])),
        seed=draw(st.integers(0, 3)),
        stop_token_ids=frozenset(draw(st.lists(st.sampled_from(LETTERS), max_size=1))),
        ignore_eos=not plain and draw(st.booleans()),
        logprobs=None if plain else draw(st.sampled_from([None, 2])),
    )
    return EngineRequest(
        request_id=f"r{number}",
        prompt_token_ids=stem[:cut] + tail,
        params=params,
        cache_salt=draw(st.sampled_from(["", "salt"])),
        tenant=draw(st.sampled_from(["a", "b", "c"])),
        priority=draw(st.integers(-1, 1)),
        arrival_time=draw(st.sampled_from([0.0, float(number)])),
    )


@st.composite
def cases(draw: st.DrawFn, aborting: bool) -> Case:
    seed = draw(st.integers(0, 2**16))
    stems = [[LETTERS[(seed >> (i % 12)) * (v + 3 + i) % len(LETTERS)] for i in range(80)] for v in range(2)]
    count = draw(st.integers(1, 12))
    requests = [draw(engine_requests(number, stems)) for number in range(count)]
    moments = st.integers(0, 40)
    return Case(
        backend=draw(backends()),
        config=EngineConfig(
            max_num_seqs=draw(st.sampled_from([1, 3, 6])),
            max_num_batched_tokens=draw(st.sampled_from([16, 40, 256])),
            itl_target_ms=draw(st.sampled_from([None, 0.05, 5.0])),
            enable_prefix_caching=draw(st.booleans()) or draw(st.booleans()),
        ),
        scheduler=draw(st.sampled_from(["fcfs", "priority", "fair"])),
        requests=requests,
        arrivals=sorted(draw(st.lists(moments, min_size=count, max_size=count))),
        prefill_tile=draw(st.sampled_from([1, 1, 6])),
        aborts={r.request_id: draw(moments) for r in requests if aborting and draw(st.booleans())},
        wrong_drafts=draw(st.sampled_from([None, 0, 1, 2, 5])),
    )


@cache
def _alone(prompt: tuple[int, ...], params: bytes) -> Answer:
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=4096, enable_prefix_caching=False, itl_target_ms=None)
    driver = EngineDriver(FakeRunner(FakeSettings(max_model_len=MODEL_LEN), config), config, registry=REGISTRY)
    request = EngineRequest(
        request_id="alone",
        prompt_token_ids=list(prompt),
        params=msgspec.msgpack.decode(params, type=SamplingParams),
    )
    return driver.generate(request)[0]


def alone(request: EngineRequest) -> Answer:
    """What a request brings when nobody else is there and nothing is shared, cut or short."""
    return _alone(tuple(request.prompt_token_ids), msgspec.msgpack.encode(request.params))


def driver_for(case: Case) -> EngineDriver:
    runner = FakeRunner(case.backend, case.config)
    runner.caps = replace(runner.caps, prefill_tile=case.prefill_tile)
    if case.wrong_drafts is None:
        return EngineDriver(runner, case.config, case.scheduler, REGISTRY)
    # Of requests with one prompt and several answers the last is drafted for all.
    answers = [(r.prompt_token_ids, alone(r).token_ids) for r in case.requests]
    drafts = ScriptedDrafts(answers, wrong_every=case.wrong_drafts, length=6)
    return EngineDriver(runner, case.config, case.scheduler, REGISTRY, speculation=drafts.always())


def run(case: Case) -> EngineDriver:
    """Steps with the books checked after each; an engine that makes no progress fails."""
    driver = driver_for(case)
    # Every step computes a token at least, and a preemption costs a sequence at most what it has.
    limit = 50 + 3 * sum(len(r.prompt_token_ids) + r.params.max_tokens for r in case.requests)
    started: list[str] = []
    added = step = 0
    while added < len(case.requests) or driver.core.has_requests():
        while added < len(case.requests) and case.arrivals[added] <= step:
            driver.add(case.requests[added])
            added += 1
        driver.abort(*(request_id for request_id, moment in case.aborts.items() if moment == step))
        driver.step()
        started += driver.core.scheduler.take_started()
        step += 1
        assert step < limit, f"no progress: {driver.core.stats()}"
    stats = driver.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert len(started) == len(set(started)), "started twice"
    assert set(driver.answers) - set(started) <= set(case.aborts), "never started"
    target(float(stats.num_preemptions), label=f"preemptions at depth {case.backend.depth}")
    return driver


@given(cases(aborting=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_in_any_company_a_request_answers_as_if_alone(case: Case) -> None:
    driver = run(case)
    for request in case.requests:
        answer, expected = driver.answers[request.request_id], alone(request)
        assert (answer.token_ids, answer.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert answer.logprobs == expected.logprobs
        assert answer.num_cached_tokens < len(request.prompt_token_ids)
    stats = driver.core.stats()
    prompts = sum(len(r.prompt_token_ids) for r in case.requests)
    once = stats.prompt_tokens - stats.recomputed_prompt_tokens
    assert once + stats.cached_prompt_tokens <= prompts
    assert stats.num_preemptions or once + stats.cached_prompt_tokens == prompts
    assert stats.prefix_cache_hits <= stats.prefix_cache_queries == len(case.requests) + stats.num_preemptions


@given(cases(aborting=True))
@settings(max_examples=36, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_an_abort_cuts_one_answer_short_and_touches_no_other(case: Case) -> None:
    assume(case.aborts)
    driver = run(case)
    for request in case.requests:
        answer, expected = driver.answers[request.request_id], alone(request)
        if answer.finish_reason is FinishReason.ABORT:
            assert request.request_id in case.aborts
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        else:
            assert (answer.token_ids, answer.finish_reason) == (expected.token_ids, expected.finish_reason)


@given(cases(aborting=False), st.data())
@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_preempting_anyone_at_any_moment_changes_no_answer(case: Case, data: st.DataObject) -> None:
    driver = driver_for(case)
    driver.add(*case.requests)
    scheduler: Any = driver.core.scheduler
    for _ in range(data.draw(st.integers(1, 12))):
        driver.step()
        if scheduler.running and data.draw(st.booleans()):
            driver.preempt(data.draw(st.sampled_from(list(scheduler.running))))
    driver.run()
    for request in case.requests:
        assert driver.answers[request.request_id].token_ids == alone(request).token_ids


@given(cases(aborting=True))
@settings(max_examples=36, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_one_step_ahead_answers_the_same(case: Case) -> None:
    """Depth 2 against depth 1; an abort may come a step earlier in the one than in the other."""
    answers = [run(replace(case, backend=case.backend.model_copy(update={"depth": depth}))).answers for depth in (1, 2)]
    for request in case.requests:
        one, two = (of_depth[request.request_id] for of_depth in answers)
        shared = min(len(one.token_ids), len(two.token_ids))
        assert one.token_ids[:shared] == two.token_ids[:shared]
        if FinishReason.ABORT not in (one.finish_reason, two.finish_reason):
            assert (one.token_ids, one.finish_reason, one.logprobs) == (two.token_ids, two.finish_reason, two.logprobs)
        else:
            assert request.request_id in case.aborts
