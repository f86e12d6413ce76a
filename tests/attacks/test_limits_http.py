"""Attacks and faults 55, 56 and 58 on quotas, through the front door; the limiters by themselves are in test_limits.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from attacks.access_server import PEPPER, USER, AccessServer, burst, chat, guarded, make_keys, running
from attacks.raw_http import Reply
from redis_server import RedisServer, running_redis
from served import events, until

DAY = 1_000_000
PROMPT = 21  # tokens of the messages of `chat()`, as the fake model's template writes them


def user(tenant: str = "acme", **limits: int) -> dict[str, Any]:
    return {**USER, "tenant": tenant, "limits": limits}


KEYS = {
    "ten": user(rpm=10),
    "three": user(concurrency=3),
    "counted": user(concurrency=1, daily_tokens=DAY),
    "stormy": user(concurrency=8, daily_tokens=DAY),
    "debtor": user(tpm=200),
    "shared-a": {**USER, "tenant": "shared"},
    "shared-b": {**USER, "tenant": "shared"},
    "free-a": {**USER, "tenant": "a"},
    "free-b": {**USER, "tenant": "b"},
}
MODELS = [
    {"source": "fake", "name": "tiny"},
    {"source": "fake:2", "name": "slow", "backend_settings": {"step_ms": 15}},
    {"source": "fake:3", "name": "fragile", "backend_settings": {"crash_token": ord("q"), "step_ms": 20}},
]
LIMITS = {"tenants": {"shared": {"rpm": 6}}, "models": {"slow": {"concurrency": 4}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccessServer]:
    with guarded(tmp_path_factory.mktemp("limits"), KEYS, models=MODELS, limits=LIMITS) as found:
        yield found


def told_to_wait(reply: Reply | httpx.Response, words: str, code: str = "rate_limit_exceeded") -> None:
    """It is a 429 that says why and how long."""
    status = reply.status if isinstance(reply, Reply) else reply.status_code
    error = reply.error if isinstance(reply, Reply) else reply.json()["error"]
    assert (status, error["code"]) == (429, code)
    assert words in error["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 86_400


def passed(replies: list[Reply]) -> int:
    assert {reply.status for reply in replies} <= {200, 429}
    return sum(reply.status == 200 for reply in replies)


@contextlib.contextmanager
def streams(server: AccessServer, name: str, count: int, **fields: Any) -> Iterator[list[Iterator[dict[str, Any]]]]:
    """So many running streams of the slow model that have each sent something; closed afterwards."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.client(name))
        body = chat(**{"model": "slow", "stream": True, "max_tokens": 2000, "ignore_eos": True, **fields})
        found = []
        for _ in range(count):
            reply = stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            assert reply.status_code == 200, reply.read()
            found.append(events(reply.iter_lines()))
            next(found[-1])
        yield found


# --- 55: never more than there may be ---------------------------------------------------------------------------------


async def test_55_exactly_ten_of_a_thousand_pass(server: AccessServer) -> None:
    begun = time.monotonic()
    replies = await burst(server.url, [server.chat_bytes("ten", max_tokens=1)] * 1000, 100)
    seconds = time.monotonic() - begun
    assert 10 <= passed(replies) <= 10 + seconds // 6, "ten, and one more every six seconds if this machine is that slow"
    for reply in replies:
        assert reply.headers["x-ratelimit-limit-requests"] == "10"
        if reply.status == 429:
            told_to_wait(reply, "10 requests a minute")
            assert int(reply.headers["retry-after"]) <= 6
            assert reply.headers["x-ratelimit-remaining-requests"] == "0"
            assert re.fullmatch(r"(\d+m)?\d+(\.\d+)?s", reply.headers["x-ratelimit-reset-requests"])
    left = {int(reply.headers["x-ratelimit-remaining-requests"]) for reply in replies if reply.status == 200}
    assert left <= set(range(10))
    print(f"1,000 requests in {seconds:.1f} s")


