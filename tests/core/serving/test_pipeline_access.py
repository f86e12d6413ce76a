"""The pipeline and access control: every lease is settled, once, with what was used, and nothing of a request gets around."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from core.serving.noted_leases import ENDLESS, KEY, PROMPT, Stand, exhaust, made, request, standing
from inferflux_core.access.admission import RESERVED_OUTPUT_TOKENS
from inferflux_core.access.limits.quotas import LimitTable
from inferflux_core.errors import (
    AccessUnavailableError,
    ContextLengthExceededError,
    DrainingError,
    EngineRestartedError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RateLimitError,
    RequestError,
    RequestTimeoutError,
)
from inferflux_core.identity import Principal
from inferflux_core.serving.generation import Delta, Done, Started
from inferflux_core.settings import Limits


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with standing() as there:
        yield there


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_finished_answer_is_charged_for_what_it_used(stand: Stand) -> None:
    events, context = await stand.ask()
    assert isinstance(events[-1], Done)
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (12, 4)
    assert stand.book.entries == ["acquire tiny", "reserve 16", "settle 16"]
    assert context.outcome.finish_reason == "length"


async def test_several_prompts_and_choices_are_charged_together(stand: Stand) -> None:
    await stand.ask(prompts=[PROMPT, "four"], n=3, max_tokens=2)
    # A prompt is computed once, whatever is made of it.
    assert stand.book.entries == ["acquire tiny", f"reserve {16 + 12}", f"settle {16 + 12}"]


async def test_an_answer_that_may_be_long_reserves_no_more_than_is_usual(stand: Stand) -> None:
    await stand.ask(max_tokens=2000, stop_token_ids=list(range(256)))
    assert stand.book.entries == ["acquire tiny", f"reserve {12 + RESERVED_OUTPUT_TOKENS}", "settle 13"]


async def test_a_stop_string_ends_and_settles_what_the_engine_would_go_on_with(stand: Stand) -> None:
    events, context = await stand.ask(max_tokens=ENDLESS, stop=[" "])
    await stand.idle()
    done = events[-1]
    assert isinstance(done, Done)
    assert context.outcome.finish_reason == "stop"
    assert context.outcome.output_tokens == done.usage.completion_tokens < ENDLESS
    assert stand.book.entries[-1] == f"settle {12 + done.usage.completion_tokens}"
    assert len(stand.book.entries) == 3


@pytest.mark.parametrize("way", ["closed", "cancelled"])
async def test_a_client_that_leaves_pays_for_what_was_made_until_then(way: str) -> None:
    async with standing(backends={"fake": {"step_ms": 5}}) as stand:
        context, seen = made(KEY), asyncio.Event()

        async def read() -> None:
            async with contextlib.aclosing(stand.pipeline.generate(context, request(max_tokens=ENDLESS))) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        seen.set()
                        if way == "closed":
                            return

        task = asyncio.create_task(read())
        await seen.wait()
        if way == "cancelled":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stand.idle()
        outcome = context.outcome
        assert 0 < outcome.output_tokens < ENDLESS
        assert (outcome.prompt_tokens, outcome.finish_reason) == (12, "")
        assert stand.book.entries == ["acquire tiny", "reserve 1036", f"settle {12 + outcome.output_tokens}"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompts": ["x" * 5000]}, ContextLengthExceededError),
        ({"prompts": ["x" * 200_000]}, ContextLengthExceededError),
        ({"max_tokens": 4090}, ContextLengthExceededError),
        ({"prompts": [[]]}, InvalidRequestError),
        ({"logit_bias": {999: 1.0}}, InvalidRequestError),
        ({"stop_token_ids": [260]}, InvalidRequestError),
    ],
)
async def test_what_is_wrong_with_a_request_costs_a_request_and_no_token(
    stand: Stand, fields: dict[str, Any], error: type[RequestError]
) -> None:
    await stand.refused(error, **fields)
    assert stand.book.entries == ["acquire tiny", "settle 0"]


@pytest.mark.parametrize("cause", ["reserve", "store"])
async def test_a_reservation_that_is_refused_gives_the_slot_back(stand: Stand, cause: str) -> None:
    stand.book.refuse = cause
    context = await stand.refused(RateLimitError if cause == "reserve" else AccessUnavailableError)
    assert stand.book.entries == ["acquire tiny", "settle 0"]
    assert context.reply_headers == {"x-ratelimit-remaining-tokens": "1"}
    assert stand.engine.given == []


async def test_a_request_that_is_not_let_in_reaches_nothing(stand: Stand) -> None:
    stand.book.refuse = "acquire"
    await stand.refused(RateLimitError)
    stand.state.draining = True
    await stand.refused(DrainingError)
    assert (stand.book.entries, stand.engine.given) == ([], [])


async def test_a_full_queue_costs_nothing() -> None:
    async with standing(engine={"max_waiting_requests": 0, "max_num_seqs": 1}, backends={"fake": {"step_ms": 5}}) as stand:
        events = stand.pipeline.generate(made(KEY), request(max_tokens=ENDLESS))
        assert isinstance(await anext(events), Started)
        del stand.book.entries[:]
        await stand.refused(OverloadedError)
        assert stand.book.entries == ["acquire tiny", "reserve 16", "settle 0"]
        await events.aclose()
        await stand.idle()


async def test_the_deadline_settles(stand: Stand) -> None:
    context = made(KEY, seconds=0.0)
    with pytest.raises(RequestTimeoutError):
        await exhaust(stand.pipeline.generate(context, request(max_tokens=ENDLESS)))
    await stand.idle()
    assert stand.book.entries[-1] == f"settle {12 + context.outcome.output_tokens}"
    assert len(stand.book.entries) == 3


async def test_an_engine_that_fails_before_the_first_token_costs_nothing(stand: Stand) -> None:
    context = made(KEY)
    task = asyncio.create_task(anext(stand.pipeline.generate(context, request(max_tokens=ENDLESS))))
    while not stand.engine.given:  # noqa: ASYNC110  # the engine's thread reports to nobody
        await asyncio.sleep(0)
    stand.engine.crash()
    with pytest.raises(EngineRestartedError):
        await task
    assert stand.book.entries == ["acquire tiny", "reserve 1036", "settle 0"]


async def test_an_engine_that_fails_later_is_charged_for_what_was_delivered(stand: Stand) -> None:
    context = made(KEY)
    events = stand.pipeline.generate(context, request(max_tokens=ENDLESS))
    while not isinstance(await anext(events), Delta):
        pass
    stand.engine.crash()
    with pytest.raises(EngineRestartedError):
        await exhaust(events)
    assert context.outcome.output_tokens > 0
    assert stand.book.entries[-1] == f"settle {12 + context.outcome.output_tokens}"


# --- what a request may not choose ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "asked", "given"), [(0, 0, 0), (0, -5, 0), (0, 5, 5), (3, -1000, 3), (3, 7, 7), (-5, -5, -5)])
async def test_a_request_may_stand_back_and_never_push_in(stand: Stand, own: int, asked: int, given: int) -> None:
    await stand.ask(Principal(subject="key:k1", method="api_keys", priority=own), priority=asked)
    assert [found.priority for found in stand.engine.given] == [given]


async def test_a_request_that_says_nothing_has_the_priority_of_its_key(stand: Stand) -> None:
    await stand.ask(Principal(subject="key:k1", method="api_keys", priority=-5))
    assert [found.priority for found in stand.engine.given] == [-5]


async def test_the_tightest_cap_on_the_answer_counts() -> None:
    own = Principal(subject="key:k1", tenant="acme", method="api_keys", limits=Limits(max_tokens=7, rpm=9))
    table = LimitTable(tenants={"acme": Limits(max_tokens=5)}, models={"tiny": Limits(max_tokens=6, tpm=100)})
    async with standing(table) as stand:
        _, context = await stand.ask(own, max_tokens=100, min_tokens=50, n=2)
        assert [(r.params.max_tokens, r.params.min_tokens) for r in stand.engine.given] == [(5, 5)] * 2
        assert context.outcome.output_tokens == 10
        assert stand.book.entries == ["acquire tiny", "reserve 22", "settle 22"]
        assert [demand.subject for demand in stand.book.demands] == ["key:k1", "model:tiny"]
        await stand.ask(own, max_tokens=None)
        assert stand.engine.given[-1].params.max_tokens == 5, "also when the request says nothing"
        await stand.ask(own, max_tokens=3)
        assert stand.engine.given[-1].params.max_tokens == 3


async def test_a_quota_smaller_than_the_answer_reserves_what_there_is() -> None:
    async with standing(LimitTable(default=Limits(tpm=100))) as stand:
        await stand.ask(max_tokens=500)
        assert stand.book.entries == ["acquire tiny", "reserve 100", "settle 512"]


async def test_prefixes_are_kept_apart_by_tenant_and_then_by_salt(stand: Stand) -> None:
    pairs = [
        ("acme", ""),
        ("acme", "x"),
        ("acme", "globex"),
        ("globex", ""),
        ("globex", "acme"),
        ("globex", "\0acme"),
        ("g", "l"),
    ]
    for tenant, salt in pairs:
        await stand.ask(Principal(subject="key:k1", tenant=tenant, method="api_keys"), cache_salt=salt)
    assert len({found.cache_salt for found in stand.engine.given}) == len(pairs)
    assert [found.tenant for found in stand.engine.given] == [tenant for tenant, _ in pairs]
    warming = made(KEY)
    warming.cache_tenant = "globex"  # as an administrator does who fills a tenant's cache beforehand
    await exhaust(stand.pipeline.generate(warming, request()))
    assert (stand.engine.given[-1].cache_salt, stand.engine.given[-1].tenant) == (stand.engine.given[3].cache_salt, "acme")
    _, again = await stand.ask(Principal(subject="key:k2", tenant="globex", method="oidc"))
    assert stand.engine.given[-1].cache_salt == stand.engine.given[3].cache_salt, "the key does not matter"
    assert again.outcome.prompt_tokens == 12


# --- what the reply and the audit log say -----------------------------------------------------------------------------


async def test_the_headers_are_there_with_the_first_event_and_say_what_is_left_then(stand: Stand) -> None:
    context = made(KEY)
    async for event in stand.pipeline.generate(context, request()):
        assert context.reply_headers == {"x-ratelimit-remaining-tokens": "2"}, "after acquiring and reserving"
        assert event is not None


async def test_the_outcome_names_the_model_that_answered_and_counts(stand: Stand) -> None:
    text = "a prompt of more than sixteen bytes, for the cache"
    _, context = await stand.ask(model="small", prompts=[text])
    outcome = context.outcome
    assert (outcome.requested_model, outcome.model) == ("small", "tiny")
    assert outcome.fingerprint == stand.models.get("tiny").fingerprint != ""
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (len(text), 4, 0)
    assert outcome.content == {"prompt": text}
    assert [(j.obj, j.action, j.decision.allowed) for j in context.judged] == [("model/tiny", "generate", True)]
    _, again = await stand.ask(model=None, prompts=[text], n=2)
    assert (again.outcome.requested_model, again.outcome.model, again.outcome.cached_tokens) == (None, "tiny", 48)


async def test_the_digest_of_the_parameters_tells_equal_from_different(stand: Stand) -> None:
    digests = [
        (await stand.ask(**fields))[1].outcome.parameters
        for fields in ({}, {"prompts": ["other"]}, {"seed": 1}, {"max_tokens": 3}, {"stop": ["x"]}, {"logit_bias": {1: 1.0}})
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert all(len(digest) == 16 for digest in digests)


async def test_a_decision_that_refuses_is_kept_as_well(stand: Stand) -> None:
    context = made(Principal(subject="key:k1", method="api_keys", models=("other-*",)))
    with pytest.raises(ModelNotFoundError):
        await anext(stand.pipeline.generate(context, request()))
    assert [(j.obj, j.decision.allowed, j.decision.engine) for j in context.judged] == [("model/tiny", False, "models")]
    assert (context.outcome.requested_model, context.outcome.model, context.outcome.content) == ("tiny", "", {})
    context = made(Principal(subject="key:k1", method="api_keys", scopes=frozenset({"read"})))
    with pytest.raises(ForbiddenError):
        await anext(stand.pipeline.generate(context, request(model="absent")))
    assert [(j.obj, j.decision.engine) for j in context.judged] == [("model/*", "scopes")]
    assert stand.book.entries == []