def test_55_three_run_at_one_time_and_a_fourth_is_refused(server: AccessServer) -> None:
    with streams(server, "three", 3):
        for model in ("slow", "tiny"):
            told_to_wait(server.chat("three", model=model), "3 concurrent requests")
    until(lambda: server.chat("three").status_code == 200, 5)


async def test_55_never_more_than_three_run(server: AccessServer) -> None:
    """Watched where it counts: in the engine."""
    request = server.chat_bytes("three", model="slow", max_tokens=10, ignore_eos=True)
    most, ended = 0, asyncio.Event()

    async def watch() -> None:
        nonlocal most
        async with httpx.AsyncClient(base_url=server.url, headers=server.keys["free-a"].headers) as client:
            while not ended.is_set():
                page = (await client.get("/metrics")).text
                found = re.search(r'^inferflux_requests_running\{model="slow"\} (\S+)$', page, re.MULTILINE)
                assert found is not None
                most = max(most, int(float(found[1])))
                await asyncio.sleep(0.01)

    watcher = asyncio.create_task(watch())
    replies = await burst(server.url, [request] * 100, 20)
    ended.set()
    await watcher
    assert 1 <= most <= 3
    assert 3 <= passed(replies) < 100
    refused = [reply for reply in replies if reply.status == 429]
    for reply in refused:
        told_to_wait(reply, "3 concurrent requests")


async def test_55_the_keys_of_a_tenant_share_its_limit(server: AccessServer) -> None:
    begun = time.monotonic()
    replies = await asyncio.gather(*(burst(server.url, [server.chat_bytes(f"shared-{x}")] * 20, 4) for x in "ab"))
    assert 6 <= sum(map(passed, replies)) <= 6 + (time.monotonic() - begun) // 10
    for reply in [*replies[0], *replies[1]]:
        assert reply.headers["x-ratelimit-limit-requests"] == "6"
        if reply.status == 429:
            told_to_wait(reply, "tenant 'shared'")
    assert server.chat("free-a").status_code == 200


def test_55_all_share_the_limit_of_a_model_and_learn_nothing_of_each_other(server: AccessServer) -> None:
    with streams(server, "free-a", 3), streams(server, "free-b", 1):
        for name in ("free-a", "free-b"):
            refused = server.chat(name, model="slow")
            told_to_wait(refused, "model 'slow', for all its users together, is 4 concurrent requests")
            assert not [header for header in refused.headers if header.startswith("x-ratelimit")]
            assert server.chat(name).status_code == 200
    until(lambda: server.chat("free-b", model="slow").status_code == 200, 5)


# --- 56: what was reserved comes back ---------------------------------------------------------------------------------


def whole(server: AccessServer) -> str:
    reply = server.chat("counted", max_tokens=50)
    assert reply.status_code == 200
    # Said after the reservation, before the end.
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) % DAY > 0
    return reply.headers["x-request-id"]


def streamed(server: AccessServer) -> str:
    reply = server.chat("counted", max_tokens=50, stream=True)
    assert reply.text.endswith("data: [DONE]\n\n")
    return reply.headers["x-request-id"]


def stopped(server: AccessServer) -> str:
    """A stop string ends it while the engine would go on for long."""
    reply = server.chat("counted", model="slow", max_tokens=2000, stop=[" "], ignore_eos=True)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    return reply.headers["x-request-id"]


def left_a_stream(server: AccessServer) -> str:
    with streams(server, "counted", 1) as (chunks,):
        for _ in range(5):
            next(chunks)
        told_to_wait(server.chat("counted"), "1 concurrent")
    return newest(server)


def left_a_whole_answer(server: AccessServer) -> str:
    with pytest.raises(httpx.ReadTimeout), server.client("counted") as client:
        client.post("/v1/chat/completions", json=chat(model="slow", max_tokens=2000, ignore_eos=True), timeout=0.2)
    return newest(server)


def too_long(server: AccessServer) -> str:
    reply = server.chat("counted", messages=[{"role": "user", "content": "x" * 5000}])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    return reply.headers["x-request-id"]


def bad_token(server: AccessServer) -> str:
    reply = server.chat("counted", logit_bias={"999": 1})
    assert reply.status_code == 400
    return reply.headers["x-request-id"]


def crashed_in_the_prompt(server: AccessServer) -> str:
    reply = server.chat("counted", model="fragile", messages=[{"role": "user", "content": "q"}])
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_restarted")
    return reply.headers["x-request-id"]


def newest(server: AccessServer) -> str:
    """Id of the request that its client just left."""
    until(lambda: server.records()[-1].get("status") == 499, 5)
    return str(server.records()[-1]["request_id"])


def left(server: AccessServer, name: str = "counted") -> int:
    """Tokens of the day that are left after a request of known size, for which there must be a slot."""
    replies: list[httpx.Response] = []

    def slot_is_free() -> bool:
        replies.append(server.chat(name, max_tokens=1))
        return replies[-1].status_code == 200

    until(slot_is_free, 5)
    assert replies[-1].json()["usage"]["total_tokens"] == PROMPT + 1
    return int(replies[-1].headers["x-ratelimit-remaining-tokens"])


Ending = Callable[[AccessServer], str]
ENDINGS: list[tuple[Ending, int]] = [
    (whole, 200),
    (streamed, 200),
    (stopped, 200),
    (left_a_stream, 499),
    (left_a_whole_answer, 499),
    (too_long, 400),
    (bad_token, 400),
    (crashed_in_the_prompt, 503),
]


@pytest.mark.parametrize(("ending", "status"), ENDINGS, ids=[ending.__name__ for ending, _ in ENDINGS])
def test_56_slot_and_tokens_come_back(server: AccessServer, ending: Ending, status: int) -> None:
    before = left(server)
    record = server.record_of(ending(server))
    assert record["status"] == status
    if status in (400, 503):
        assert record["tokens_out"] == 0
        used = 0
    else:
        assert record["tokens_out"] > 0
        assert record["tokens_in"] >= PROMPT
        used = record["tokens_in"] + record["tokens_out"]
    assert left(server) == before - used - PROMPT - 1


async def test_56_clients_that_leave_at_any_point_leave_nothing_behind(server: AccessServer) -> None:
    """What the quota lost is what the audit log says that was used, to the token."""
    before, seen = left(server, "stormy"), len(server.records())
    data, address = (
        server.chat_bytes("stormy", model="slow", max_tokens=500, ignore_eos=True, stream=True),
        urlsplit(server.url),
    )

    async def leave(after: int) -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(data if after >= 0 else data[:after])
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError):
            await asyncio.wait_for(reader.readexactly(max(0, after)), 1)
        writer.close()
        await writer.wait_closed()

    for turn in range(10):
        await asyncio.gather(*(leave(after) for after in (-turn - 1, 0, 1, 300, 600 + 200 * turn)))

    def records() -> list[dict[str, Any]]:
        return [r for r in server.records()[seen:] if r.get("api") == "/v1/chat/completions" and r["status"] != 200]

    until(lambda: len(records()) == 50, 10)
    assert {record["status"] for record in records()} <= {429, 499}
    used = sum(record.get("tokens_in", 0) + record.get("tokens_out", 0) for record in records())
    assert used > 10 * PROMPT
    assert left(server, "stormy") == before - used - PROMPT - 1
    with streams(server, "stormy", 4):
        assert server.chat("stormy").status_code == 200


def test_56_an_engine_that_crashes_mid_stream(server: AccessServer) -> None:
    """What was delivered counts, prompt and all; the rest of the reservation comes back."""
    messages = next(messages for messages in prompts() if "q" in answer(server, messages)[5:])
    until(lambda: server.chat("free-a", model="fragile", max_tokens=1).status_code == 200, 15)
    before = left(server)
    body = chat(model="fragile", stream=True, messages=messages, max_tokens=60, ignore_eos=True)
    with server.client("counted") as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        chunks = list(events(reply.iter_lines()))
        request_id = reply.headers["x-request-id"]
    assert chunks[-1]["error"]["code"] == "engine_restarted"
    record = server.record_of(request_id)
    assert record["error"] == "engine_restarted"
    assert record["tokens_out"] > 0
    assert left(server) == before - record["tokens_in"] - record["tokens_out"] - PROMPT - 1


def prompts() -> Iterator[list[dict[str, str]]]:
    """Messages in which the token is not that kills the fragile model."""
    return ([{"role": "user", "content": f"number {number}"}] for number in itertools.count())


def answer(server: AccessServer, messages: list[dict[str, str]]) -> str:
    """What a healthy model answers: the fragile one begins with the same."""
    reply = server.chat("free-a", messages=messages, max_tokens=60, ignore_eos=True)
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text if "q" not in text[:5] else ""


# --- 58: tokens run out mid-stream ------------------------------------------------------------------------------------


def test_58_a_stream_that_draws_more_than_there_is_finishes(server: AccessServer) -> None:
    with server.client("debtor") as client:
        body = chat(stream=True, max_tokens=400, ignore_eos=True, stream_options={"include_usage": True})
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.headers["x-ratelimit-limit-tokens"] == "200"
            assert reply.headers["x-ratelimit-remaining-tokens"] == "0"
            told_to_wait(server.chat("debtor"), "200 tokens a minute")
            chunks = list(events(reply.iter_lines()))
        assert chunks[-1]["usage"]["completion_tokens"] == 400
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        refused = client.post("/v1/chat/completions", json=chat())
    told_to_wait(refused, "200 tokens a minute")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(refused.headers["retry-after"]) > 55, "it went into debt by as much as it drew"


# --- replicas that share Redis ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AccessServer, AccessServer, RedisServer]]:
    folder = tmp_path_factory.mktemp("replicas")
    with running_redis(folder) as redis, contextlib.ExitStack() as stack:
        keys = make_keys(folder / "keys.db", {"ten": user(rpm=10), "counted": user(concurrency=1, daily_tokens=DAY)})
        found = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            auth = {"api_keys": {"store": str(folder / "keys.db"), "pepper": PEPPER}}
            limits = {"store": "redis", "redis_url": redis.url}
            found.append(stack.enter_context(running(folder / name, keys, models=MODELS[:2], limits=limits, auth=auth)))
        yield found[0], found[1], redis


async def test_redis_exactly_ten_of_a_thousand_pass_two_servers(
    replicas: tuple[AccessServer, AccessServer, RedisServer],
) -> None:
    one, two, redis = replicas
    begun = time.monotonic()
    request = one.chat_bytes("ten", max_tokens=1)
    replies = await asyncio.gather(*(burst(server.url, [request] * 500, 25) for server in (one, two)))
    assert 10 <= sum(map(passed, replies)) <= 10 + (time.monotonic() - begun) // 6
    for reply in [*replies[0], *replies[1]]:
        if reply.status == 429:
            told_to_wait(reply, "10 requests a minute")
    assert redis.client.exists(f"{{inferflux}}:key:{one.keys['ten'].id}") == 1, "it was counted there"


def test_redis_what_one_server_took_comes_back_for_the_other(replicas: tuple[AccessServer, AccessServer, RedisServer]) -> None:
    one, two, _ = replicas
    before = left(two)
    with streams(one, "counted", 1) as (chunks,):
        next(chunks)
        told_to_wait(two.chat("counted"), "1 concurrent")
        told_to_wait(one.chat("counted"), "1 concurrent")
    record = one.record_of(newest(one))
    assert left(two) == before - record["tokens_in"] - record["tokens_out"] - PROMPT - 1
    reply = one.chat("counted")
    assert reply.json()["usage"]["prompt_tokens"] == PROMPT
